"""What each form of `long_documents` makes of a corpus: tokens cut away, padding, sequences; no model is run.

    python -m training.long_documents --config training/recipes/tiny512-mlm.yaml data_dir=DATA

Law: sequences and batches are those of stage I (`Cutter`, `fill`); every document is read and tokenised once, whatever
the weights of the sources, and the sequences are shuffled all together, not in a buffer.
COST: 20 bytes a sequence and form.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .packing import Tally, fill
from .recipe import MLMRecipe, load_recipe, override
from .sources import FORMS, Cutter, SourceReader, open_sources, open_tokenizer


class _Lengths:
    """Sequences of which the length alone is known, in random order, as `fill` reads them."""

    def __init__(self, lengths: np.ndarray, seed: int):
        self._lengths = np.random.default_rng(seed).permutation(lengths)

    def position(self) -> dict[str, Any]:
        return {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"input_ids": range(length)} for length in self._lengths.tolist())


def tallies(recipe: MLMRecipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tally]:
    """What the batches of one pass over the training documents hold, for each form of `long_documents`.

    Args:
        recipe: Gives the sources, `max_length`, the seed and `training.per_device_train_batch_size`.
        tokenizer: A fast tokenizer.

    Returns:
        By form: `sequences`, `tokens`, `positions` and `lost`. A last batch that is not full is left out.

    Raises:
        RecipeError: See `open_sources`.
    """
    cutters = {form: Cutter(replace(recipe, long_documents=form), tokenizer) for form in FORMS}
    lengths: dict[str, list[int]] = {form: [] for form in FORMS}
    lost = dict.fromkeys(FORMS, 0)
    whole = Cutter(replace(recipe, long_documents="split", max_length=2**40), tokenizer)  # a sequence a document
    for opened in open_sources(recipe, recipe.sources, tokenizer):
        for document in SourceReader(opened, whole).one_pass():
            for form, cutter in cutters.items():
                for sequence in cutter.sequences(document["input_ids"][1:-1]):
                    lengths[form].append(len(sequence["input_ids"]))
                    lost[form] += sequence["lost"]
    size, seed = int(recipe.training["per_device_train_batch_size"]), int(recipe.training.get("seed", 42))
    return {
        form: replace(
            _padded(
                _Lengths(np.array(lengths[form]), seed), size, size * recipe.max_length * (form == "pack") or None
            ),
            lost=lost[form],
        )
        for form in FORMS
    }


def _padded(lengths: _Lengths, size: int, budget: int | None) -> Tally:
    total = Tally()
    for batch, _ in fill(lengths, size, budget):
        rows = [len(sequence["input_ids"]) for sequence in batch]
        total += Tally(sequences=len(rows), tokens=sum(rows), positions=len(rows) * max(rows))
    return total


def table(found: dict[str, Tally]) -> str:
    """A row for each form."""
    rows = ["| `long_documents` | sequences | tokens | lost | padded |", "|---|--:|--:|--:|--:|"]
    for form, tally in found.items():
        shares = f"{tally.lost_share:.1%} | {tally.padding_share:.1%}"
        rows.append(f"| `{form}` | {tally.sequences:,} | {tally.tokens:,} | {shares} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m training.long_documents", description="Tokens lost and padded by each form of long_documents."
    )
    parser.add_argument("--config", required=True, help="recipe of stage I, a YAML file")
    parser.add_argument("overrides", nargs="*", type=override, metavar="key=value", help="for example max_length=1024")
    arguments = parser.parse_args()
    recipe = load_recipe(MLMRecipe, arguments.config, arguments.overrides)
    print(table(tallies(recipe, open_tokenizer(recipe.tokenizer))))


if __name__ == "__main__":
    from .run import exit_on_recipe_error

    exit_on_recipe_error(main)
