"""Ranking of all passages for all queries, block by block: faiss over shards of vectors, or BM25.

Laws: an exact search is exact however it is cut into blocks; every block of queries that was searched lies on disk,
and a run that is killed goes on after it.
COST: a dense search holds `memory_mb` MiB of arrays, whatever the number of passages, and reads all vectors once for
each block of queries. BM25 (bm25s) has no blocks: while it builds its index it holds all passages and their words,
about 40 bytes a word (more than `memory_mb` is refused), afterwards 8 bytes for each different word of a passage; a
run that goes on builds it again.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from .embedding_shards import Vectors
from .mining_recipe import Retriever
from .mining_texts import Texts, replacing
from .recipe import RecipeError

logger = logging.getLogger(__name__)

_WORKSPACE = 64 * 2**20  # bytes faiss takes for products of 4096 queries and 1024 passages, and for its reservoirs
_LEAST_BLOCK = 1024  # passages; below that the merging costs more than the search
_TRAINING_VECTORS = 64  # of each list of IVF
_BYTES_A_WORD = 40  # of the passages while BM25 builds its index
_COUNTED = 10_000  # passages whose words are counted at a time


class Search(Protocol):
    """What ranks passages."""

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """The k best passages of each query, best first, `(queries, k) int32`; -1 where there are fewer."""


def block_rows(memory_mb: int, *, width: int, queries: int, k: int) -> int:
    """Passages of a block, so that the arrays of a search stay within `memory_mb` MiB.

    A passage takes 4 bytes a dimension in the block, 4 in faiss's copy, 2 while it is read, and 16 for its number;
    a query 4 bytes a dimension, and for each of its k results 12 in the heap, in the block's results and in the order
    they are sorted by.

    Raises:
        RecipeError: There is no room for 1024 passages.
    """
    left = memory_mb * 2**20 - _WORKSPACE - queries * (4 * width + 36 * k)
    rows = left // (10 * width + 16)
    if rows < _LEAST_BLOCK:
        needed = _WORKSPACE + queries * (4 * width + 36 * k) + _LEAST_BLOCK * (10 * width + 16)
        raise RecipeError(
            f"memory_mb={memory_mb} is too little for {queries} queries with {k} results of {width} dimensions: it "
            f"takes {-(-needed // 2**20)}, or a smaller query_block."
        )
    return int(rows)


def top_k(queries: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int, index=None) -> np.ndarray:
    """The passages of largest inner product.

    Args:
        queries: `(queries, width) float32`.
        blocks: Numbers `(rows,)` and vectors `(rows, width) float32` of passages.
        k: Passages for each query.
        index: An empty, trained faiss index; None is exact.

    Returns:
        `(queries, k) int64`, best first, the lower number first among equals; -1 where there are fewer.
    """
    import faiss

    index = index if index is not None else faiss.IndexFlatIP(queries.shape[1])
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    for ids, vectors in blocks:
        index.reset()
        index.add(vectors)
        scores, found = index.search(queries, min(k, len(ids)))
        heap.add_result(scores, np.where(found < 0, -1, ids[found]))
    index.reset()
    heap.finalize()
    order = np.lexsort((heap.I, -heap.D), axis=1)
    return np.take_along_axis(heap.I, order, axis=1)


class DenseSearch:
    """Inner product of vectors.

    Args:
        queries: Of all queries.
        passages: Of all passages.
        retriever: Gives the index.
        memory_mb: See `block_rows`.
    """

    def __init__(self, queries: Vectors, passages: Vectors, retriever: Retriever, *, memory_mb: int):
        self._queries, self._passages, self._memory_mb = queries, passages, memory_mb
        self._index = _trained(passages, retriever) if retriever.index == "ivf" else None

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """See `Search`."""
        rows = block_rows(self._memory_mb, width=self._passages.width, queries=len(queries), k=k)
        found = top_k(self._queries.take(queries), self._passages.blocks(rows), k, self._index)
        return found.astype(np.int32)


def _trained(passages: Vectors, retriever: Retriever):
    """An inverted file whose lists are learnt from passages at equal distances; always the same ones."""
    import faiss

    if retriever.lists > len(passages):
        raise RecipeError(
            f"retriever {retriever.name}: lists={retriever.lists}, but there are {len(passages)} passages."
        )
    count = min(len(passages), retriever.lists * _TRAINING_VECTORS)
    quantizer = faiss.IndexFlatIP(passages.width)
    index = faiss.IndexIVFFlat(quantizer, passages.width, retriever.lists, faiss.METRIC_INNER_PRODUCT)
    index.train(passages.take(np.linspace(0, len(passages) - 1, count).astype(np.int64)))
    index.nprobe = min(retriever.probes, retriever.lists)
    return index


class BM25Search:
    """bm25s with its defaults: Lucene's formula, English stop words, no stemming.

    Args:
        queries: All queries.
        passages: All passages.
        memory_mb: Bound of the index, in MiB.

    Raises:
        RecipeError: The passages have too many words for it.
    """

    def __init__(self, queries: Texts, passages: Texts, *, memory_mb: int):
        import bm25s

        self._queries, self._size = queries, len(passages)
        blocks = (np.arange(i, min(i + _COUNTED, self._size)) for i in range(0, self._size, _COUNTED))
        words = sum(len(text.split()) for block in blocks for text in passages.take(block))
        if words * _BYTES_A_WORD > memory_mb * 2**20:
            raise RecipeError(
                f"memory_mb={memory_mb} is too little for bm25 of {self._size:,} passages with {words:,} words: it "
                f"needs {math.ceil(words * _BYTES_A_WORD / 2**20):,}; or leave it out of the retrievers."
            )
        tokens = self._tokens(passages.take(np.arange(len(passages))))
        self._index = bm25s.BM25() if any(tokens.ids) else None  # it cannot index a corpus without a word
        if self._index is not None:
            self._index.index(tokens, show_progress=False)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """See `Search`; passages that share no word with the query are not found."""
        if self._index is None:
            return np.full((len(queries), k), -1, np.int32)
        tokens = self._tokens(self._queries.take(queries))
        k_found = min(k, self._size)
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found, scores = self._index.retrieve(
            tokens, k=k_found, show_progress=False, backend_selection="numpy", n_threads=threads if threads > 1 else 0
        )
        found = np.where(scores > 0, found, -1)
        order = np.lexsort((found, -scores), axis=1)
        found = np.take_along_axis(found, order, axis=1).astype(np.int32)
        return np.pad(found, ((0, 0), (0, k - k_found)), constant_values=-1)

    @staticmethod
    def _tokens(texts: list[str]):
        import bm25s

        return bm25s.tokenize(texts, stopwords="english", show_progress=False)


class Found:
    """Results of a search on disk: files of `(queries, k) int32`, each of `block` queries but the last."""

    def __init__(self, files: list[Path], block: int):
        self._files, self._block = files, block

    def take(self, queries: np.ndarray) -> np.ndarray:
        """The passages found for these queries, `(queries, k) int64`."""
        parts, number = np.unique(queries // self._block, return_inverse=True)
        first = np.load(self._files[int(parts[0])], mmap_mode="r")
        found = np.empty((len(queries), first.shape[1]), np.int64)
        for index, part in enumerate(parts):
            here = np.flatnonzero(number == index)
            found[here] = np.load(self._files[int(part)], mmap_mode="r")[queries[here] % self._block]
        return found


def search_all(name: str, build: Callable[[], Search], folder: Path, *, queries: int, block: int, k: int) -> Found:
    """Ranks the passages for all queries; what the folder has already is not searched again.

    Args:
        name: In the log.
        build: Makes the search, if any block is missing.
        folder: Of the results.
        queries: Their number.
        block: Queries of a file.
        k: Results of a query.
    """
    files = [folder / f"{start:012d}.npy" for start in range(0, queries, block)]
    search = None
    for number, file in enumerate(files):
        if file.exists():
            continue
        search = search or build()
        start = number * block
        found = search.search(np.arange(start, min(start + block, queries)), k)
        with replacing(file) as partial, open(partial, "wb") as handle:
            np.save(handle, found)
        logger.info("%s: %d of %d queries searched", name, min(start + block, queries), queries)
    return Found(files, block)
