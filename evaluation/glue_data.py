"""Reading GLUE: local files or the Hub's data set, checked row by row.

Law: label ids are those of `glue_tasks`, whatever order the files count in; a split that loads is consistent, and
anything else is an `EvaluationError` that names the file, the row and the offender.
COST: all splits of a task are held in memory as text (QQP, the largest, about 0.2 GB).
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .glue_tasks import LARGEST_SIMILARITY, Task, measure
from .rows import read_rows, stored
from .sets import EvaluationError

Row = tuple[str, dict[str, Any]]  # where it stands, its columns
GENERIC_COLUMNS = ("sentence1", "sentence2")
LABEL_COLUMNS = ("label", "score")
HIDDEN = -1  # the label of the Hub's test splits


@dataclass(frozen=True)
class Split:
    """Texts and labels of one split.

    Attributes:
        first: First text of each row.
        second: Second text of each row; None for single sentences.
        labels: Label ids or similarities; None where they are hidden.
    """

    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float] | None

    def __len__(self) -> int:
        return len(self.first)

    @property
    def sha256(self) -> str:
        """Of all texts and labels, in order."""
        content = json.dumps([self.first, self.second, self.labels], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()

    def sample(self, rows: int) -> "Split":
        """Rows drawn at random, the same ones every time, in their order; all of them if there are not more."""
        if rows >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(0).permutation(len(self))[:rows])
        columns = (self.first, self.second, self.labels)
        return Split(*(column and [column[index] for index in chosen] for column in columns))


@dataclass(frozen=True)
class TaskData:
    """The splits of a task.

    Attributes:
        task: The task.
        train: What is trained on.
        dev: Part name -> split with labels; the first decides what is best.
        test: Part name -> split; what there is of them.
        train_rows: Rows of the whole train split.
    """

    task: Task
    train: Split
    dev: dict[str, Split]
    test: dict[str, Split] = field(default_factory=dict)
    train_rows: int = 0


class LeftOut(Exception):
    """A task cannot be scored with these data; the message is the reason."""


def baseline(train: Split, split: Split, task: Task) -> dict[str, float] | None:
    """Measures of the most frequent label of the train split, or of its mean; None where labels are hidden."""
    if split.labels is None or train.labels is None:
        return None
    labels = np.asarray(train.labels)
    constant = labels.mean() if task.is_regression else np.bincount(labels).argmax()
    return measure(task, np.full(len(split), constant), split.labels)


def load_task(
    task: Task,
    data: Path | None,
    *,
    hub: str,
    folder: str | None = None,
    label_names: Sequence[str] | None = None,
    max_train_rows: int | None = None,
) -> TaskData:
    """Reads and checks the splits of a task.

    Args:
        task: The task.
        data: Folder with a folder for each task that holds {train,dev,test}.jsonl (or .zst, .gz behind it; for MNLI
            dev_matched, dev_mismatched, test_matched, test_mismatched); None reads the Hub.
        hub: Name of the Hub's data set.
        folder: The task's folder, relative to `data`; None is its name.
        label_names: What the integer labels of the files mean; None is `task.labels`.
        max_train_rows: Rows of the train split to keep, drawn at random; None keeps all.

    Raises:
        EvaluationError: A file or row is malformed, or the Hub's data set cannot be had.
        LeftOut: There is no train or no development split.
    """
    names = tuple(label_names or task.labels)
    if sorted(names) != sorted(task.labels):
        raise EvaluationError(f"{task.name}: label_names={list(names)} are not the labels {', '.join(task.labels)}.")
    if data is None:
        read, dev = _hub_reader(hub, task.config), "validation"
    else:
        read, dev = _local_reader(data / (folder or task.name)), "dev"

    def load(split: str, *, labelled: bool = True, of: Callable = read) -> Split | None:
        rows = of(split)
        return rows and _checked(task, rows, names, labelled=labelled)

    train = load("train")
    parts = [part for part in task.parts if not part.diagnostic]
    dev_splits = {part.name: load(dev + part.suffix) for part in parts}
    missing = [split for split, found in (("train", train), *dev_splits.items()) if found is None]
    if train is None or missing:
        where = hub if data is None else data / (folder or task.name)
        what = "train split" if train is None else f"development split of {missing[0]}"
        raise LeftOut(f"no {what} in {where}")
    test = {part.name: load("test" + part.suffix, labelled=False) for part in parts}
    for part in task.parts:
        if part.diagnostic:
            of = _hub_reader(hub, part.name.lower()) if data is None else _local_reader(data / part.name)
            test[part.name] = load("test", labelled=False, of=of)
    found = {name: split for name, split in test.items() if split is not None}
    loaded = TaskData(task, train, dev_splits, found, len(train))
    return loaded if max_train_rows is None else replace(loaded, train=train.sample(max_train_rows))


def _local_reader(folder: Path) -> Callable[[str], Iterator[Row] | None]:
    """Reads the rows of a split by its name; None where there is no such file."""

    def read(split: str) -> Iterator[Row] | None:
        path = stored(folder / f"{split}.jsonl")
        return None if path is None else read_rows(path, {})

    return read


def _hub_reader(hub: str, config: str) -> Callable[[str], Iterator[Row] | None]:
    try:
        from datasets import ClassLabel, load_dataset
    except ImportError as error:
        raise ImportError("Reading GLUE from the Hub needs: pip install -e '.[evaluate]'") from error
    try:
        splits = load_dataset(hub, config)
    except (OSError, ValueError) as error:  # no such repository or configuration; no connection
        raise EvaluationError(f"{hub}, {config}: cannot be had ({' '.join(str(error).split())}).") from error

    def rows(split: str) -> Iterator[Row]:
        label = splits[split].features.get("label")
        for number, row in enumerate(splits[split]):
            # Names rather than numbers where there are names: they cannot mean something else.
            if isinstance(label, ClassLabel) and row["label"] != HIDDEN:
                row["label"] = label.int2str(row["label"])
            yield f"{hub}, {config}, {split}, row {number}", row

    return lambda split: rows(split) if split in splits else None


def _checked(task: Task, rows: Iterable[Row], label_names: Sequence[str], *, labelled: bool) -> Split:
    """Texts and labels of rows, the label ids in the order of `task.labels`."""
    texts: list[list[str]] = [[] for _ in task.columns]
    labels: list[Any] = []
    columns: Sequence[str] | None = None
    for place, row in rows:
        if columns is None:
            generic = GENERIC_COLUMNS[: len(task.columns)]
            columns = next((names for names in (task.columns, generic) if set(names) <= set(row)), None)
            if columns is None:
                wanted = " or ".join(dict.fromkeys(", ".join(names) for names in (task.columns, generic)))
                raise EvaluationError(f"{place}: {task.name} needs the columns {wanted}; there are {', '.join(row)}.")
        for column, name in zip(texts, columns, strict=True):
            if not isinstance(row.get(name), str):
                raise EvaluationError(f"{place}: no text in the column {name!r}.")
            column.append(row[name])
        label = next((row[name] for name in LABEL_COLUMNS if row.get(name) is not None), HIDDEN)
        if label == HIDDEN:
            if labelled or any(known is not None for known in labels):
                raise EvaluationError(f"{place}: no label (column {' or '.join(LABEL_COLUMNS)}).")
            labels.append(None)
        elif labels and labels[-1] is None:
            raise EvaluationError(f"{place}: has a label, the rows before it have none.")
        else:
            labels.append(_label(task, place, label, label_names))
    if not labels:
        raise EvaluationError(f"{task.name}: a split without rows.")
    return Split(texts[0], texts[1] if len(texts) > 1 else None, None if labels[-1] is None else labels)


def _label(task: Task, place: str, label: Any, names: Sequence[str]) -> int | float:
    if task.is_regression:
        if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
            raise EvaluationError(f"{place}: the label {label!r} is not a number.")
        if not 0 <= label <= LARGEST_SIMILARITY:
            raise EvaluationError(f"{place}: the label {label!r} is not between 0 and {LARGEST_SIMILARITY:g}.")
        return float(label)
    if isinstance(label, str) and label in task.labels:
        return task.labels.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return task.labels.index(names[label])
    expected = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
    raise EvaluationError(f"{place}: the label {label!r} is none of {expected}.")
