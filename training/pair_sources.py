"""Sources of stages II and III: rows of texts, checked before the first step, and the share held out of training.

Laws: columns are anchor, positive and exactly `num_negatives` negatives, all of them text; what is not is a
`RecipeError` that names the source and the row. The rows of one anchor are trained on or held out together, by a hash
of the anchor, in every run alike.

COST: rows are kept on disk, memory-mapped (the cache of `datasets`), where other processes and runs find them; a Hub
data set is fetched once a revision and no further than `max_rows`. In memory 16 bytes a row while negatives are
filled.
"""

import fnmatch
import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset_builder
from datasets.fingerprint import Hasher

from .mining_texts import Texts, normalised, text_hashes
from .recipe import ContrastiveRecipe, RecipeError, Source
from .source_files import check_columns, check_files, open_source, readable, reading
from .sources import is_heldout

logger = logging.getLogger(__name__)

D = TypeVar("D", Dataset, IterableDataset)

_VERSION = 2
"""Of what is made of rows here; another one finds nothing of this one's in the cache."""


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
        with reading(source):
            loaded[source.name] = _load_source(source, recipe, seed)
        logger.info("source %s: %d rows", source.name, len(loaded[source.name]))
    return DatasetDict(loaded)


def split_heldout(datasets: DatasetDict, recipe: ContrastiveRecipe) -> tuple[DatasetDict, DatasetDict]:
    """The rows to train on, and those that `heldout_share` of their source keeps from training.

    Anchors that differ in case or whitespace alone are on the same side.

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
        anchors = map(normalised, dataset["anchor"])
        held = np.array([is_heldout(anchor.encode(), source.heldout_share) for anchor in anchors])
        if held.all() or not held.any():
            raise RecipeError(
                f"source {source.name}: heldout_share={source.heldout_share} takes {held.sum()} of its {len(held)} "
                "rows (rows of one anchor stay together); it needs more rows, or another share."
            )
        training[source.name] = dataset.select(np.flatnonzero(~held))
        heldout[source.name] = dataset.select(np.flatnonzero(held))
    return DatasetDict(training), DatasetDict(heldout)


def _load_source(source: Source, recipe: ContrastiveRecipe, seed: int) -> Dataset:
    if source.anchor == source.positive:
        raise RecipeError(f"source {source.name}: anchor and positive are the same column, {source.anchor!r}.")
    dataset = (_from_hub if source.hub is not None else _from_files)(source, recipe)
    if not len(dataset):
        raise RecipeError(_no_pairs(source))
    if recipe.max_rows is not None and len(dataset) > recipe.max_rows:
        dataset = dataset.shuffle(seed=seed).select(range(recipe.max_rows))
    if not recipe.num_negatives:
        return dataset
    columns = [name for name in dataset.column_names if name not in ("anchor", "positive")]
    negatives = _Negatives(dataset, columns, source, recipe, seed)
    # remove_columns goes first: a column of the input may have the name of a new one.
    dataset = dataset.map(negatives, with_indices=True, remove_columns=columns)
    return dataset.select_columns(["anchor", "positive", *(f"negative_{i + 1}" for i in range(recipe.num_negatives))])


def _no_pairs(source: Source) -> str:
    return f"source {source.name}: all pairs are empty or have anchor == positive."


def _from_files(source: Source, recipe: ContrastiveRecipe) -> Dataset:
    """The pairs of a local source."""
    if source.path is not None:
        check_files(source, recipe.data_dir)
    check_columns(open_source(source, recipe.data_dir, streaming=True), source, [])  # no rows: no data set on disk
    rows = open_source(source, recipe.data_dir, streaming=False)
    dataset = _pairs(rows, source, recipe)
    if len(dataset) < len(rows):
        logger.info("source %s: %d rows without a pair are left out", source.name, len(rows) - len(dataset))
    return dataset


def _from_hub(source: Source, recipe: ContrastiveRecipe) -> Dataset:
    """The first `max_rows` pairs of a Hub data set, on disk; fetched if the cache does not have them.

    Without a fingerprint the cache would go by the stream, which is another one in each process.
    """
    revision = load_dataset_builder(source.hub, source.hub_config).hash
    wanted = [source.hub, revision, source.hub_config, source.split, source.anchor, source.positive, recipe.max_rows]
    wanted += [source.negatives if recipe.num_negatives and source.is_minable else None, _VERSION]
    rows = {"source": source, "recipe": recipe}
    return Dataset.from_generator(_stream, gen_kwargs=rows, fingerprint=Hasher.hash(wanted))


def _stream(source: Source, recipe: ContrastiveRecipe) -> Iterator[dict[str, Any]]:
    rows = _pairs(open_source(source, recipe.data_dir, streaming=True), source, recipe)
    row = None
    for row in rows if recipe.max_rows is None else rows.take(recipe.max_rows):
        yield row
    if row is None:
        raise RecipeError(_no_pairs(source))


def _pairs(dataset: D, source: Source, recipe: ContrastiveRecipe) -> D:
    """Columns anchor, positive and those of the negatives; rows with two different texts.

    Raises:
        RecipeError: No rows, or no such column; something that is no text, when it is read.
    """
    columns = {source.anchor: "anchor", source.positive: "positive"}
    negatives = []
    if recipe.num_negatives and source.is_minable and source.negatives is not None:
        names = dataset.column_names or list(next(readable(source, dataset), {}))
        negatives = fnmatch.filter(names, source.negatives) or [source.negatives]
    check_columns(dataset, source, [*columns, *negatives])
    dataset = dataset.select_columns([*columns, *negatives])
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    return dataset.filter(_Pairs(source), with_indices=True)


class _Pairs:
    """Whether a row has two texts that differ in more than case and whitespace; what is no text is an error."""

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
            texts.append(normalised(text or ""))
        return all(texts) and texts[0] != texts[1]


class _Negatives:
    """Exactly `num_negatives` text columns; rows with fewer are filled with positives of other anchors, or refused.

    Its hash is that of what decides the result; with that of the rows it is the name of the result in the cache.
    """

    def __init__(self, dataset: Dataset, columns: list[str], source: Source, recipe: ContrastiveRecipe, seed: int):
        self.columns, self.name, self.pattern, self.seed = columns, source.name, source.negatives, seed
        self.wanted, self.fill = recipe.num_negatives, recipe.fill_negatives
        self._dataset = dataset

    def __getstate__(self) -> dict[str, Any]:
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**public, "version": _VERSION}

    @cached_property
    def _positives(self) -> Texts:
        return Texts(self._dataset.select_columns(["positive"]).rename_column("positive", "text"))

    @cached_property
    def _anchors(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows in the order of their anchors' hashes, and these hashes."""
        anchors = Texts(self._dataset.select_columns(["anchor"]).rename_column("anchor", "text"))
        hashes = np.concatenate([text_hashes(map(normalised, texts)) for texts in anchors.batches()])
        order = np.argsort(hashes, kind="stable")
        return order, hashes[order]

    def _matching(self, anchor: str, positive: str) -> set[str]:
        """The anchor and its positives, normalised: it may have several, each in a row of its own."""
        order, hashes = self._anchors
        start, stop = (np.searchsorted(hashes, text_hashes([normalised(anchor)]), side) for side in ("left", "right"))
        rows = order[start[0] : stop[0]]
        return set(map(normalised, [anchor, *(self._positives.take(rows) if len(rows) > 1 else [positive])]))

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, str]:
        given = [text for name in self.columns for text in _as_list(row[name])]
        if not all(isinstance(text, str) for text in given):
            raise RecipeError(f"source {self.name}: {self.pattern!r} of row {index} holds something else than text.")
        matching = self._matching(row["anchor"], row["positive"])
        kept: dict[str, str] = {}  # keeps the order, and each text once
        for text in given:
            if (key := normalised(text)) and key not in matching:
                kept.setdefault(key, text)
        negatives = list(kept.values())[: self.wanted]
        if len(negatives) < self.wanted and self.fill == "error":
            raise RecipeError(
                f"source {self.name}: row {index} has {len(negatives)} of {self.wanted} negatives; "
                "set fill_negatives: random."
            )
        self._add_random(negatives, matching, index)
        return {f"negative_{i}": text for i, text in enumerate(negatives, start=1)}

    def _add_random(self, negatives: list[str], matching: set[str], index: int):
        generator = np.random.default_rng([self.seed, index])
        excluded = {*matching, *map(normalised, negatives)}
        for _ in range(100):
            if len(negatives) == self.wanted:
                return
            for text in self._positives.take(generator.integers(len(self._positives), size=self.wanted)):
                if (key := normalised(text)) not in excluded and len(negatives) < self.wanted:
                    excluded.add(key)
                    negatives.append(text)
        raise RecipeError(
            f"source {self.name}: too few different texts to fill {self.wanted} negatives of row {index}."
        )


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
