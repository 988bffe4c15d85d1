"""Which rows make the batches of stages II and III.

Laws: a batch, over all processes together, has rows of one source, and no anchor or positive of a row stands a second
time in it, in whatever column, case or whitespace (it would be a false negative of its own row). Hard negatives may:
one that several rows share is a negative of all of them. Its source is drawn with probability size times weight.
Batches are a function of the seed alone, and who has the place of a batch goes on from it without reading what came
before.

A source is read in passes, each in a random order of its own. A row that would break that is kept for the
next batches; what is left of a pass and makes no batch is left out of this pass.

COST: 4 bytes a row of a source that is being read, for the order of its pass; every process looks at the texts of the
whole batch, its own rows and those of the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from .mining_texts import normalised
from .packing import Reader
from .recipe import RecipeError

LABEL = "label"
"""Column that is no text."""
_KEPT = 4  # batches' worth of rows that a source keeps for later
_PASSES = 20  # that are tried for a batch: in another order the rows that clash may fit


@dataclass
class Cursor:
    """Where a source is read.

    Attributes:
        visit: Passes over it that were finished.
        next: Rows of the running pass that were looked at.
        kept: Rows that did not fit the batches they were looked at for; the first of the next batch.
    """

    visit: int = 0
    next: int = 0
    kept: list[int] = field(default_factory=list)


@dataclass
class Drawn:
    """One batch of all processes, and where the sampler is after it.

    Attributes:
        source: Name of the source.
        rows: Rows of that source, those of the first process first.
        place: JSON; what `SourceBatches` takes as `place`.
    """

    source: str
    rows: list[int]
    place: dict[str, Any]


class SourceBatches:
    """The batches of all processes, without end, from any place.

    Args:
        datasets: The sources; every column but `label` is text.
        weights: Of each source, multiplied by its rows.
        size: Rows of a batch, all processes together.
        seed: Of the draws and orders.
        place: Where to go on; None begins.

    Raises:
        RecipeError: A source too small, or with too many anchors and positives in common, for a batch; a place in
            sources of other sizes.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        weights: Mapping[str, float],
        *,
        size: int,
        seed: int,
        place: dict[str, Any] | None = None,
    ):
        self.size, self.seed, self.names = size, seed, list(datasets)
        self._texts = [
            dataset.select_columns([name for name in dataset.column_names if name != LABEL]).with_format(None)
            for dataset in datasets.values()
        ]
        shares = np.array([len(dataset) * weights[name] for name, dataset in datasets.items()], dtype=np.float64)
        self.probabilities = shares / shares.sum()
        self.per_epoch = max(1, round(sum(map(len, datasets.values())) / size))  # weights change who, not how many
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        place = place or {"batches": 0, "cursors": {}}
        self._sizes = {name: len(dataset) for name, dataset in datasets.items()}
        if place.get("rows", self._sizes) != self._sizes or list(place.get("rows", self.names)) != self.names:
            raise RecipeError(
                f"the sources had {place['rows']} rows, now {self._sizes}: their places are no longer what they were. "
                "Resume with the data that the run began with, or begin a new run."
            )
        self.batches: int = place["batches"]
        self._cursors = [Cursor(**place["cursors"].get(name, {})) for name in self.names]
        for source in range(len(self.names)):
            if self.batches == 0:
                self._fill(source, Cursor())

    def __iter__(self) -> Iterator[Drawn]:
        while True:
            yield self.draw()

    def draw(self) -> Drawn:
        """The next batch."""
        generator = np.random.default_rng([self.seed, self.batches])
        source = int(generator.choice(len(self.names), p=self.probabilities))
        rows, self._cursors[source] = self._fill(source, self._cursors[source])
        self.batches += 1
        cursors = zip(self.names, self._cursors, strict=True)
        begun = {name: asdict(cursor) for name, cursor in cursors if cursor != Cursor()}
        return Drawn(self.names[source], rows, {"batches": self.batches, "cursors": begun, "rows": self._sizes})

    def _fill(self, source: int, cursor: Cursor) -> tuple[list[int], Cursor]:
        """One batch of a source, of this pass or, if it has no more, of the next that has one."""
        passes = _PASSES if len(self._texts[source]) >= self.size else 1
        most = 0
        for visit in range(cursor.visit, cursor.visit + 1 + passes):
            order = self._order(source, visit)
            batch = _Batch(self.size)
            start, kept = (cursor.next, cursor.kept) if visit == cursor.visit else (0, [])
            batch.add(kept, self._rows(source, kept))
            while batch.missing and start < len(order):
                rows = order[start : start + batch.missing].tolist()
                batch.add(rows, self._rows(source, rows))
                start += len(rows)
            if not batch.missing:
                return batch.rows, Cursor(visit, start, batch.kept[: _KEPT * self.size])
            most = max(most, len(batch.rows))
        raise RecipeError(
            f"source {self.names[source]}: a batch needs {self.size} rows with anchors and positives of their own, "
            f"and its {len(self._texts[source])} rows gave {most}; lower "
            "training.per_device_train_batch_size, or leave the source out."
        )

    def _order(self, source: int, visit: int) -> np.ndarray:
        """`(rows,) int32 or int64`, the order of a pass; the running one of each source is held."""
        if self._orders.get(source, (None,))[0] != visit:
            rows = len(self._texts[source])
            order = np.arange(rows, dtype=np.int32 if rows < 2**31 else np.int64)
            np.random.default_rng([self.seed, source, visit, 1]).shuffle(order)
            self._orders[source] = (visit, order)
        return self._orders[source][1]

    def _rows(self, source: int, rows: list[int]) -> list[tuple[str, ...]]:
        """The texts of some rows."""
        return list(zip(*self._texts[source][rows].values(), strict=True)) if rows else []


class _Batch:
    """A batch being filled with rows whose anchors and positives stand in it once."""

    def __init__(self, size: int):
        self.rows: list[int] = []
        self.kept: list[int] = []
        self.missing = size
        self._matching: set[str] = set()
        self._negatives: set[str] = set()

    def add(self, rows: Sequence[int], texts: Sequence[tuple[str, ...]]):
        for row, columns in zip(rows, texts, strict=True):
            anchor, positive, *negatives = map(normalised, columns)
            once = {anchor, positive}
            clash = once & self._matching or once & self._negatives or not self._matching.isdisjoint(negatives)
            if self.missing and not clash:
                self._matching |= once
                self._negatives.update(negatives)
                self.rows.append(row)
                self.missing -= 1
            else:
                self.kept.append(row)


class ProcessBatches(Sampler[list[int]]):
    """The rows that one process takes of every batch, as indices into the sources laid end to end.

    Iterating it once is an epoch: `len(self)` batches, or what a resumed run has left of one.

    Args:
        batches: The batches of all processes.
        offsets: Name of a source -> its first row.
        reader: Which process this is.
        per_epoch: Batches of an epoch.
        total: Batches after which the run ends; None has no end.
        counted: Batches that the run has behind it, as this process counts them: a step of before may have taken
            others. None is as many as were drawn.
    """

    def __init__(
        self,
        batches: SourceBatches,
        offsets: Mapping[str, int],
        *,
        reader: Reader,
        per_epoch: int,
        total: int | None = None,
        counted: int | None = None,
    ):
        self._counted = batches.batches if counted is None else counted
        self._batches, self._offsets, self._reader, self._per_epoch = batches, offsets, reader, per_epoch
        self._total, self._given = total, batches.batches
        self._drawn: dict[int, Drawn] = {}

    def __len__(self) -> int:
        return self._per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        size = self._batches.size // self._reader.ranks
        left = self._per_epoch - self._counted % self._per_epoch
        if self._total is not None:
            left = min(left, self._total - self._counted)
        for _ in range(left):
            drawn = self._batches.draw()
            self._given += 1
            self._counted += 1
            self._drawn[self._given] = drawn
            own = drawn.rows[self._reader.rank * size : (self._reader.rank + 1) * size]
            yield [self._offsets[drawn.source] + row for row in own]

    def taken(self, number: int) -> Drawn:
        """What batch `number` of the run, from 1, was; asked once for each, when it comes out of the data loader.

        What the loader's workers fetched ahead and was not trained on is not skipped that way.
        """
        return self._drawn.pop(number)
