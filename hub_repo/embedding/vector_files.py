"""Embeddings in files: .npy (vectors alone), .parquet and .jsonl (one row a vector, with its columns).

Law: a file joined from parts holds the rows of the parts in order, whatever their number, and depends on nothing else.
Numbers in JSON have the digits that give the same float back. COST: joining holds one part at a time.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..requirements import require

SUFFIXES = (".npy", ".parquet", ".jsonl")
DTYPES = ("float32", "float16")
_DIGITS = {"float32": "%.9g", "float16": "%.5g"}
"""Shortest formats from which every number of that type can be read back."""
COLUMNS = {
    "file": "string",
    "row": "int64",
    "id": "string",
    "chunk": "int64",
    "start": "int64",
    "end": "int64",
    "first_token": "int64",
    "end_token": "int64",
    "text": "string",
}
"""Columns beside `embedding`, and their types in parquet.

`file`, `row` and `id` are those of `text_input.Row`; `chunk` counts the chunks of a text from 0, `start` and `end` are
its characters [start, end) in the text, `first_token` and `end_token` its tokens [first, end) there, special ones
counted.
"""


class EmbeddingFileError(ValueError):
    """A file of embeddings that cannot be read or written; the message is one line that names it."""


@dataclass(frozen=True)
class Layout:
    """What a file of embeddings holds.

    Attributes:
        columns: Names of `COLUMNS`, in order.
        dimensions: Of a vector.
        dtype: Of its numbers, one of `DTYPES`.
    """

    columns: tuple[str, ...]
    dimensions: int
    dtype: str = "float32"

    def schema(self):
        """The schema of a parquet file."""
        pa = require("pyarrow", "cli")
        number = {"float32": pa.float32(), "float16": pa.float16()}[self.dtype]
        fields = [(name, getattr(pa, COLUMNS[name])()) for name in self.columns]
        return pa.schema([*fields, ("embedding", pa.list_(number, self.dimensions))])


@dataclass
class Embeddings:
    """Rows of a file.

    Attributes:
        vectors: `(rows, dimensions)`, float32 or float16.
        columns: Name -> value of each row.
    """

    vectors: np.ndarray
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.vectors)


def check_output(path: Path):
    """Refuses a name before anything is computed.

    Raises:
        EmbeddingFileError: The suffix is unknown, the folder does not exist, or it is a folder itself.
        ImportError: The package that writes the format is missing.
    """
    if path.suffix not in SUFFIXES:
        raise EmbeddingFileError(f"{path}: the name of an output ends with {', '.join(SUFFIXES)}.")
    if path.is_dir():
        raise EmbeddingFileError(f"{path} is a folder.")
    if not path.absolute().parent.is_dir():
        raise EmbeddingFileError(f"{path}: there is no folder {path.parent}.")
    if path.suffix == ".parquet":
        require("pyarrow.parquet", "cli")


def json_lines(embeddings: Embeddings, layout: Layout) -> Iterator[str]:
    """One JSON object a row, without the line feed.

    Example:
        >>> rows = Embeddings(np.array([[0.1, -2.0]], np.float32), {"row": [7]})
        >>> list(json_lines(rows, Layout(("row",), 2)))
        ['{"row": 7, "embedding": [0.100000001, -2]}']
    """
    numbers = ", ".join([_DIGITS[layout.dtype]] * layout.dimensions)
    for position, vector in enumerate(embeddings.vectors.tolist()):
        row = {name: embeddings.columns[name][position] for name in layout.columns}
        head = json.dumps(row, ensure_ascii=False)[:-1]
        yield f'{head}{", " if row else ""}"embedding": [{numbers % tuple(vector)}]}}'


def write_part(path: Path, embeddings: Embeddings, layout: Layout):
    """Writes rows in the format of the suffix."""
    if path.suffix == ".npy":
        np.save(path, embeddings.vectors)
    elif path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in json_lines(embeddings, layout))
    else:
        pq = require("pyarrow.parquet", "cli")
        pq.write_table(_table(embeddings, layout), path)


def join_parts(parts: Sequence[Path], output: Path, layout: Layout):
    """Joins files of one format and layout into one.

    Args:
        parts: Files in order; none gives a file without rows.
        output: The file to write.
        layout: Of the parts and of the output.
    """
    {".npy": _join_npy, ".parquet": _join_parquet, ".jsonl": _join_jsonl}[output.suffix](parts, output, layout)


def _join_npy(parts: Sequence[Path], output: Path, layout: Layout):
    rows = sum(len(np.load(part, mmap_mode="r")) for part in parts)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(layout.dtype)),
        "fortran_order": False,
        "shape": (rows, layout.dimensions),
    }
    with output.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(np.load(part)).data)


def _join_jsonl(parts: Sequence[Path], output: Path, layout: Layout):
    with output.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())


def _join_parquet(parts: Sequence[Path], output: Path, layout: Layout):
    """One row group a part."""
    pq = require("pyarrow.parquet", "cli")
    with pq.ParquetWriter(output, layout.schema()) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part, partitioning=None))


def _table(embeddings: Embeddings, layout: Layout):
    import pyarrow as pa

    schema = layout.schema()
    arrays = [pa.array(embeddings.columns[name], schema.field(name).type) for name in layout.columns]
    numbers = pa.array(embeddings.vectors.ravel())
    arrays.append(pa.FixedSizeListArray.from_arrays(numbers, type=schema.field("embedding").type))
    return pa.table(arrays, schema=schema)


def table_parts(parts: Sequence[Path]) -> Iterator[Embeddings]:
    """The rows of parquet files, one file after the other; vectors are float32."""
    pq = require("pyarrow.parquet", "cli")
    for part in parts:
        table = pq.read_table(part, partitioning=None)
        vectors = table.column("embedding").combine_chunks()
        flat = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        columns = {name: table.column(name).to_pylist() for name in table.schema.names if name != "embedding"}
        yield Embeddings(flat.reshape(len(table), vectors.type.list_size), columns)
