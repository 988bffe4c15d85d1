"""Time and memory of the exact search of mining, on random unit vectors in memory-mapped shards.

    python -m training.mining_timing --passages 1000000 --queries 4096 --output training/results/mining/search.json

Law: what is timed is the code that mining runs (`DenseSearch`), and its results are compared with a product of all
vectors for some of the queries in the same run.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .embedding_shards import Vectors
from .mining import peak_memory_mb
from .mining_recipe import Retriever
from .mining_search import DenseSearch, block_rows
from .mining_texts import replacing
from .recipe import RecipeError

_CHECKED = 16  # queries searched a second time, by numpy
_SHARD = 65_536  # vectors of a file


def random_shards(folder: Path, rows: int, width: int, *, seed: int) -> Vectors:
    """Writes random unit vectors, `(rows, width) float16`, in shards."""
    generator, files = np.random.default_rng(seed), []
    for number, start in enumerate(range(0, rows, _SHARD)):
        vectors = generator.standard_normal((min(_SHARD, rows - start), width), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        files.append(folder / f"{number:06d}.npy")
        np.save(files[-1], vectors.astype(np.float16))
    numbers = np.arange(rows)
    return Vectors(files, numbers // _SHARD, numbers % _SHARD)


def brute_force(queries: np.ndarray, passages: Vectors, k: int) -> np.ndarray:
    """The k best passages by one score for every pair, `(queries, k)`, best first."""
    scores = np.concatenate([vectors @ queries.T for _, vectors in passages.blocks(_SHARD)])  # (passages, queries)
    best = np.argpartition(-scores, k, axis=0)[:k]  # (k, queries)
    order = np.argsort(-np.take_along_axis(scores, best, axis=0), axis=0)
    return np.take_along_axis(best, order, axis=0).T


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Times one search.

    Raises:
        RuntimeError: The search is not exact.
    """
    (folder / "passages").mkdir()
    (folder / "queries").mkdir()
    passages = random_shards(folder / "passages", options.passages, options.width, seed=0)
    queries = random_shards(folder / "queries", options.queries, options.width, seed=1)
    search = DenseSearch(queries, passages, Retriever(name="timing", model=""), memory_mb=options.memory_mb)
    before, blocks = peak_memory_mb(), []
    cpu, started = time.process_time(), time.monotonic()
    for start in range(0, options.queries, options.query_block):
        blocks.append(search.search(np.arange(start, min(start + options.query_block, options.queries)), options.k))
    seconds, cpu_seconds, after = time.monotonic() - started, time.process_time() - cpu, peak_memory_mb()
    found = np.concatenate(blocks)
    checked = np.linspace(0, options.queries - 1, _CHECKED).astype(np.int64)
    different = int((found[checked] != brute_force(queries.take(checked), passages, options.k)).any(axis=1).sum())
    # Sums in another order may exchange neighbours of nearly equal score; a search that is not exact differs in all.
    if different > _CHECKED // 4:
        raise RuntimeError(f"{different} of {_CHECKED} queries have other results than a product of all vectors.")
    in_block = min(options.query_block, options.queries)
    return {
        **{key: value for key, value in vars(options).items() if key != "output"},
        "dtype": "float16",
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "passages_of_a_block": block_rows(options.memory_mb, width=options.width, queries=in_block, k=options.k),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_memory_mb_before": before,
        "peak_memory_mb_after": after,
        "checked_queries": _CHECKED,
        "checked_queries_with_another_order": different,
    }


def command_line() -> argparse.Namespace:
    """Parses the sizes."""
    parser = argparse.ArgumentParser(
        prog="python -m training.mining_timing", description="Time and memory of mining's exact search."
    )
    sizes = {"passages": 1_000_000, "queries": 4096, "width": 256, "k": 200, "memory-mb": 512, "query-block": 4096}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"default {size:,}")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    for name in sizes:
        if vars(options)[name.replace("-", "_")] < 1:
            parser.error(f"--{name} must be at least 1")
    if options.k >= options.passages:
        parser.error("--k must be below --passages")
    return options


def main():
    options = command_line()
    with tempfile.TemporaryDirectory() as folder:
        result = json.dumps(measure(options, Path(folder)), indent=1)
    print(result)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.output) as file:
            file.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
