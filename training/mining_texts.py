"""The texts of a mining run on disk: queries, passages, and which passages are known positives of which query.

Laws: two texts that differ only in case or whitespace are one (JE1's normalisation), represented by the first that was
read; so a query's positives are known whichever source they come from, and no passage is there twice. Texts stay in
memory-mapped Arrow files.
COST: in memory about 100 bytes a row of the sources while they are numbered, 40 afterwards. Hashes have 64 bits: among
100 million different texts two share one with probability 3e-4, and would be taken for one.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .mining_recipe import MiningRecipe
from .recipe import RecipeError, Source
from .source_files import open_source, readable

_BATCH = 1000
"""Rows read at a time."""
_SCHEMA = pa.schema([("text", pa.string())])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or folder at; at the end it becomes `path`, which therefore is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    yield partial
    os.replace(partial, path)


def normalised(text: str) -> str:
    """Lower case, single spaces: what decides whether two texts are one.

    >>> normalised(" A  Tale\\n of two ")
    'a tale of two'
    """
    return " ".join(text.split()).lower()


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """`(texts,) uint64`: the first 8 bytes of BLAKE2b of each text."""
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), dtype=np.uint64)


class Texts:
    """Texts in a data set's column "text", in memory or memory-mapped."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        return cls(Dataset.from_dict({"text": list(texts)}))

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, ids: np.ndarray) -> list[str]:
        """The texts of these numbers, in this order."""
        return self._dataset[np.asarray(ids).tolist()]["text"] if len(ids) else []

    def select(self, ids: np.ndarray) -> "Texts":
        """The texts of these numbers, numbered anew."""
        return Texts(self._dataset.select(ids))

    def batches(self, size: int = _BATCH) -> Iterator[list[str]]:
        """All texts in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self._dataset[start : start + size]["text"]

    def hashes(self) -> np.ndarray:
        """`(texts,) uint64` of the texts as they are."""
        return np.concatenate([np.empty(0, np.uint64), *map(text_hashes, self.batches())])


@dataclass
class Collection:
    """Rows (pairs) of all sources, in order of the recipe, as numbers of queries and passages.

    Attributes:
        queries: Different queries.
        passages: Different passages: the positives of all sources, then the corpus.
        query: `(rows,) int64`.
        positive: `(rows,) int64`, numbers of passages.
        source_starts: `(sources + 1,) int64`: source s has the rows from `source_starts[s]` on.
        same_text: `(queries,) int64`, the passage with the text of the query, -1 where there is none.
        counts: By source, rows `read`, and of them `empty`, `identical` (query and positive) or `repeated`, which were
            left out.
        further_query: `(further,) int64`, queries of pairs that are no rows, beyond `max_rows` of local files.
        further_positive: `(further,) int64`, their positives.
    """

    queries: Texts
    passages: Texts
    query: np.ndarray
    positive: np.ndarray
    source_starts: np.ndarray
    same_text: np.ndarray
    counts: list[dict[str, int]]
    further_query: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    further_positive: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self):
        query = np.append(self.query, self.further_query)
        order = np.argsort(query, kind="stable")
        self._by_query = np.append(self.positive, self.further_positive)[order]
        self._starts = np.searchsorted(query[order], np.arange(len(self.queries) + 1))

    def known(self, query: int) -> np.ndarray:
        """Passages that are positives of a query in any source."""
        return self._by_query[self._starts[query] : self._starts[query + 1]]

    @property
    def most_known(self) -> int:
        """The most positives that a query has."""
        return int(np.diff(self._starts).max())


class _Column:
    """Texts that are written to an Arrow file one batch after the other; keeps hashes of their normal form."""

    def __init__(self, path: Path):
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, _SCHEMA)
        self._hashes = [np.empty(0, np.uint64)]

    def add(self, texts: list[str]):
        if texts:
            self._stream.write_batch(pa.record_batch([pa.array(texts, pa.string())], schema=_SCHEMA))
            self._hashes.append(text_hashes(map(normalised, texts)))

    def close(self) -> np.ndarray:
        self._stream.close()
        self._sink.close()
        return np.concatenate(self._hashes)


def collect(recipe: MiningRecipe, folder: Path) -> Collection:
    """Reads the sources into a folder, or opens it if an earlier run has.

    Raises:
        RecipeError: A source that cannot be read, holds something else than text, or has no pair.
    """
    if not folder.is_dir():
        with replacing(folder) as partial:
            partial.mkdir()
            _read_sources(recipe, partial)
    with np.load(folder / "numbers.npz") as stored:
        numbers = dict(stored)
    columns = {
        name: Texts(Dataset.from_file(str(folder / f"{name}.arrow")).select(numbers.pop(f"{name}_rows")))
        for name in ("queries", "passages")
    }
    names = ("read", "empty", "identical", "repeated")
    counts = [dict(zip(names, row.tolist(), strict=True)) for row in numbers.pop("counts")]
    return Collection(**columns, **numbers, counts=counts)


def _read_sources(recipe: MiningRecipe, folder: Path):
    queries, passages = _Column(folder / "queries.arrow"), _Column(folder / "passages.arrow")
    counts, sizes = [], []
    further = [[np.empty(0, np.uint64)], [np.empty(0, np.uint64)]]
    for source in recipe.sources:
        counted: Counter = Counter()
        columns = [source.anchor, source.positive]
        # What is beyond `max_rows` is read for the positives that a query has there, but not fetched from the Hub.
        for batch in _batches(source, recipe.data_dir, columns, None if source.path else recipe.max_rows):
            room = None if recipe.max_rows is None else max(0, recipe.max_rows - counted["read"])
            pairs = list(_pairs(*(batch[column][:room] for column in columns), counted))
            queries.add([query for query, _ in pairs])
            passages.add([positive for _, positive in pairs])
            if room is not None:
                others = list(_pairs(*(batch[column][room:] for column in columns), Counter()))
                for hashes, texts in zip(further, zip(*others, strict=True), strict=False):
                    hashes.append(text_hashes(map(normalised, texts)))
        if not counted["kept"]:
            raise RecipeError(f"source {source.name}: all pairs are empty or have anchor == positive.")
        counts.append([counted["read"], counted["empty"], counted["identical"], 0])
        sizes.append(counted["kept"])
    if recipe.corpus:
        for batch in _batches(recipe.corpus, recipe.data_dir, [recipe.corpus.text], None):
            passages.add([text for text in batch[recipe.corpus.text] if text and text.strip()])
    numbers = _numbers(queries.close(), passages.close(), sizes, *map(np.concatenate, further))
    for row, size, start, stop in zip(counts, sizes, numbers["source_starts"], numbers["source_starts"][1:],
                                      strict=False):  # fmt: skip
        row[3] = size - int(stop - start)
    np.savez(folder / "numbers.npz", **numbers, counts=np.array(counts))


def _batches(source: Source, data_dir: str, columns: list[str], limit: int | None) -> Iterator[dict[str, list]]:
    """Columns of a source, some rows at a time; every value is a text or None."""
    rows = open_source(source, data_dir, streaming=True).select_columns(columns)
    rows = rows if limit is None else rows.take(limit)
    for batch in readable(source, rows.iter(batch_size=_BATCH)):
        for column in columns:
            for value in batch[column]:
                if value is not None and not isinstance(value, str):
                    raise RecipeError(
                        f"source {source.name}: column {column!r} holds {type(value).__name__}, not text."
                    )
        yield batch


def _pairs(queries: list, positives: list, counted: Counter) -> Iterator[tuple[str, str]]:
    for query, positive in zip(queries, positives, strict=True):
        counted["read"] += 1
        if not query or not positive or not query.strip() or not positive.strip():
            counted["empty"] += 1
        elif normalised(query) == normalised(positive):
            counted["identical"] += 1
        else:
            counted["kept"] += 1
            yield query, positive


def _numbers(
    queries: np.ndarray,
    passages: np.ndarray,
    sizes: list[int],
    further_queries: np.ndarray,
    further_positives: np.ndarray,
) -> dict[str, Any]:
    """Numbers of queries and passages, from the hashes of all rows; repeated pairs are left out."""
    query_rows, query = first_occurrences(queries)
    passage_rows, passage = first_occurrences(passages)
    positive = passage[: len(query)]
    kept, _ = first_occurrences(query * len(passage_rows) + positive)
    source = np.repeat(np.arange(len(sizes)), sizes)[kept]
    further_query = lookup(queries[query_rows], further_queries)
    further_positive = lookup(passages[passage_rows], further_positives)
    both = (further_query >= 0) & (further_positive >= 0)
    return {
        "queries_rows": query_rows,
        "passages_rows": passage_rows,
        "query": query[kept],
        "positive": positive[kept],
        "source_starts": np.searchsorted(source, np.arange(len(sizes) + 1)),
        "same_text": lookup(passages[passage_rows], queries[query_rows]),
        "further_query": further_query[both],
        "further_positive": further_positive[both],
    }


def first_occurrences(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each different value stands first, ascending, and for each value which of these it equals.

    >>> first_occurrences(np.array([7, 3, 7, 5]))
    (array([0, 1, 3]), array([0, 1, 0, 2]))
    """
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def lookup(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted value the index where `values` has it, -1 where it has not.

    >>> lookup(np.array([7, 3, 5]), np.array([5, 6, 7]))
    array([ 2, -1,  0])
    """
    if not len(values):
        return np.full(len(wanted), -1)
    order = np.argsort(values, kind="stable")
    place = order[np.minimum(np.searchsorted(values, wanted, sorter=order), len(values) - 1)]
    return np.where(values[place] == wanted, place, -1)
