"""An index of texts on disk: a folder with vectors for faiss, the texts, and the model that they are from.

    index.json          what the index is: model, hash of its weights, counts
    vectors.faiss       the vectors, of length 1, one after the other (exact search by inner product)
    documents.parquet   row i belongs to vector i: file, row, id, chunk, start, end, text, as far as there are such

Law: vectors of one model are compared with no other's: `check_model` refuses before a query is embedded. A folder
whose files do not belong together is refused when it is opened. COST: searching reads all vectors (1 GB for a million
of 256 dimensions); of the texts, only the row groups of the results.
"""

import bisect
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..requirements import require
from .vector_files import Layout, table_parts

DESCRIPTION, VECTORS, DOCUMENTS = "index.json", "vectors.faiss", "documents.parquet"
_FORM = 2  # in the first one a model was known by its weights and tokenizer.json


class SearchIndexError(ValueError):
    """An index that cannot be used; the message is one line that names it."""


@dataclass(frozen=True)
class Description:
    """What an index is.

    Attributes:
        model: Folder or Hub repository.
        model_sha256: Of its weights, tokenizer and configuration.
        dimensions: Of a vector.
        vectors: Number of vectors.
        truncate_dim: Dimensions that were kept, None for all.
        chunks: None for one vector a text, "sentences" or a number of tokens.
        form: Of the folder.
    """

    model: str
    model_sha256: str
    dimensions: int
    vectors: int
    truncate_dim: int | None = None
    chunks: str | int | None = None
    form: int = _FORM


@dataclass(frozen=True)
class Hit:
    """A result: its rank from 1, the cosine, and its row of `DOCUMENTS`."""

    rank: int
    score: float
    document: dict[str, Any]


def write_index(parts: Sequence[Path], folder: Path, layout: Layout, description: dict[str, Any]):
    """Writes an index from parquet files of embeddings.

    Args:
        parts: Files in order.
        folder: Folder to make.
        layout: Of the parts.
        description: The fields of `Description` but `dimensions` and `vectors`.

    Raises:
        SearchIndexError: There is no vector at all.
    """
    faiss = require("faiss", "cli")
    pa, pq = require("pyarrow", "cli"), require("pyarrow.parquet", "cli")
    index = faiss.IndexFlatIP(layout.dimensions)
    schema = pa.schema([field for field in layout.schema() if field.name != "embedding"])
    folder.mkdir()
    with pq.ParquetWriter(folder / DOCUMENTS, schema) as writer:
        for rows in table_parts(parts):
            index.add(np.ascontiguousarray(rows.vectors))
            writer.write_table(pa.table(rows.columns, schema=schema))
    if not index.ntotal:
        raise SearchIndexError("the input gives no vector to search in.")
    faiss.write_index(index, str(folder / VECTORS))
    whole = {**description, "dimensions": layout.dimensions, "vectors": index.ntotal, "form": _FORM}
    (folder / DESCRIPTION).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index and nothing else."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} == {DESCRIPTION, VECTORS, DOCUMENTS}


class SearchIndex:
    """An index that was written by `write_index`.

    Args:
        folder: Its folder.

    Attributes:
        description: What it is.

    Raises:
        SearchIndexError: It is none, or its files are damaged or do not belong together.
    """

    def __init__(self, folder: Path):
        faiss, pq = require("faiss", "cli"), require("pyarrow.parquet", "cli")
        self.folder = Path(folder)
        if not (self.folder / DESCRIPTION).is_file():
            raise SearchIndexError(
                f"{folder} is no index: it has no {DESCRIPTION} (jina-bert search build makes one)."
            )
        try:
            self.description = Description(**json.loads((self.folder / DESCRIPTION).read_text(encoding="utf-8")))
            self._index = faiss.read_index(str(self.folder / VECTORS))
            self._documents = pq.ParquetFile(self.folder / DOCUMENTS)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise SearchIndexError(f"{folder} is a damaged index: {' '.join(str(error).split())[:300]}") from None
        metadata = self._documents.metadata
        counts = {self.description.vectors, self._index.ntotal, metadata.num_rows}
        if len(counts) > 1 or self._index.d != self.description.dimensions:
            raise SearchIndexError(f"{folder} is a damaged index: its files are of different sizes; build it anew.")
        groups = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._group_ends = list(itertools.accumulate(groups))

    def check_model(self, name: str, sha256: str):
        """Refuses another model.

        Raises:
            SearchIndexError: The hash is not that of the index.
        """
        if sha256 != self.description.model_sha256:
            raise SearchIndexError(
                f"{self.folder} holds vectors of {self.description.model} (sha256 {self.description.model_sha256[:12]}"
                f"), {name} is another model ({sha256[:12]}): pass that one as --model, or build the index anew."
            )

    def search(self, queries: np.ndarray, top: int = 10) -> list[list[Hit]]:
        """The nearest texts, best first.

        Args:
            queries: `(queries, dimensions) float32`, of length 1.
            top: Results of a query; fewer where the index has fewer vectors.
        """
        scores, numbers = self._index.search(np.ascontiguousarray(queries), min(top, self.description.vectors))
        documents = self._read({int(number) for number in numbers.ravel()})
        return [
            [Hit(rank, float(score), documents[int(number)]) for rank, (score, number) in enumerate(pairs, 1)]
            for pairs in (zip(*of_query, strict=True) for of_query in zip(scores, numbers, strict=True))
        ]

    def _read(self, numbers: set[int]) -> dict[int, dict[str, Any]]:
        """Rows of `DOCUMENTS` by number, each row group that holds one of them read once."""
        found = {}
        by_group = itertools.groupby(sorted(numbers), lambda number: bisect.bisect_right(self._group_ends, number))
        for group, members in by_group:
            start = self._group_ends[group - 1] if group else 0
            table = self._documents.read_row_group(group)
            for number in members:
                found[number] = table.slice(number - start, 1).to_pylist()[0]
        return found
