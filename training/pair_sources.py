"""Sources of stages II and III: rows of texts, checked before the first step, and the share held out of training.

Laws: columns are anchor, positive and exactly `num_negatives` negatives, all of them text; what is not is a
`RecipeError` that names the source and the row. The rows of one anchor are trained on or held out together, by a hash
of the anchor, in every run alike.

COST: rows are kept on disk, memory-mapped (the cache of `datasets`); a Hub data set is fetched no further than
`max_rows`.
"""

import fnmatch
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetGenerationError

from .recipe import ContrastiveRecipe, RecipeError, Source
from .sources import check_columns, is_heldout, open_source

logger = logging.getLogger(__name__)


def load_sources(recipe: ContrastiveRecipe) -> DatasetDict:
    """All sources as (anchor, positive[, negative_1 ... negative_n]) columns.

    Args:
        recipe: Gives `sources`, `data_dir`, `num_negatives`, `fill_negatives`, `max_rows` and the seed.

    Returns:
        One data set a source, what is held out included.

    Raises:
        RecipeError: A missing file or column, an empty source, something that is no text, too few negatives under
            `fill_negatives: error`.
    """
    if recipe.fill_negatives not in ("random", "error"):
        raise RecipeError(f"fill_negatives={recipe.fill_negatives!r} is neither 'random' nor 'error'.")
    seed = int(recipe.training.get("seed", 42))
    loaded: dict[str, Dataset] = {}
    for source in recipe.sources:
        if source.name in loaded:
            raise RecipeError(f"source {source.name}: the name is used twice.")
        if source.weight <= 0:
            raise RecipeError(f"source {source.name}: weight={source.weight} is not above 0.")
        if not 0 <= source.heldout_share < 1:
            raise RecipeError(f"source {source.name}: heldout_share={source.heldout_share} is not in [0, 1).")
        try:
            loaded[source.name] = _load_source(source, recipe, seed)
        except DatasetGenerationError as error:  # a file that is cut off, or is not what its name says
            raise RecipeError(f"source {source.name}: {error.__cause__ or error}") from error
        logger.info("source %s: %d rows", source.name, len(loaded[source.name]))
    return DatasetDict(loaded)


def split_heldout(datasets: DatasetDict, recipe: ContrastiveRecipe) -> tuple[DatasetDict, DatasetDict]:
    """The rows to train on, and those that `heldout_share` of their source keeps from training.

    Returns:
        All sources, and the sources with a share.

    Raises:
        RecipeError: A source of which nothing is left, or nothing is held out.
    """
    training, heldout = {}, {}
    for source in recipe.sources:
        dataset = datasets[source.name]
        if source.heldout_share == 0:
            training[source.name] = dataset
            continue
        held = np.array([is_heldout(anchor.encode(), source.heldout_share) for anchor in dataset["anchor"]])
        if held.all() or not held.any():
            raise RecipeError(
                f"source {source.name}: heldout_share={source.heldout_share} takes {held.sum()} of its {len(held)} "
                "rows (rows of one anchor stay together); it needs more rows, or another share."
            )
        training[source.name] = dataset.select(np.flatnonzero(~held))
        heldout[source.name] = dataset.select(np.flatnonzero(held))
    return DatasetDict(training), DatasetDict(heldout)


def _load_source(source: Source, recipe: ContrastiveRecipe, seed: int) -> Dataset:
    dataset = open_source(source, recipe.data_dir, streaming=source.hub is not None)
    columns = {source.anchor: "anchor", source.positive: "positive"}
    if len(columns) < 2:
        raise RecipeError(f"source {source.name}: anchor and positive are the same column, {source.anchor!r}.")
    negatives = []
    if recipe.num_negatives and source.negatives is not None:
        names = dataset.column_names or list(next(iter(dataset), {}))
        negatives = fnmatch.filter(names, source.negatives) or [source.negatives]
    check_columns(dataset, source, [*columns, *negatives])
    dataset = dataset.select_columns([*columns, *negatives])
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    given = len(dataset) if isinstance(dataset, Dataset) else None
    dataset = dataset.filter(_Pairs(source), with_indices=True)
    if isinstance(dataset, IterableDataset):
        dataset = _to_disk(dataset, recipe.max_rows)
    elif len(dataset) < given:
        logger.info("source %s: %d rows without a pair are left out", source.name, given - len(dataset))
    if not len(dataset):
        raise RecipeError(f"source {source.name}: all pairs are empty or have anchor == positive.")
    if recipe.max_rows is not None and len(dataset) > recipe.max_rows:
        dataset = dataset.shuffle(seed=seed).select(range(recipe.max_rows))
    if recipe.num_negatives:
        dataset = _expand_negatives(dataset, negatives, source, recipe, seed)
    return dataset


class _Pairs:
    """Whether a row has two different texts; what is something else than text is an error."""

    def __init__(self, source: Source):
        self.source = source

    def __call__(self, row: dict[str, Any], index: int) -> bool:
        texts = []
        for role, column in (("anchor", self.source.anchor), ("positive", self.source.positive)):
            text = row[role]
            if not isinstance(text, str | None):
                raise RecipeError(
                    f"source {self.source.name}: {column!r} of row {index} is {text!r} "
                    f"({type(text).__name__}), not a text."
                )
            texts.append((text or "").strip())
        return all(texts) and texts[0] != texts[1]


def _to_disk(stream: IterableDataset, max_rows: int | None) -> Dataset:
    """The first `max_rows` rows of a stream (None: all), as a data set in the cache folder of `datasets`."""
    taken = stream if max_rows is None else stream.take(max_rows)
    first = next(iter(taken), None)
    if first is None:
        return Dataset.from_list([])
    return Dataset.from_generator(_rows, gen_kwargs={"stream": taken})


def _rows(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from stream


def _expand_negatives(
    dataset: Dataset, columns: list[str], source: Source, recipe: ContrastiveRecipe, seed: int
) -> Dataset:
    """Exactly `num_negatives` text columns; rows with fewer are filled with positives of other anchors, or refused."""
    wanted = recipe.num_negatives
    positives = dataset["positive"][:]
    own: dict[str, set[str]] = {}  # an anchor may have several positives, each in a row of its own
    for anchor, positive in zip(dataset["anchor"], positives, strict=True):
        own.setdefault(anchor, set()).add(positive)

    def expand(row: dict[str, Any], index: int) -> dict[str, str]:
        given = [text for name in columns for text in _as_list(row[name])]
        if not all(isinstance(text, str) for text in given):
            raise RecipeError(
                f"source {source.name}: {source.negatives!r} of row {index} holds something else than text."
            )
        # A dictionary keeps the order, and each text once.
        matching = {row["anchor"], *own[row["anchor"]]}
        kept = {text: None for text in given if text.strip() and text not in matching}
        negatives = list(kept)[:wanted]
        if len(negatives) < wanted and recipe.fill_negatives == "error":
            raise RecipeError(
                f"source {source.name}: row {index} has {len(negatives)} of {wanted} negatives; "
                "set fill_negatives: random."
            )
        generator = np.random.default_rng([seed, index])
        excluded = {*matching, *negatives}
        for _ in range(100 * wanted):
            if len(negatives) == wanted:
                break
            text = positives[int(generator.integers(len(positives)))]
            if text not in excluded:
                excluded.add(text)
                negatives.append(text)
        if len(negatives) < wanted:
            raise RecipeError(
                f"source {source.name}: too few different texts to fill {wanted} negatives of row {index}."
            )
        return {f"negative_{i}": text for i, text in enumerate(negatives, start=1)}

    # remove_columns goes first: a column of the input may have the name of a new one.
    expanded = dataset.map(expand, with_indices=True, remove_columns=columns, load_from_cache_file=False)
    return expanded.select_columns(["anchor", "positive", *(f"negative_{i}" for i in range(1, wanted + 1))])


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
