"""Hard-negative mining for stage III (paper section 5.2): pairs in, rows of query, positive and 15 negatives out.

    python -m training.mining --config training/recipes/tiny-mining.yaml data_dir=DATA output_dir=MINED

`MINED/mined/SOURCE/*.jsonl.zst` is what `python -m training.hard_negatives` reads. Steps: sources to queries and
passages (mining_texts), vectors (embedding_shards), rankings (mining_search), filters (negative_filters,
negative_judges), rows (mining_rows) and what became of them (mining_report).

Laws: a passage that is a positive of the query in any source, as far as it was read, is never its negative. The same
command goes on where the last one was killed, at the shard, block or file, and the output is that of an uninterrupted
run, to the byte.

Why not sentence-transformers' `mine_hard_negatives`, whose results ours equal on the same settings (test_mining.py):
it holds all texts, all vectors and all rankings in memory, and searches the corpus as one block; killed, it begins
again; its cache of vectors goes by the name of the base model, so that a model which was trained further gets the
vectors of the one before; it has one retriever, and with a cross-encoder reads every candidate; a row with too few
negatives is dropped. Two rules differ by choice: our margin is held against the row's own positive (JE1), theirs
against the least similar positive of the query; our `skip` counts ranks before the margin, their `range_min` after it.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from .embedding_shards import Vectors, embed, load_embedder
from .mining_recipe import BM25, INPUTS, MiningRecipe, Retriever, check, input_files
from .mining_report import write_report
from .mining_rows import Miner, write_sources
from .mining_search import BM25Search, DenseSearch, Found, Search, search_all
from .mining_texts import Collection, Texts, collect, replacing
from .negative_filters import Reason
from .negative_judges import CrossEncoderScores, Judge, TeacherJudge, needed_passages
from .recipe import RecipeError, load_recipe, override

logger = logging.getLogger(__name__)


def mine(recipe: MiningRecipe) -> dict[str, Any]:
    """Mines, or goes on where an earlier call with the same recipe stopped.

    Args:
        recipe: What to do.

    Returns:
        The report (see `write_report`).

    Raises:
        RecipeError: Before any work, for anything wrong with the recipe, its files or the output folder; later, for a
            model that cannot be loaded, data that cannot be read, or filters that left no row.
    """
    check(recipe)
    root = Path(recipe.output_dir)
    with _alone(root):
        with replacing(root / INPUTS) as file:
            file.write_text(json.dumps(input_files(recipe), indent=1) + "\n", encoding="utf-8")
        with replacing(root / "recipe.yaml") as file:
            OmegaConf.save(OmegaConf.structured(recipe), file)
        with _timed(root, "texts"):
            collection = collect(recipe, root / "work" / "texts")
        found = [_retrieve(recipe, retriever, collection, root) for retriever in recipe.retrievers]
        with _timed(root, "filters and rows"):
            write_sources(recipe, collection, root, partial(_miner, recipe, collection, found, root))
        report = write_report(recipe, collection, root)
    if not any((root / "mined").rglob(f"*.{recipe.format}")):
        raise RecipeError(f"the filters left no row of any source; {root / 'report.md'} says which removed what.")
    return report


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Holds the output folder.

    Raises:
        RecipeError: Another process does.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RecipeError(f"output_dir={root}: another run is at work there; wait for it.") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _timed(root: Path, phase: str) -> Iterator[None]:
    """Appends to `log.jsonl` the seconds of a phase, phases within it included, and the peak memory so far."""
    started = time.monotonic()
    yield
    entry = {"phase": phase, "seconds": round(time.monotonic() - started, 1), "peak_memory_mb": peak_memory_mb()}
    logger.info("%s: %.1f s", phase, entry["seconds"])
    with open(root / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def peak_memory_mb() -> int | None:
    """Largest resident set of this process so far in MiB; None where the kernel does not say (Linux does)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) // 1024


def _embed(
    recipe: MiningRecipe, root: Path, model: str, max_length: int | None, texts: dict[str, Texts]
) -> list[Vectors]:
    """Vectors of texts by role."""
    embedder = load_embedder(model, max_length=max_length, batch_size=recipe.batch_size, device=recipe.device)
    kept = recipe.embeddings_dir
    folder = Path(kept).expanduser() if kept else root / "work" / "embeddings"
    options = {"folder": folder, "dtype": recipe.dtype, "shard_rows": recipe.embedding_rows}
    return [embed(embedder, some, role, **options) for role, some in texts.items()]


def _retrieve(recipe: MiningRecipe, retriever: Retriever, collection: Collection, root: Path) -> Found:
    """What a retriever finds for all queries: enough that `depth` are left without the known positives.

    NOTE: for a query with more than `depth` positives it may be fewer; memory is not let grow with them.
    """

    def build() -> Search:
        if retriever.model == BM25:
            return BM25Search(collection.queries, collection.passages, memory_mb=recipe.memory_mb)
        texts = {"query": collection.queries, "document": collection.passages}
        with _timed(root, f"vectors of {retriever.name}"):
            queries, passages = _embed(recipe, root, retriever.model, retriever.max_length, texts)
        return DenseSearch(queries, passages, retriever, memory_mb=recipe.memory_mb)

    k = recipe.depth + min(collection.most_known, recipe.depth) + 1  # the last may be the text of the query
    with _timed(root, f"ranking of {retriever.name}"):
        folder, queries = root / "work" / "found" / retriever.name, len(collection.queries)
        k = min(k, len(collection.passages))
        return search_all(retriever.name, build, folder, queries=queries, block=recipe.query_block, k=k)


def _miner(recipe: MiningRecipe, collection: Collection, found: list[Found], root: Path) -> Miner:
    return Miner(recipe, collection, found, _judges(recipe, collection, found, root))


def _judges(
    recipe: MiningRecipe, collection: Collection, found: list[Found], root: Path
) -> list[tuple[Judge, Any, Reason]]:
    """The judges of a recipe; the teacher embeds what was found first."""
    judges: list[tuple[Judge, Any, Reason]] = []
    if recipe.teacher:
        with _timed(root, "vectors of the teacher"):
            ids = needed_passages(found, len(collection.passages), collection.query, collection.positive)
            texts = {"query": collection.queries, "document": collection.passages.select(ids)}
            vectors = _embed(recipe, root, recipe.teacher.model, recipe.teacher.max_length, texts)
        judges.append((TeacherJudge(*vectors, ids), recipe.teacher, Reason.TEACHER))
    if recipe.cross_encoder:
        options = {"batch_size": recipe.batch_size, "device": recipe.device}
        judge = CrossEncoderScores(recipe.cross_encoder, collection.queries, collection.passages, **options)
        judges.append((judge, recipe.cross_encoder, Reason.CROSS_ENCODER))
    return judges


def command_line() -> argparse.Namespace:
    """Parses `--config RECIPE [key=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="python -m training.mining",
        description="Hard-negative mining for stage III. The same command again goes on where the last one stopped.",
        epilog="In output_dir: mined/SOURCE/* are the rows for training.hard_negatives, report.md says what was "
        "removed and why, log.jsonl what each phase took; work/ has the intermediate files.",
    )
    parser.add_argument(
        "--config", required=True, help="recipe, a YAML file; training/recipes/tiny-mining.yaml is ours"
    )
    parser.add_argument("overrides", nargs="*", type=override, metavar="key=value", help="for example depth=50")
    return parser.parse_args()


def main():
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    arguments = command_line()
    recipe = load_recipe(MiningRecipe, arguments.config, arguments.overrides)
    report = mine(recipe)
    written = sum(counts["complete"] + counts["filled"] + counts["short"] for counts in report["sources"].values())
    print(f"mining finished: {written:,} rows in {Path(recipe.output_dir) / 'mined'}")


if __name__ == "__main__":
    from .run import exit_on_recipe_error

    exit_on_recipe_error(main)
