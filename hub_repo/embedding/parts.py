"""A long output is computed in parts, each of them kept, and appears whole at the end: `Parts`.

Laws:
1. The parts of an output are made of the same texts however often the run was interrupted, so its bytes are those of
   an uninterrupted run (on the same machine with as many threads).
2. A part counts when it was written whole: its description is renamed into place after its data. A resumed run reads
   the input again and compares every text of the parts that are done, so nothing is lost, doubled or out of step.
3. The output is renamed into place when all of it is there; until then one that existed stays.

The parts lie in a hidden folder beside the output, `.NAME.parts`, which one process at a time may use. COST: the disk
holds the parts and the output beside each other at the end.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .text_input import Row
from .vector_files import Embeddings, Layout, join_parts, write_part

PART_ROWS = 1024
PART_CHARACTERS = 2**20
"""A part is full with so many texts, or with the text that brings it to so many characters."""


class PartsError(ValueError):
    """Parts that cannot be gone on with; the message is one line that names the way out."""


@dataclass(frozen=True)
class Part:
    """A part that is done.

    Attributes:
        texts: Number of texts that it was made of.
        rows: Rows that they gave.
        digest: Of the texts and where they came from.
        cut_texts: Texts that were truncated, and `cut_tokens` their tokens that are not embedded.
        cut_tokens: See there.
    """

    texts: int
    rows: int
    digest: str
    cut_texts: int = 0
    cut_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """What texts gave: their rows, the number of texts that were truncated, and of tokens that are not embedded."""

    embeddings: Embeddings
    cut_texts: int = 0
    cut_tokens: int = 0


def batches(rows: Iterable[Row], part_rows: int = PART_ROWS) -> Iterator[list[Row]]:
    """The texts of each part.

    Example:
        >>> [len(batch) for batch in batches(Row("x" * 600_000, None, i) for i in range(5))]
        [2, 2, 1]
    """
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.text)
        if len(batch) == part_rows or characters >= PART_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def digest(batch: list[Row]) -> str:
    """Of all that a part is made from; texts and places, in order."""
    hasher = hashlib.blake2b(digest_size=16)
    for row in batch:
        hasher.update(json.dumps([row.file, row.row, row.id, row.text, row.spans]).encode())
    return hasher.hexdigest()


class Parts:
    """The parts of one output.

    Args:
        output: File or folder to be.
        job: Everything that the rows depend on besides the texts; values that JSON can hold.
        layout: Of the rows.
        suffix: Format of the parts, one of `vector_files.SUFFIXES`.
        part_rows: Texts of a part at most.
    """

    def __init__(self, output: Path, job: dict[str, Any], layout: Layout, *, suffix: str, part_rows: int = PART_ROWS):
        self.output = Path(output) if Path(output).name not in ("", "..") else Path(output).resolve()
        self.layout, self.suffix, self.part_rows = layout, suffix, part_rows
        self.job = json.loads(json.dumps({**job, **asdict(layout), "suffix": suffix, "part_rows": part_rows}))
        self.folder = self.output.with_name(f".{self.output.name}.parts")
        self.done: list[Part] = []
        self.overwritten = False

    @contextmanager
    def opened(self, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
        """Makes the folder, or finds the parts that are done, and keeps other processes off meanwhile.

        Args:
            resume: Go on with the parts of an interrupted run, if there are any.
            overwrite: Replace an output that exists, and drop parts.

        Raises:
            PartsError: The output or parts exist and neither was asked for; parts of a run with other options; a run
                that is still going on.
        """
        if resume and overwrite:
            raise PartsError("--resume goes on with a run and --overwrite begins it anew: give one of them.")
        self.folder.mkdir(exist_ok=True)
        try:
            with FileLock(str(self.folder / "lock"), timeout=0):
                try:
                    self._begin(resume=resume, overwrite=overwrite)
                    yield
                finally:
                    if not self._has_parts():  # what fails at once leaves nothing behind
                        shutil.rmtree(self.folder, ignore_errors=True)
        except Timeout:
            raise PartsError(f"{self.folder} is in use: another run is writing {self.output}.") from None

    def _has_parts(self) -> bool:
        return self._path(0, ".json").exists()

    def _begin(self, *, resume: bool, overwrite: bool):
        """Refuses what would be lost; then finds what is done, or clears the folder."""
        self.overwritten = overwrite
        if self._has_parts() and not (resume or overwrite):
            raise PartsError(
                f"{self.folder} holds parts of an interrupted run: --resume goes on, --overwrite begins anew."
            )
        if self.output.exists() and not overwrite and not self._has_parts():
            raise PartsError(f"{self.output} exists: --overwrite replaces it.")
        if overwrite or not self._has_parts():
            for old in self.folder.iterdir():
                if old.name != "lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            _write_text(self.folder / "job.json", json.dumps(self.job, indent=2, sort_keys=True))
        self._check_job()
        self.done = []
        while (description := self._path(len(self.done), ".json")).exists():
            self.done.append(Part(**json.loads(description.read_text(encoding="utf-8"))))

    def _check_job(self):
        before = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        for name in sorted(before.keys() | self.job.keys()):
            if before.get(name) != self.job.get(name):
                raise PartsError(
                    f"{self.folder} holds parts of another run: {name} was {before.get(name)}, is "
                    f"{self.job.get(name)}; repeat its options, or begin anew with --overwrite."
                )

    def run(self, rows: Iterable[Row], embed: Callable[[list[Row]], Result]) -> Iterator[tuple[Part, bool]]:
        """Computes the parts that are not done.

        Args:
            rows: All texts, from the first.
            embed: Texts -> what they gave.

        Yields:
            Each part, also those that were done, and whether it was.

        Raises:
            PartsError: The texts are not those that the parts were made of.
        """
        done = len(self.done)
        number = -1
        for number, batch in enumerate(batches(rows, self.part_rows)):
            found = digest(batch)
            if number < done:
                if found != self.done[number].digest:
                    first, last = batch[0], batch[-1]
                    raise PartsError(
                        f"the input is not that of the interrupted run, between {first} and {last}: give the same "
                        "input, or begin anew with --overwrite."
                    )
                yield self.done[number], True
                continue
            result = embed(batch)
            part = Part(len(batch), len(result.embeddings), found, result.cut_texts, result.cut_tokens)
            self._write(number, result.embeddings, part)
            self.done.append(part)
            yield part, False
        if number + 1 < done:
            raise PartsError("the input is shorter than that of the interrupted run; or begin anew with --overwrite.")

    def _write(self, number: int, embeddings: Embeddings, part: Part):
        unfinished = self.folder / f"unfinished{self.suffix}"
        write_part(unfinished, embeddings, self.layout)
        _to_disk(unfinished)
        os.replace(unfinished, self._path(number))
        _write_text(self._path(number, ".json"), json.dumps(asdict(part)))

    def paths(self) -> list[Path]:
        """The files of the parts, in order."""
        return [self._path(number) for number in range(len(self.done))]

    def finish(self, join: Callable[[list[Path], Path], None] | None = None):
        """Joins the parts, puts the output into place and removes the parts.

        Args:
            join: Writes the output to a path from the parts; by default it is their rows, in their format.
        """
        whole = self.folder / f"whole{self.output.suffix}"
        shutil.rmtree(whole) if whole.is_dir() else whole.unlink(missing_ok=True)
        if join is None:
            join_parts(self.paths(), whole, self.layout)
        else:
            join(self.paths(), whole)
        for path in whole.iterdir() if whole.is_dir() else [whole]:
            _to_disk(path)
        if self.output.is_dir():  # a folder cannot be replaced in one step; what it held goes with the parts
            os.replace(self.output, self.folder / "replaced")
        os.replace(whole, self.output)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int, suffix: str | None = None) -> Path:
        return self.folder / f"{number:06d}{self.suffix if suffix is None else suffix}"


def _write_text(path: Path, text: str):
    """Whole or not at all."""
    unfinished = path.with_name("unfinished")
    unfinished.write_text(text, encoding="utf-8")
    _to_disk(unfinished)
    os.replace(unfinished, path)


def _to_disk(path: Path):
    with path.open("rb+") as file:
        os.fsync(file.fileno())
