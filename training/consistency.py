"""The consistency filter of JE1: a pair stays if its positive is among those of a pool that are nearest to the query.

Laws: pool and sample are the texts with the smallest seeded hashes, so they depend on the pairs alone, not on how they
were read or cut into tasks. A positive of the pool that is no nearer than the pair's own takes no place from it; so
it does not matter whether the pair's own is in the pool. A positive of the pool has one vector, the pool's. Texts
are embedded in float32 (in bfloat16 where the recipe says so) and searched exactly (faiss); where a recipe keeps the
vectors for distillation, they are kept in float16, a cosine's error of 1e-4.
COST: a pair takes two texts through the teacher and 2 x pool x width FLOPs of search (0.8 GFLOP for the paper's pool
and 384 dimensions); a task holds the pool's vectors (1.5 GB for that).
"""

import functools
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from .mining_texts import normalised, replacing
from .pair_filters import hash_of, pair_key, pair_of, save_array
from .pair_recipe import Consistency

if TYPE_CHECKING:
    import faiss

    from .corpus_steps import Removed
    from .embedding_shards import Embedder, KeptEmbedder

_JUDGED = 512  # pairs embedded at a time, so that texts of similar length share a batch
_JUDGED_AND_KEPT = 4096  # of which the vectors are kept: those of a batch are a file
_TOLERANCE = 1e-5  # two ways of computing one product of float32 vectors differ by 1e-7


@functools.cache
def _teacher(name: str, max_length: int | None, batch_size: int, device: str | None, bf16: bool) -> "Embedder":
    from .embedding_shards import load_embedder

    return load_embedder(name, max_length=max_length, batch_size=batch_size, device=device, bf16=bf16)


def load_teacher(consistency: Consistency) -> "Embedder | KeptEmbedder":
    """The teacher of a recipe, once a process.

    Raises:
        RecipeError: It cannot be loaded, or has no positions for `max_length` tokens.
    """
    teacher = _teacher(
        consistency.teacher, consistency.max_length, consistency.batch_size, consistency.device, consistency.bf16
    )
    if consistency.cache_dir is None:
        return teacher
    from .embedding_shards import KeptEmbedder

    return KeptEmbedder(teacher, Path(consistency.cache_dir))


class HashedTexts(PipelineStep):
    """Lets pairs pass and writes what the pool and the sample are chosen by: pool/TASK.npy, pairs/SOURCE/TASK.npy."""

    type = "SAMPLE"
    name = "hashes"

    def __init__(self, folder: str, seed: int):
        super().__init__()
        self.folder = folder
        self.seed = seed

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        pool: set[int] = set()
        pairs: dict[str, array] = defaultdict(lambda: array("Q"))
        for document in data:
            pool.add(passage_hash(document, self.seed))
            pairs[document.metadata["source"]].append(pair_hash(document, self.seed))
            yield document
        save_array(Path(self.folder) / "pool" / f"{rank:05d}.npy", np.fromiter(pool, np.uint64, len(pool)))
        for source, hashes in pairs.items():
            save_array(Path(self.folder) / "pairs" / source / f"{rank:05d}.npy", np.array(hashes, np.uint64))


def passage_hash(document: Document, seed: int) -> int:
    """By which the pool is chosen: of the positive, so that a passage of many pairs is in it once."""
    return hash_of(normalised(pair_of(document)[1]), seed=seed)


def pair_hash(document: Document, seed: int) -> int:
    """By which the pairs that are judged are chosen."""
    return hash_of(pair_key(*pair_of(document)), seed=seed)


class Choose(PipelineStep):
    """One task: the largest hash that is in the pool, and in the sample of each source. NAME.npy, one number each.

    COST: 16 bytes for each text of the pool or sample and for each pair of a task.
    """

    type = "SAMPLE"
    name = "choose"

    def __init__(self, hashes: str, folder: str, pool: int, pairs_per_source: int | None):
        super().__init__()
        self.hashes = Path(hashes)
        self.folder = Path(folder)
        self.pool = pool
        self.pairs_per_source = pairs_per_source

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1):
        smallest = smallest_hashes(sorted((self.hashes / "pool").glob("*.npy")), self.pool)
        self.stat_update("pool", value=len(smallest))
        save_array(self.folder / "pool.npy", smallest[-1:])
        for source in sorted((self.hashes / "pairs").iterdir()) if self.pairs_per_source else ():
            chosen = smallest_hashes(sorted(source.glob("*.npy")), self.pairs_per_source)
            save_array(self.folder / "pairs" / f"{source.name}.npy", chosen[-1:])


def smallest_hashes(files: list[Path], count: int) -> np.ndarray:
    """The smallest different hashes of files, `(at most count,) uint64`, ascending."""
    smallest = np.empty(0, np.uint64)
    for file in files:
        smallest = np.unique(np.concatenate([smallest, np.load(file)]))[:count]
    return smallest


class SampleFilter(BaseFilter):
    """Keeps the pairs of a source's sample."""

    type = "FILTER"
    name = "sample"

    def __init__(self, chosen: str, seed: int, exclusion_writer: "Removed | None" = None):
        super().__init__(exclusion_writer)
        self.chosen = Path(chosen)
        self.seed = seed

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.last = {file.stem: int(np.load(file)[0]) for file in (self.chosen / "pairs").glob("*.npy")}
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool:
        return pair_hash(doc, self.seed) <= self.last[doc.metadata["source"]]


class EmbedPool(PipelineStep):
    """Writes the hashes and vectors of this task's positives that are in the pool: TASK.npz, vectors in float32."""

    type = "EMBED"
    name = "pool"

    def __init__(self, chosen: str, folder: str, consistency: Consistency, seed: int):
        super().__init__()
        self.chosen = Path(chosen)
        self.folder = Path(folder)
        self.consistency = consistency
        self.seed = seed

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1):
        last = int(np.load(self.chosen / "pool.npy")[0])
        texts: dict[int, str] = {}
        for document in data:
            key = passage_hash(document, self.seed)
            if key <= last:
                texts.setdefault(key, pair_of(document)[1])
        if not texts:
            return
        with self.track_time("batch"):
            vectors = load_teacher(self.consistency).embed(list(texts.values()), "document")
        with replacing(self.folder / f"{rank:05d}.npz") as partial, open(partial, "wb") as file:
            np.savez(file, keys=np.fromiter(texts, np.uint64, len(texts)), vectors=vectors)


@dataclass
class Pool:
    """The passages that positives are judged among.

    Attributes:
        index: Their vectors, of length 1.
        keys: Their `passage_hash`es, `(passages,) uint64`, in the order of the index.
    """

    index: "faiss.IndexFlatIP"
    keys: np.ndarray

    def __post_init__(self):
        self._order = np.argsort(self.keys)

    def with_its_own(self, keys: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Vectors of passages, `(passages, width) float32`, in which one that the pool has is the pool's.

        In another batch a text has another vector, under bfloat16 by more than what decides a place.
        """
        vectors = vectors.copy()
        places = self._order[np.searchsorted(self.keys, keys, sorter=self._order).clip(max=len(self.keys) - 1)]
        for row in np.flatnonzero(self.keys[places] == keys).tolist():
            vectors[row] = self.index.reconstruct(int(places[row]))
        return vectors


def load_pool(folder: Path) -> Pool:
    """A pool; a passage that several tasks embedded is in it once.

    Args:
        folder: With `keys (passages,) uint64` and `vectors (passages, width) float32` in each .npz.
    """
    import faiss

    index, seen = None, np.empty(0, np.uint64)
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as part:
            keys, vectors = part["keys"], part["vectors"]
        index = index or faiss.IndexFlatIP(vectors.shape[1])
        new = ~np.isin(keys, seen)
        index.add(np.ascontiguousarray(vectors[new]))
        seen = np.append(seen, keys[new])
    return Pool(index, seen)


def compared(queries: np.ndarray, positives: np.ndarray, pool: "faiss.IndexFlatIP", top: int) -> np.ndarray:
    """A pair's positive and the passage of the pool at place `top`: how near both are to the query.

    Args:
        queries: `(pairs, width) float32`, of length 1.
        positives: `(pairs, width) float32`, of length 1.
        pool: Passages, of length 1.
        top: Places that the positive may take.

    Returns:
        `(pairs, 2) float32`: cosine of query and positive, and of query and that passage (-1 in a smaller pool). The
        positive is among the `top` nearest of the pool and itself if the first is not below the second.
    """
    own = np.einsum("ij,ij->i", queries, positives)
    if pool.ntotal < top:
        return np.stack([own, np.full_like(own, -1.0)], axis=1)
    cosines, _ = pool.search(queries, top)
    return np.stack([own, cosines[:, -1]], axis=1)


class ConsistencyFilter(BaseFilter):
    """Keeps the pairs whose positive is among the `top` passages nearest to the query, of the pool and itself."""

    type = "FILTER"
    name = "consistency"

    def __init__(self, folder: str, consistency: Consistency, seed: int, exclusion_writer: "Removed | None" = None):
        super().__init__(exclusion_writer, batch_size=_JUDGED_AND_KEPT if consistency.cache_dir else _JUDGED)
        self.folder = Path(folder)
        self.seed = seed
        self.consistency = consistency

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.pool = load_pool(self.folder)
        self.teacher = load_teacher(self.consistency)
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool]:
        queries, positives = zip(*map(pair_of, batch), strict=True)
        keys = np.array([passage_hash(document, self.seed) for document in batch], np.uint64)
        own = self.pool.with_its_own(keys, self.teacher.embed(list(positives), "document"))
        cosines = compared(self.teacher.embed(list(queries), "query"), own, self.pool.index, self.consistency.top)
        for document, (own, rival) in zip(batch, cosines.tolist(), strict=True):
            document.metadata |= {"cosine": round(own, 4), "rival": round(rival, 4)}
        return (cosines[:, 0] >= cosines[:, 1] - _TOLERANCE).tolist()


def describe(consistency: dict) -> dict[str, object]:
    """The teacher of a recipe's `consistency`, for the report: name, width, tokens, and what its vectors depend on."""
    teacher = load_teacher(Consistency(**consistency))
    identity = teacher.identity("document")
    return {"name": teacher.name, **{key: identity[key] for key in ("max_length", "weights_sha256")}}
