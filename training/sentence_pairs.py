"""Pairs of neighbouring sentences from documents: texts without labels for distillation. Not in the paper.

    python -m training.sentence_pairs --config training/recipes/tiny-sentences.yaml data_dir=DATA output_dir=SENTENCES

Laws: a sentence is in one pair; a document gives the same pairs wherever it stands, so a source's pairs are a function
of its documents and the seed. A source's file is whole or not there, and a run that was killed goes on with the next.
COST: in memory, up to twice the pairs of a source that are chosen.
"""

import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zstandard
from omegaconf import MISSING

from modeling_jina_bert.chunking import sentence_spans

from .mining_recipe import reading
from .mining_texts import replacing, text_hashes
from .recipe import RecipeError, Source, command_line, load_recipe
from .sources import check_columns, open_source


@dataclass
class SentenceRecipe:
    """Pairs of neighbouring sentences.

    Attributes:
        output_dir: Folder of `SOURCE.jsonl.zst`, with the columns `query` and `positive`.
        data_dir: Root of the sources' paths.
        sources: Documents, column `text`.
        pairs_per_source: Pairs of a source, chosen by a hash; None takes all.
        max_documents: Documents read of each source, the first ones; None reads all.
        min_words: Of a sentence.
        max_words: Of a sentence.
        seed: Of the choice.
    """

    output_dir: str = MISSING
    data_dir: str = "."
    sources: list[Source] = field(default_factory=list)
    pairs_per_source: int | None = None
    max_documents: int | None = None
    min_words: int = 5
    max_words: int = 40
    seed: int = 42


def sentence_pairs(text: str, *, min_words: int = 5, max_words: int = 40) -> Iterator[tuple[str, str]]:
    """Sentences 1 and 2, 3 and 4, ... of every stretch of a document whose sentences are all prose of that length.

    Args:
        text: A document; white space within a sentence becomes one space.
        min_words: A shorter sentence ends the stretch, as do a longer one and one that is mostly not letters.
        max_words: See `min_words`.
    """
    before = None
    for start, end in sentence_spans(text):
        words = text[start:end].split()
        sentence = " ".join(words)
        letters = sum(character.isalpha() for character in sentence)
        if not min_words <= len(words) <= max_words or 2 * letters < len(sentence):
            before = None
        elif before is None:
            before = sentence
        else:
            yield before, sentence
            before = None


def choose(pairs: Iterable[tuple[str, str]], count: int | None, seed: int) -> list[tuple[str, str]]:
    """Different pairs with the smallest seeded hashes, in the order of these; all without a count."""
    hashed = {}
    for first, second in pairs:
        key = int(text_hashes([f"{seed}\n{first}\n{second}"])[0])
        hashed.setdefault(key, (first, second))
        if count is not None and len(hashed) >= 2 * count + 1000:
            hashed = dict(heapq.nsmallest(count, hashed.items()))
    return [pair for _, pair in heapq.nsmallest(count or len(hashed), hashed.items())]


def write_pairs(recipe: SentenceRecipe) -> dict[str, int]:
    """Writes the files that are not there yet.

    Returns:
        Pairs of each source that was written now.

    Raises:
        RecipeError: Numbers that leave nothing; a source that cannot be read, or has no pair.
    """
    if not 0 < recipe.min_words <= recipe.max_words or (recipe.pairs_per_source or 1) < 1:
        raise RecipeError("min_words must be from 1 to max_words, and pairs_per_source at least 1.")
    for source in recipe.sources:
        with reading(source):
            check_columns(open_source(source, recipe.data_dir, streaming=True), source, [source.text])
    written = {}
    for source in recipe.sources:
        path = Path(recipe.output_dir) / f"{source.name}.jsonl.zst"
        if path.exists():
            continue
        pairs = choose(_pairs_of(source, recipe), recipe.pairs_per_source, recipe.seed)
        if not pairs:
            raise RecipeError(f"source {source.name}: no two neighbouring sentences in what was read.")
        lines = "".join(json.dumps({"query": a, "positive": b}, ensure_ascii=False) + "\n" for a, b in pairs)
        with replacing(path) as partial:
            partial.write_bytes(zstandard.compress(lines.encode("utf-8", "replace"), 12))
        written[source.name] = len(pairs)
    return written


def _pairs_of(source: Source, recipe: SentenceRecipe) -> Iterator[tuple[str, str]]:
    with reading(source):
        rows = open_source(source, recipe.data_dir, streaming=True)
        if recipe.max_documents is not None:
            rows = rows.take(recipe.max_documents)
        for row in rows:
            yield from sentence_pairs(row[source.text], min_words=recipe.min_words, max_words=recipe.max_words)


def main():
    arguments = command_line("Pairs of neighbouring sentences.")
    recipe = load_recipe(SentenceRecipe, arguments.config, arguments.overrides)
    for name, count in write_pairs(recipe).items():
        print(f"{name}: {count:,} pairs")
    print(f"sentence pairs finished: {recipe.output_dir}")


if __name__ == "__main__":
    from .run import exit_on_recipe_error

    exit_on_recipe_error(main)
