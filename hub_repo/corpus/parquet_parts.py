"""A corpus of parquet files is cut into parts; the part of the output is a parquet file, whole or not there.

Laws:
1. The cut depends on the footers of the files and on `part_rows` alone, so every run of a job has the same parts.
2. A part's file says in its own footer which job it is of, which rows it was made from, and a digest of their stored
   bytes. A part is done when that is what would be computed now; a file that was cut off or is of another job is not.
3. A part is written under a hidden name of its own and renamed. Whatever a killed process leaves has no part's name,
   and two processes that write one part write the same rows.

Files lie where `pyarrow.fs` reaches: paths, file://, s3://, gs://, abfss://, hdfs://, hf://, fsspec+NAME://.
COST: a worker reads each row group twice, once for the digest and once for the rows; it holds one part.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ..embedding.text_input import InputError, Row

EMBEDDING = "embedding"
PART_ROWS = 8192
_KEY = b"jina_bert.part"
_BLOCK = 2**22  # bytes hashed at a time
_READERS = 16  # threads that wait for footers


@dataclass(frozen=True)
class Source:
    """A parquet file of the corpus.

    Attributes:
        filesystem: Where it lies.
        path: Its path there.
        size: In bytes.
        groups: Rows of each row group.
        schema: Of its columns.
    """

    filesystem: pafs.FileSystem
    path: str
    size: int
    groups: tuple[int, ...]
    schema: pa.Schema


@dataclass(frozen=True)
class Part:
    """Rows [first, first + rows) of a row group.

    Attributes:
        number: Of the part, from 0.
        source: Number of its file.
        row_group: Of the file.
        first: In the row group.
        rows: How many; at least 1.
        file_row: The first one in the file.
    """

    number: int
    source: int
    row_group: int
    first: int
    rows: int
    file_row: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"part-{self.number:06d}.parquet"


@dataclass(frozen=True)
class Made:
    """What the file of a part says of itself: its job and rows, and what was met in their texts.

    Attributes:
        job: Fingerprint of the job.
        part: The part, as a dictionary.
        digest: Of the stored bytes of its row group.
        cut_texts: Texts that were truncated, and `cut_tokens` their tokens that are not embedded.
        cut_tokens: See there.
        lenient_texts: Texts that were null or no UTF-8, and taken leniently.
    """

    job: str
    part: dict[str, int]
    digest: str
    cut_texts: int = 0
    cut_tokens: int = 0
    lenient_texts: int = 0


def locate(name: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a path or URI.

    Raises:
        InputError: A scheme that pyarrow does not know or whose package is missing.
    """
    if "://" not in name:
        return pafs.LocalFileSystem(), str(Path(name).absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(name)
    except (pa.ArrowException, ImportError, ValueError, OSError) as error:
        raise InputError(f"{name} cannot be reached: {one_line(error)}.") from None
    return filesystem, path.rstrip("/")


def find_sources(names: Sequence[str], output: str) -> list[Source]:
    """The files of a corpus: those that are named, and all `*.parquet` below the folders that are, sorted by path.

    Names that begin with "." or "_" are left out below a folder, as everywhere in this format.

    Args:
        names: Paths or URIs of files and folders.
        output: Path or URI of the output, which no folder may hold.

    Raises:
        InputError: One that is missing, twice there, no parquet or in the output; a folder without parquet files or
            with the output; files of different columns.
    """
    target, target_path = locate(output)
    found: list[tuple[pafs.FileSystem, str, int]] = []
    for name in names:
        filesystem, path = locate(name)
        info = _info(filesystem, path, name)
        if info.type == pafs.FileType.File:
            if filesystem == target and path.rpartition("/")[0] == target_path:
                raise InputError(f"{name} lies in the output {output}: its parts would stand beside it.")
            found.append((filesystem, path, info.size))
            continue
        if filesystem == target and f"{target_path}/".startswith(f"{path}/"):
            raise InputError(f"{output} lies in {name}: its parts would be input of the next run.")
        files = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        seen = sorted((x.path, x.size) for x in files if x.is_file and _is_data(x.path.removeprefix(path)))
        if not seen:
            raise InputError(f"{name}: no file named *.parquet in this folder.")
        found += [(filesystem, *file) for file in seen]
    seen_before: set[tuple[str, str]] = set()
    for filesystem, path, _ in found:
        if (filesystem.type_name, path) in seen_before:
            raise InputError(f"{path} is there twice.")
        seen_before.add((filesystem.type_name, path))
    with ThreadPoolExecutor(_READERS) as pool:
        sources = list(pool.map(lambda file: _source(*file), found))
    for source in sources[1:]:
        if not source.schema.equals(sources[0].schema):
            raise InputError(f"{source.path} has other columns or types than {sources[0].path}.")
    return sources


def _info(filesystem: pafs.FileSystem, path: str, name: str) -> pafs.FileInfo:
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"{name} cannot be reached: {one_line(error)}.") from None
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{name}: there is no such file or folder.")
    return info


def _is_data(path: str) -> bool:
    return path.endswith(".parquet") and not any(part.startswith((".", "_")) for part in path.split("/"))


def _source(filesystem: pafs.FileSystem, path: str, size: int) -> Source:
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            metadata = file.metadata
            groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            return Source(filesystem, path, size, groups, file.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no parquet file: {one_line(error)}.") from None


def check_columns(source: Source, column: str, id_column: str | None):
    """Refuses a corpus without the columns, or with one that an output could not hold.

    Raises:
        InputError: See above.
    """
    names = source.schema.names
    for name in filter(None, (column, id_column)):
        if name not in names:
            raise InputError(f"{source.path}: no column {name!r}; it has {', '.join(names[:20]) or 'none'}.")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{source.path}: column {name!r} is there {names.count(name)} times.")
    if EMBEDDING in names:
        raise InputError(f"{source.path} has a column {EMBEDDING!r} already.")
    kind = source.schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise InputError(f"{source.path}: column {column!r} is of type {kind}, not text.")


def cut(groups: Iterable[Sequence[int]], part_rows: int) -> list[Part]:
    """The parts of files; none crosses a row group.

    Args:
        groups: Rows of each row group of each file.
        part_rows: Rows of a part at most.

    Example:
        >>> [(p.source, p.row_group, p.first, p.rows, p.file_row) for p in cut([[5, 0, 2], [3]], 3)]
        [(0, 0, 0, 3, 0), (0, 0, 3, 2, 3), (0, 2, 0, 2, 5), (1, 0, 0, 3, 0)]
    """
    parts: list[Part] = []
    for source, rows_of_groups in enumerate(groups):
        before = 0
        for group, rows in enumerate(rows_of_groups):
            for first in range(0, rows, part_rows):
                size = min(part_rows, rows - first)
                parts.append(Part(len(parts), source, group, first, size, before + first))
            before += rows
    return parts


class PartReader:
    """Reads parts; parts of a row group in order cost one pass over it.

    Args:
        sources: Files of the corpus.
    """

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._open: tuple[int, int] | None = None

    def digest(self, part: Part) -> str:
        """Of the stored bytes of the part's row group, whatever its columns hold."""
        self._enter(part)
        return self._digest

    def rows(self, part: Part) -> pa.Table:
        """All columns of the part's rows.

        Raises:
            InputError: The file is damaged, or changes while it is read.
        """
        if self._enter(part) > part.first:
            self._open = None
            self._enter(part)
        try:
            for _ in self._take(part.first - self._position):
                pass
            batches = list(self._take(part.rows))
        except (pa.ArrowException, OSError) as error:
            self._open = None
            path = self._sources[part.source].path
            raise InputError(f"{path}, row group {part.row_group}: {one_line(error)}.") from None
        return pa.Table.from_batches(batches, self._sources[part.source].schema).unify_dictionaries()

    def _enter(self, part: Part) -> int:
        """Opens the row group unless it is open; returns the next row that would be read."""
        if self._open != (part.source, part.row_group):
            source = self._sources[part.source]
            try:
                self._file = pq.ParquetFile(source.path, filesystem=source.filesystem)
                self._digest = _digest(source, self._file.metadata.row_group(part.row_group))
            except (pa.ArrowException, OSError, IndexError) as error:
                raise InputError(f"{source.path} cannot be read: {one_line(error)}.") from None
            self._batches = self._file.iter_batches(part.rows, row_groups=[part.row_group])
            self._rest, self._position = None, 0
            self._open = (part.source, part.row_group)
        return self._position

    def _take(self, rows: int) -> Iterator[pa.RecordBatch]:
        while rows:
            if self._rest is None or not len(self._rest):
                self._rest = next(self._batches, None)
                if self._rest is None:
                    raise OSError("it ends before its number of rows")
            piece = self._rest.slice(0, rows)
            self._rest = self._rest.slice(len(piece))
            self._position += len(piece)
            rows -= len(piece)
            yield piece


def _digest(source: Source, group: pq.RowGroupMetaData) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    with source.filesystem.open_input_file(source.path) as file:
        for index in range(group.num_columns):
            chunk = group.column(index)
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
                start = chunk.dictionary_page_offset
            file.seek(start)
            left = chunk.total_compressed_size
            while left and (block := file.read(min(left, _BLOCK))):
                hasher.update(block)
                left -= len(block)
    return hasher.hexdigest()


def texts(table: pa.Table, column: str, *, part: Part, path: str, lenient: bool) -> tuple[list[Row], int]:
    """The texts of a part, by the rules of `text_input`: nothing is left out or changed in silence.

    Args:
        table: Rows of the part.
        column: That of the texts.
        part: For the rows' numbers.
        path: Of the file.
        lenient: Take null as the empty text and bytes that are not UTF-8 as U+FFFD.

    Returns:
        The texts, and how many of them were taken leniently.

    Raises:
        InputError: A text that is null or not UTF-8; with its row.
    """
    values = table.column(column)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    rows, lenient_texts = [], 0
    # As bytes: pyarrow does not check UTF-8, and says neither the row nor the byte when it meets it.
    for number, value in enumerate(values.cast(pa.large_binary()).to_pylist(), part.file_row):
        try:
            text = (b"" if value is None else value).decode(errors="strict")
            problem = "null; --lenient takes it as the empty text" if value is None else ""
        except UnicodeDecodeError as error:
            text = value.decode(errors="replace")
            problem = f"not UTF-8 at byte {error.start}; --lenient takes it as U+FFFD"
        if problem and not lenient:
            raise InputError(f"{path}, row {number}: {column!r} is {problem}.")
        lenient_texts += bool(problem)
        rows.append(Row(text, path, number))
    return rows, lenient_texts


def write_part(filesystem: pafs.FileSystem, folder: str, *, part: Part, table: pa.Table, made: Made):
    """Writes the file of a part, whole or not at all.

    Args:
        filesystem: Of the output.
        folder: Of the output.
        part: Which.
        table: Its rows.
        made: What its footer says.
    """
    metadata = {**(table.schema.metadata or {}), _KEY: json.dumps(asdict(made)).encode()}
    unfinished = f"{folder}/.{part.name}.{uuid.uuid4().hex}"
    pq.write_table(table.replace_schema_metadata(metadata), unfinished, filesystem=filesystem)
    filesystem.move(unfinished, f"{folder}/{part.name}")


def read_made(filesystem: pafs.FileSystem, path: str) -> Made | None:
    """What a part's file says of itself; None if there is none, or it is not whole or not of this form."""
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            made = Made(**json.loads((file.schema_arrow.metadata or {})[_KEY]))
            return made if file.metadata.num_rows == made.part["rows"] else None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None


def read_all_made(filesystem: pafs.FileSystem, paths: Sequence[str]) -> list[Made | None]:
    """`read_made` of many files."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda path: read_made(filesystem, path), paths))


def doubled_value(files: Iterable[tuple[pafs.FileSystem, str]], column: str) -> tuple[Any, int] | None:
    """A value that a column holds more than once, and how often; None if all are distinct.

    COST: the whole column in memory.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        chunks = [chunk for values in pool.map(lambda file: _column(*file, column), files) for chunk in values.chunks]
    if not chunks:
        return None
    counts = pc.value_counts(pa.chunked_array(chunks))
    doubled = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    return (doubled[0]["values"].as_py(), doubled[0]["counts"].as_py()) if len(doubled) else None


def _column(filesystem: pafs.FileSystem, path: str, name: str) -> pa.ChunkedArray:
    """Without the encoding as dictionary: the dictionaries of two files differ."""
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        values = file.read([name]).column(name)
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
