"""Texts from arguments, lines, whole files, JSON lines, and columns of CSV and parquet files, one at a time.

Law: every text that an input holds comes out once, in order and unchanged, or an `InputError` names the file, the
place in it and the value. `lenient` takes two things that are no text for the nearest text: bytes that are not UTF-8
as U+FFFD, and null as the empty text; it counts them. Held at a time: one line (of parquet, `_PARQUET_ROWS` rows).
"""

import csv
import gzip
import io
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..requirements import require
from .zstd_reader import ZstdReader

STDIN = "-"
FORMATS = ("text", "jsonl", "csv", "tsv", "parquet")
_WITH_LISTS = ("jsonl", "parquet")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst")
_PARQUET_ROWS = 1024
_COLUMN = "text"
_BOM = b"\xef\xbb\xbf"


Spans = tuple[tuple[int, int], ...]


class InputError(ValueError):
    """An input that cannot be read; the message is one line that names the file and the place."""


@dataclass(frozen=True)
class Row:
    """A text and where it came from.

    Attributes:
        text: The text.
        file: The file as it was named, "-" for the standard input, None for an argument.
        row: Number of the text in its file (among the arguments), from 0.
        id: What the column of identifiers says; None without one.
        spans: Characters (start, end) of the text, what the column of spans says; None without one.
    """

    text: str
    file: str | None
    row: int
    id: str | None = None
    spans: Spans | None = None

    def __str__(self) -> str:
        return f"{'the arguments' if self.file is None else self.file}, text {self.row}"


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        format: One of `FORMATS`; None goes by the name of each file: `.jsonl`, `.ndjson`, `.csv`, `.tsv`, `.parquet`
            (the text ones also with `.gz` or `.zst`), everything else is "text".
        column: Field or column that holds the texts.
        id_column: Field or column of identifiers, strings or integers; None for none.
        whole: A "text" file is one text; else each of its lines is one.
        lenient: See the law of this file.
        spans_column: Field or column of lists of [start, end], characters of the text; None for none.
    """

    format: str | None = None
    column: str = _COLUMN
    id_column: str | None = None
    whole: bool = False
    lenient: bool = False
    spans_column: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once."""
        return [x for x in dict.fromkeys((self.column, self.id_column, self.spans_column)) if x is not None]

    def format_of(self, file: str) -> str:
        """The format of a file.

        Raises:
            InputError: It is named as JSON, which may be one document of any form.
        """
        if self.format is not None:
            return self.format
        name = Path(file).name.lower()
        for compressed in _COMPRESSED:
            name = name.removesuffix(compressed)
        suffix = Path(name).suffix
        if suffix == ".json":
            raise InputError(f"{file}: .json may mean anything; give --format jsonl if each line is an object.")
        return _SUFFIXES.get(suffix, "text")


class TextInput:
    """The texts of arguments and then of files, in that order; iterate over it once.

    Args:
        files: Paths, or "-" for the standard input.
        texts: Texts themselves.
        reading: How the files are read.

    Attributes:
        lenient_count: Texts that were not taken as they are, so far.

    Raises:
        InputError: A file that does not exist or is a folder, twice the standard input, or a file without the column
            (of CSV and parquet files, which name their columns at the start).
    """

    def __init__(self, files: Sequence[str], texts: Sequence[str] = (), reading: Reading | None = None):
        self.files, self.texts, self.reading = list(files), list(texts), reading or Reading()
        self.lenient_count = 0
        self._bytes_before = 0
        self._position: Callable[[], int] = lambda: 0
        if self.files.count(STDIN) > 1:
            raise InputError("the standard input (-) can be read only once.")
        for file in self.files:
            self._check(file)
        sizes = [_size(file) for file in self.files]
        self.total_bytes: int | None = None if None in sizes else sum(size or 0 for size in sizes)
        """Of all files as they are stored; None with a pipe, such as the standard input."""

    @property
    def bytes_read(self) -> int:
        """Of `total_bytes`; those of a parquet file count when it is finished."""
        return self._bytes_before + self._position()

    def __iter__(self) -> Iterator[Row]:
        for number, text in enumerate(self.texts):
            yield Row(self._text(text, f"text {number} of the arguments"), None, number)
        for file in self.files:
            name = os.fsencode(file).decode(errors="replace")  # a name need not be UTF-8, an output must
            for number, (text, id_, spans) in enumerate(self._read(file)):
                yield Row(text, name, number, id_, spans)
            self._position = lambda: 0
            self._bytes_before += _size(file) or 0

    def _check(self, file: str):
        format_ = self.reading.format_of(file)
        named = [x for x in (self.reading.id_column, self.reading.column) if x not in (None, _COLUMN)]
        if format_ == "text" and named:
            raise InputError(
                f"{file} is read as text, without columns: no {named[0]!r}; give --format jsonl, csv, tsv."
            )
        if self.reading.spans_column is not None and format_ not in _WITH_LISTS:
            raise InputError(f"{file} is read as {format_}, which has no lists of spans: give JSONL or parquet.")
        if file == STDIN:
            if format_ == "parquet":
                raise InputError("parquet cannot be read from the standard input: give the file.")
            return
        if Path(file).is_dir():
            raise InputError(f"{file} is a folder, not a file: give its files.")
        if not Path(file).exists():
            raise InputError(f"{file}: there is no such file.")
        if format_ == "parquet":
            self._parquet(file)
        elif format_ in ("csv", "tsv") and Path(file).is_file():  # not of a pipe: it can be read once
            with self._open(file) as stream:
                self._csv_columns(file, next(self._csv_reader(file, stream), None))

    def _read(self, file: str) -> Iterator[tuple[str, str | None, Spans | None]]:
        """Text, identifier and spans of each row."""
        format_ = self.reading.format_of(file)
        if format_ == "parquet":
            yield from self._read_parquet(file)
            return
        with self._open(file) as stream:
            if format_ == "jsonl":
                yield from self._read_jsonl(file, stream)
            elif format_ in ("csv", "tsv"):
                yield from self._read_csv(file, stream)
            elif self.reading.whole:
                yield self._decode(stream.read().removeprefix(_BOM), file), None, None
            else:
                for _, line in self._lines(file, stream):
                    yield line.removesuffix("\r\n" if line.endswith("\r\n") else "\n"), None, None

    def _read_jsonl(self, file: str, stream: BinaryIO) -> Iterator[tuple[str, str | None, Spans | None]]:
        for where, line in self._lines(file, stream):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: no JSON: {error}.") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: {_shown(row)} is no JSON object.")
            for name in self.reading.columns:
                if name not in row:
                    raise InputError(f"{where}: no field {name!r}; it has {_names(row)}.")
            text = self._text(row[self.reading.column], where, self.reading.column)
            yield text, self._id(row, self.reading.id_column, where), self._spans(row, text, where)

    def _read_csv(self, file: str, stream: BinaryIO) -> Iterator[tuple[str, str | None, None]]:
        reader = self._csv_reader(file, stream)
        columns = self._csv_columns(file, next(reader, None))
        text_at = columns.index(self.reading.column)
        id_at = None if self.reading.id_column is None else columns.index(self.reading.id_column)
        for where, values in reader:
            if len(values) != len(columns):
                raise InputError(f"{where}: {len(values)} fields, the header has {len(columns)}.")
            if self.reading.format_of(file) == "tsv" and any("\n" in value and "\t" in value for value in values):
                # Many TSV files are written without quotes; one that begins a text would swallow the rows after it.
                raise InputError(f"{where}: line breaks and tabs within quotes may be rows of their own: give JSONL.")
            yield values[text_at], None if id_at is None else values[id_at], None

    def _csv_reader(self, file: str, stream: BinaryIO) -> Iterator[tuple[str, list[str]]]:
        """Place and fields of each record; empty lines are none."""
        csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long document
        lines = (line for _, line in self._lines(file, stream))
        reader = csv.reader(lines, strict=True, delimiter="\t" if self.reading.format_of(file) == "tsv" else ",")
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(f"{file}, line {reader.line_num}: no CSV: {error}.") from None
            if record:
                yield f"{file}, line {reader.line_num}", record

    def _csv_columns(self, file: str, header: tuple[str, list[str]] | None) -> list[str]:
        columns = header[1] if header else []
        self._check_columns(file, columns)
        return columns

    def _read_parquet(self, file: str) -> Iterator[tuple[str, str | None, Spans | None]]:
        import pyarrow as pa

        parquet, reading, names = self._parquet(file), self.reading, self.reading.columns
        number = 0
        try:
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=names):
                columns = {name: _plain(batch.column(batch.schema.get_field_index(name))) for name in names}
                # As bytes: pyarrow does not check UTF-8, and says neither the row nor the byte when it meets it.
                texts = columns[names[0]].cast(pa.large_binary()).to_pylist()
                others = {name: columns[name].to_pylist() for name in names if name != reading.column}
                for place, text in enumerate(texts):
                    where = f"{file}, row {number}"
                    text = self._text(text if text is None else self._decode(text, where), where, names[0])
                    row = {names[0]: text, **{name: values[place] for name, values in others.items()}}
                    yield text, self._id(row, reading.id_column, where), self._spans(row, text, where)
                    number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}, after row {number}: {_one_line(error)}.") from None

    def _parquet(self, file: str):
        """The open file; columns of the wrong type are an error before any row is read."""
        pq = require("pyarrow.parquet", "cli")
        import pyarrow as pa

        try:
            parquet = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file} is no parquet file: {_one_line(error)}.") from None
        schema, reading = parquet.schema_arrow, self.reading
        self._check_columns(file, schema.names)
        found = schema.field(reading.column).type
        kind = found.value_type if pa.types.is_dictionary(found) else found
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise InputError(f"{file}: column {reading.column!r} is of type {found}, not text.")
        return parquet

    def _check_columns(self, file: str, columns: Sequence[str]):
        for name in self.reading.columns:
            if name not in columns:
                raise InputError(f"{file}: no column {name!r}; it has {_names(columns)}.")
            if list(columns).count(name) > 1:
                raise InputError(f"{file}: column {name!r} is there {list(columns).count(name)} times.")

    def _lines(self, file: str, stream: BinaryIO) -> Iterator[tuple[str, str]]:
        """Place and content of each line. Only a line feed ends one: U+2028 and the like may lie within a text."""
        for number, line in enumerate(stream, 1):
            where = f"{file}, line {number}"
            if number == 1 and not (line := line.removeprefix(_BOM)):
                return  # a byte order mark and nothing more
            yield where, self._decode(line, where)

    def _decode(self, data: bytes, where: str) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            if self.reading.lenient:
                self.lenient_count += 1
                return data.decode(errors="replace")
            byte = f"byte {data[error.start]:#04x} at position {error.start}"
            raise InputError(f"{where}: not UTF-8: {byte}; --lenient takes it as U+FFFD.") from None

    def _text(self, value: Any, where: str, column: str | None = None) -> str:
        if column is not None:
            where = f"{where}: {column!r}"
        if value is None or (isinstance(value, float) and math.isnan(value)):
            if self.reading.lenient:
                self.lenient_count += 1
                return ""
            raise InputError(f"{where} is {'null' if value is None else 'NaN'}; --lenient takes it as the empty text.")
        if not isinstance(value, str):
            raise InputError(f"{where} is {_shown(value)}, not a text.")
        if value.isascii():
            return value
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a pair, as JSON and arguments can hold
            return self._decode(value.encode(errors="surrogatepass"), where)
        return value

    def _id(self, row: dict, column: str | None, where: str) -> str | None:
        if column is None:
            return None
        if isinstance(row[column], bool) or not isinstance(row[column], str | int):
            raise InputError(f"{where}: {column!r} is {_shown(row[column])}, neither a text nor an integer.")
        return self._text(str(row[column]), where, column)

    def _spans(self, row: dict, text: str, where: str) -> Spans | None:
        column = self.reading.spans_column
        if column is None:
            return None
        if not isinstance(row[column], list):
            raise InputError(f"{where}: {column!r} is {_shown(row[column])}, not a list of [start, end].")
        for number, span in enumerate(row[column]):
            if not (isinstance(span, list) and [type(place) for place in span] == [int, int]):
                raise InputError(f"{where}: {column}[{number}] is {_shown(span)}, not [start, end], characters.")
            if not 0 <= span[0] < span[1] <= len(text):
                found = f"{column}[{number}] is {span}, not 0 <= start < end <= {len(text)}"
                raise InputError(f"{where}: {found}, the characters of the text.")
        return tuple((start, end) for start, end in row[column])

    @contextmanager
    def _open(self, file: str) -> Iterator[BinaryIO]:
        """The decompressed bytes; what goes wrong with them is an InputError."""
        try:
            if file == STDIN:
                yield sys.stdin.buffer
                return
            with open(file, "rb") as raw:
                if raw.seekable():  # a pipe has no place
                    self._position = raw.tell
                if file.lower().endswith(".zst"):
                    yield io.BufferedReader(ZstdReader(raw), 2**16)
                elif file.lower().endswith(".gz"):
                    yield gzip.open(raw)
                else:
                    yield raw
                self._position = lambda: 0
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"{file} cannot be read: {_one_line(error)}.") from None


def _size(file: str) -> int | None:
    """In bytes; None for a pipe."""
    return Path(file).stat().st_size if file != STDIN and Path(file).is_file() else None


def _plain(column):
    """A column of pyarrow without the encoding as dictionary."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _names(columns: Iterable[str]) -> str:
    return ", ".join(map(str, list(columns)[:20])) or "none"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:40] + '...'} ({type(value).__name__})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
