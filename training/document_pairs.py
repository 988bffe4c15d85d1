"""Pairs made of documents without labels: neighbouring sentences, or a passage and the rest of its document.

    python -m training.document_pairs --config training/recipes/tiny-sentences.yaml data_dir=DATA output_dir=SENTENCES
    python -m training.document_pairs --config training/recipes/tiny-passages.yaml data_dir=DATA output_dir=PASSAGES

Not in the paper. Sentences are texts to distil a teacher on. A passage and the document it was taken from teach that
the vector of a long text has to hold what stands anywhere in it: the inverse cloze task of Lee, Chang and Toutanova
(arXiv 1906.00300), its positive a document in place of a passage.

Laws: a sentence is in one pair; a document gives the same pairs wherever it stands: they are a function of documents
and recipe. A source's file is whole or not there, and a run that was killed goes on with the next;
a folder belongs to one recipe.
COST: in memory, up to twice the pairs of a source that are chosen.
"""

import argparse
import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path

import zstandard
from omegaconf import MISSING

from modeling_jina_bert.chunking import sentence_spans

from .executors import check_output
from .mining_texts import replacing, text_hashes
from .pair_recipe import check_names
from .recipe import RecipeError, Source, load_recipe, override, save_recipe
from .source_files import check_source, open_source, readable, text_of


class Kind(StrEnum):
    """What the two texts of a pair are; see `sentence_pairs` and `passage_pairs`."""

    sentences = "sentences"
    passages = "passages"


@dataclass
class DocumentPairsRecipe:
    """Pairs of texts from documents.

    Attributes:
        output_dir: Folder of `SOURCE.jsonl.zst`, with the columns `query` and `positive`.
        data_dir: Root of the sources' paths.
        sources: Documents, column `text`.
        kind: `sentences` or `passages`.
        pairs_per_source: Pairs of a source, chosen by a hash; None takes all.
        max_documents: Documents read of each source, the first ones; None reads all.
        min_words: Of a sentence, or of the passage.
        max_words: Of a sentence, or of the passage.
        document_words: Of the stretches that a longer document is cut into; `passages` only.
        seed: Of the choice.
    """

    output_dir: str = MISSING
    data_dir: str = "."
    sources: list[Source] = field(default_factory=list)
    kind: Kind = Kind.sentences
    pairs_per_source: int | None = None
    max_documents: int | None = None
    min_words: int = 5
    max_words: int = 40
    document_words: int = 600
    seed: int = 42


def sentence_pairs(text: str, *, min_words: int = 5, max_words: int = 40) -> Iterator[tuple[str, str]]:
    """Sentences 1 and 2, 3 and 4, ... of every stretch of a document whose sentences are all prose of that length.

    Args:
        text: A document; white space within a sentence becomes one space.
        min_words: A shorter sentence ends the stretch, as do a longer one and one that is mostly not letters.
        max_words: See `min_words`.
    """
    before = None
    for sentence, words in _sentences(text):
        if not (min_words <= words <= max_words and _is_prose(sentence)):
            before = None
        elif before is None:
            before = sentence
        else:
            yield before, sentence
            before = None


def passage_pairs(
    text: str, *, min_words: int = 30, max_words: int = 90, document_words: int = 600
) -> Iterator[tuple[str, str]]:
    """From every stretch of a document a run of sentences, and what the stretch is without it.

    Where the run stands is drawn by a hash of the stretch. A document has at least three sentences and twice
    `max_words` beside the passage; what is shorter gives no pair.

    Args:
        text: A document; white space within a sentence becomes one space.
        min_words: A run ends with the sentence that reaches it.
        max_words: A longer run, and one that is mostly not letters, is passed over for the next.
        document_words: A stretch ends with the sentence that reaches it.
    """
    stretch: list[tuple[str, int]] = []
    length = 0
    for sentence in _sentences(text):
        stretch.append(sentence)
        length += sentence[1]
        if length >= document_words:
            yield from _passage_of(stretch, min_words, max_words)
            stretch, length = [], 0
    yield from _passage_of(stretch, min_words, max_words)


def _passage_of(stretch: list[tuple[str, int]], min_words: int, max_words: int) -> Iterator[tuple[str, str]]:
    """At most one pair."""
    sentences, counts = [sentence for sentence, _ in stretch], [words for _, words in stretch]
    if len(stretch) < 4:
        return
    drawn = int(text_hashes([" ".join(sentences)])[0]) % len(stretch)
    for first in [*range(drawn, len(stretch)), *range(drawn)]:
        last = first
        words = 0
        while last < len(stretch) and words < min_words:
            words += counts[last]
            last += 1
        passage = " ".join(sentences[first:last])
        rest = sentences[:first] + sentences[last:]
        if min_words <= words <= max_words and _is_prose(passage) and passage not in " ".join(rest):
            if len(rest) >= 3 and sum(counts) - words >= 2 * max_words:
                yield passage, " ".join(rest)
            return


def _sentences(text: str) -> Iterator[tuple[str, int]]:
    """Sentences with one space between words, and their numbers of words."""
    for start, end in sentence_spans(text):
        words = text[start:end].split()
        yield " ".join(words), len(words)


def _is_prose(text: str) -> bool:
    return 2 * sum(character.isalpha() for character in text) >= len(text)


def choose(pairs: Iterable[tuple[str, str]], count: int | None, seed: int) -> list[tuple[str, str]]:
    """Different pairs with the smallest seeded hashes, in the order of these; all without a count."""
    hashed = {}
    for first, second in pairs:
        key = int(text_hashes([f"{seed}\n{first}\n{second}"])[0])
        hashed.setdefault(key, (first, second))
        if count is not None and len(hashed) >= 2 * count + 1000:
            hashed = dict(heapq.nsmallest(count, hashed.items()))
    return [pair for _, pair in heapq.nsmallest(count or len(hashed), hashed.items())]


def write_pairs(recipe: DocumentPairsRecipe) -> dict[str, int]:
    """Writes the files that are not there yet.

    Returns:
        Pairs of each source that was written now.

    Raises:
        RecipeError: Numbers that leave nothing; a source that cannot be read, or has no pair; a folder of something
            else.
    """
    if not 0 < recipe.min_words <= recipe.max_words or (recipe.pairs_per_source or 1) < 1:
        raise RecipeError("min_words must be from 1 to max_words, and pairs_per_source at least 1.")
    if recipe.kind is Kind.passages and recipe.document_words < 3 * recipe.max_words:
        raise RecipeError(f"document_words={recipe.document_words} is below three times max_words.")
    check_names(recipe.sources)
    check_output(recipe, what="pairs of documents")
    for source in recipe.sources:
        if source.heldout_share:
            raise RecipeError(f"source {source.name}: heldout_share would hold nothing out here.")
        check_source(source, recipe.data_dir, [source.text])
    save_recipe(recipe, recipe.output_dir)
    written = {}
    for source in recipe.sources:
        path = Path(recipe.output_dir) / f"{source.name}.jsonl.zst"
        if path.exists():
            continue
        pairs = choose(_pairs_of(source, recipe), recipe.pairs_per_source, recipe.seed)
        if not pairs:
            raise RecipeError(f"source {source.name}: no pair of {recipe.kind.value} in what was read.")
        lines = "".join(json.dumps({"query": a, "positive": b}, ensure_ascii=False) + "\n" for a, b in pairs)
        with replacing(path) as unfinished:
            unfinished.write_bytes(zstandard.compress(lines.encode("utf-8", "replace"), 12))
        written[source.name] = len(pairs)
    return written


def _pairs_of(source: Source, recipe: DocumentPairsRecipe) -> Iterator[tuple[str, str]]:
    pairs_of = partial(sentence_pairs, min_words=recipe.min_words, max_words=recipe.max_words)
    if recipe.kind is Kind.passages:
        pairs_of = partial(passage_pairs, **pairs_of.keywords, document_words=recipe.document_words)
    rows = open_source(source, recipe.data_dir, streaming=True)
    if recipe.max_documents is not None:
        rows = rows.take(recipe.max_documents)
    for index, row in enumerate(readable(source, rows)):
        yield from pairs_of(text_of(row[source.text], source, source.text, index))


def main():
    parser = argparse.ArgumentParser(description="Pairs of texts from documents without labels.")
    parser.add_argument("--config", required=True, help="recipe, a YAML file; training/recipes holds ours")
    parser.add_argument("overrides", nargs="*", type=override, metavar="key=value", help="for example max_words=60")
    arguments = parser.parse_args()
    recipe = load_recipe(DocumentPairsRecipe, arguments.config, arguments.overrides)
    for name, count in write_pairs(recipe).items():
        print(f"{name}: {count:,} pairs")
    print(f"pairs of documents finished: {recipe.output_dir}")


if __name__ == "__main__":
    from .run import exit_on_recipe_error

    exit_on_recipe_error(main)
