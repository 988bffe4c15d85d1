"""Opening sources: local JSONL (.zst, .gz), CSV, parquet and text files, or Hub data sets, all through `datasets`.

Laws: what cannot be read is a `RecipeError` of one line that names the source and its file or data set, whatever
library found it and whenever; what can be known of a file without decoding it is known before any work. This module
imports no transformers.
COST: `check_files` reads 3 bytes of every 128 KiB that a .zst file holds, and the footers of parquet files.
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
import zstandard
from datasets import Dataset, IterableDataset, load_dataset

from .recipe import RecipeError, Source

T = TypeVar("T")

_BUILDERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"
}  # fmt: skip
_OPTIONS = {  # the text "NA" is a text
    ".csv": {"keep_default_na": False},
    ".tsv": {"keep_default_na": False, "sep": "\t"},
}
_ZSTD_HEADER = 18  # bytes, at most
_CHECKED_ROWS = 100
"""Rows of each source that are looked at before any work."""


def open_source(source: Source, data_dir: str, *, streaming: bool) -> Dataset | IterableDataset:
    """Opens one source.

    Args:
        source: What to open.
        data_dir: Root of a relative `source.path`.
        streaming: Whether to stream it instead of preparing it on disk.

    Returns:
        The data set, all its columns.

    Raises:
        RecipeError: Neither or both of `path` and `hub`; no such file; a file type we do not read; no rows; what
            cannot be read or, of the Hub, opened.
    """
    if (source.path is None) == (source.hub is None):
        raise RecipeError(f"source {source.name}: give exactly one of path and hub.")
    if source.hub is not None:
        with reading(source):
            return load_dataset(source.hub, source.hub_config, split=source.split, streaming=streaming)
    files = source_files(source, data_dir)
    extension = Path(str(files[0]).removesuffix(".zst").removesuffix(".gz")).suffix
    if extension not in _BUILDERS:
        raise RecipeError(f"source {source.name}: {files[0].name} is none of {', '.join(_BUILDERS)} (.zst, .gz).")
    with reading(source):
        return load_dataset(
            _BUILDERS[extension],
            data_files=[str(f) for f in files],
            split="train",
            streaming=streaming,
            **_OPTIONS.get(extension, {}),
        )


def check_source(source: Source, data_dir: str, columns: Sequence[str]) -> IterableDataset:
    """Opens one source and looks at its files, its columns and, if these are text, its first rows.

    Args:
        source: What to look at.
        data_dir: Root of a relative `source.path`.
        columns: Those that are read, of text; `source.tokens` may hold anything.

    Returns:
        The data set, streamed, all its columns.

    Raises:
        RecipeError: See `open_source`, `check_files`, `check_columns` and `text_of`.
    """
    if source.path is not None:
        check_files(source, data_dir)
    stream = open_source(source, data_dir, streaming=True)
    check_columns(stream, source, columns)
    texts = [column for column in columns if column != source.tokens]
    for index, row in enumerate(islice(readable(source, stream.select_columns(texts)), _CHECKED_ROWS * bool(texts))):
        for column in texts:
            text_of(row[column], source, column, index)
    return stream


def source_files(source: Source, data_dir: str) -> list[Path]:
    """The local files of a source, in order: the one of that name, or those that match it as a pattern.

    Raises:
        RecipeError: There is none, or one is empty.
    """
    path = Path(source.path).expanduser()
    root = Path(path.anchor) if path.is_absolute() else Path(data_dir).expanduser()
    named, pattern = root / path, str(path.relative_to(path.anchor))
    files = [named] if named.is_file() else sorted(root.glob(pattern))
    if not files or not all(file.is_file() for file in files):
        raise RecipeError(f"source {source.name}: no file matches {named}.")
    for file in files:
        if file.stat().st_size == 0:
            raise RecipeError(f"source {source.name}: {file} is empty.")
    return files


def check_files(source: Source, data_dir: str):
    """Raises `RecipeError` for a .zst file that is none or was cut off, a parquet file that is none or has no rows.

    TRAP: zstandard's and fsspec's readers take a .zst file that was cut off for a shorter one; if the rest ends with a
    line, nothing else would notice.
    """
    for file in source_files(source, data_dir):
        problem = None
        with reading(source, str(file)):
            if file.suffix == ".zst":
                problem = _zstd_problem(file)
            elif file.suffix == ".parquet" and not pq.read_metadata(file).num_rows:
                problem = "it has no rows"
        if problem:
            raise RecipeError(f"source {source.name}: cannot be read: {file}: {problem}.")


def _zstd_problem(file: Path) -> str | None:
    """What is wrong with a file of zstd frames (RFC 8878), found by going from block to block; None is nothing."""
    cut = "it ends in the middle of a zstd frame"
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place, size = 0, len(content)
        while place < size:
            header = content[place : place + _ZSTD_HEADER]
            if place and len(header) < 4:
                return cut
            if header[1:4] == b"\x2a\x4d\x18" and header[0] >> 4 == 5:  # a skippable frame
                place += 8 + int.from_bytes(header[4:8], "little")
                continue
            if not zstandard.FRAME_HEADER.startswith(header[:4]):
                return f"no zstd frame at byte {place}"
            try:
                checksum = zstandard.get_frame_parameters(header).has_checksum
                place += zstandard.frame_header_size(header)
            except zstandard.ZstdError:  # too short
                return cut
            last = False
            while not last:
                if place + 3 > size:
                    return cut
                block = int.from_bytes(content[place : place + 3], "little")
                last, repeated = bool(block & 1), block >> 1 & 3 == 1
                place += 3 + (1 if repeated else block >> 3)
            place += 4 * checksum
    return None if place == size else cut


def check_columns(dataset: Dataset | IterableDataset, source: Source, columns: Sequence[str]):
    """Raises `RecipeError` if the data set has no rows or lacks one of the columns; reads one row."""
    first = next(readable(source, dataset), None)
    if first is None:
        raise RecipeError(f"source {source.name}: no rows in {_place(source)}.")
    for column in columns:
        if column not in first:
            raise RecipeError(f"source {source.name}: no column {column!r}; it has {', '.join(first)}.")


@contextmanager
def reading(source: Source, place: str | None = None) -> Iterator[None]:
    """Turns whatever goes wrong while a source is read into a `RecipeError` that names it.

    Args:
        source: What is read.
        place: The file, where it is known.
    """
    try:
        yield
    except Exception as error:  # zstandard, gzip, pyarrow, pandas, json, datasets and the Hub each have their own
        causes: list[BaseException] = [error]  # datasets wraps what went wrong
        while (cause := causes[-1].__cause__) is not None and not isinstance(causes[-1], RecipeError):
            causes.append(cause)
        if isinstance(causes[-1], RecipeError):
            raise causes[-1] from None
        reason = " ".join(f"{type(causes[-1]).__name__}: {causes[-1]}".split())
        raise RecipeError(
            f"source {source.name}: cannot be read: {place or _place(source)}: {reason[:300]}"
        ) from error


def _place(source: Source) -> str:
    return str(source.path or source.hub)


def readable(source: Source, rows: Iterable[T]) -> Iterator[T]:
    """The rows; what goes wrong while they are decoded is a `RecipeError` that names the source."""
    iterator = iter(rows)
    while True:
        with reading(source):
            try:
                row = next(iterator)
            except StopIteration:
                return
        yield row


def text_of(value: Any, source: Source, column: str, index: int) -> str:
    """A text without whitespace around it, "" for null.

    Raises:
        RecipeError: Something else than text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecipeError(
            f"source {source.name}: column {column!r} holds {type(value).__name__}, not text (row {index})."
        )
    return value.strip()
