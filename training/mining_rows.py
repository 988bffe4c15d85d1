"""Rows of query, positive and negatives: every row of a source through the filters, written file by file.

Laws: a passage that is a positive of the query in any source is never its negative, nor is one that a judge removed,
not even at random. Draws depend on the seed and the number of the row alone. A file of rows is done when its counts
lie in `work/counts`; what is not done is written again.
"""

import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .mining_recipe import MiningRecipe
from .mining_report import Tally, example, wants_example
from .mining_search import Found
from .mining_texts import Collection, replacing
from .negative_filters import (
    Candidates,
    Reason,
    chosen,
    drawn,
    remove_by_rank,
    remove_known,
    remove_repeated,
    remove_unread,
    too_relevant,
)
from .negative_judges import Judge

logger = logging.getLogger(__name__)

_ROWS = 256
"""Rows filtered at a time."""
_SCHEMA = pa.schema([("query", pa.string()), ("positive", pa.string()), ("negatives", pa.list_(pa.string()))])


@dataclass
class Choice:
    """The negatives of one row.

    Attributes:
        row: Its number among all rows.
        index: Its place in the block of candidates.
        columns: `(mined,) int64`, columns of the candidates that became negatives.
        negatives: Passages, the mined ones first, then random ones.
    """

    row: int
    index: int
    columns: np.ndarray
    negatives: list[int]

    @property
    def random(self) -> int:
        return len(self.negatives) - len(self.columns)


@dataclass
class Miner:
    """From candidates to rows.

    Attributes:
        recipe: What to do.
        collection: The rows and their texts.
        found: What each retriever found.
        judges: Each with its entry in the recipe and its reason.
    """

    recipe: MiningRecipe
    collection: Collection
    found: Sequence[Found]
    judges: Sequence[tuple[Judge, Any, Reason]]

    def candidates(self, rows: np.ndarray) -> Candidates:
        """What was found for some rows, after all filters."""
        collection, query = self.collection, self.collection.query[rows]
        found = [results.take(query) for results in self.found]
        candidates = Candidates(np.concatenate(found, axis=1), [part.shape[1] for part in found])
        remove_known(candidates, [collection.known(number) for number in query], collection.same_text[query])
        remove_by_rank(candidates, skip=self.recipe.skip, depth=self.recipe.depth)
        remove_repeated(candidates)
        for judge, settings, reason in self.judges:
            if reason is Reason.CROSS_ENCODER:
                remove_unread(candidates, settings.candidates)
            row, column = np.nonzero(candidates.left())
            candidates.scores[:] = np.nan
            candidates.scores[row, column] = judge.scores(query[row], candidates.ids[row, column])
            candidates.positive_scores = judge.scores(query, collection.positive[rows])
            margins = {"margin": settings.margin, "relative_margin": settings.relative_margin}
            candidates.remove(too_relevant(candidates.scores, candidates.positive_scores, **margins), reason)
        return candidates

    def rows(self, start: int, stop: int, pool: np.ndarray, tally: Tally) -> Iterator[dict[str, Any]]:
        """The output rows of the rows from `start` to `stop`; counts them.

        Args:
            start: First row.
            stop: The row after the last one.
            pool: `(passages,) int64`, what random negatives are drawn from.
            tally: Is added to.
        """
        for first in range(start, stop, _ROWS):
            numbers = np.arange(first, min(first + _ROWS, stop))
            candidates = self.candidates(numbers)
            tally.count(candidates)
            choices = [self._choice(candidates, index, row, pool) for index, row in enumerate(numbers.tolist())]
            kept = [choice for choice in choices if tally.row(self._outcome(choice)) != "dropped"]
            for choice, row in zip(kept, self._texts(kept), strict=True):
                names = [self.recipe.retrievers[number].name for number in candidates.retriever[choice.columns]]
                ranks = candidates.ranks[choice.index, choice.columns].tolist()
                tally.negatives(names, ranks, random=choice.random)
                if names and wants_example(tally, place=choice.row - start, rows=stop - start):
                    scores = candidates.scores[choice.index, choice.columns].tolist()
                    # Random ones come last and have no rank.
                    described = list(zip(row["negatives"], ranks, names, scores, strict=False))
                    tally.examples.append(example(row, float(candidates.positive_scores[choice.index]), described))
                yield row

    def _choice(self, candidates: Candidates, index: int, row: int, pool: np.ndarray) -> Choice:
        recipe, query = self.recipe, int(self.collection.query[row])
        generator = np.random.default_rng([recipe.seed, row])
        quotas = [retriever.quota or 0 for retriever in recipe.retrievers]
        draw = generator if recipe.choose == "random" else None
        columns = chosen(candidates, index, wanted=recipe.num_negatives, quotas=quotas, generator=draw)
        negatives = candidates.ids[index, columns].tolist()
        missing = recipe.num_negatives - len(negatives)
        if missing and recipe.fill == "random":
            negatives += drawn(pool, self._excluded(candidates, index, query), missing, generator)
        return Choice(row, index, columns, negatives)

    def _excluded(self, candidates: Candidates, index: int, query: int) -> set[int]:
        """What no random negative may be: positives, the query's text, what was mined, what judges removed."""
        reasons = candidates.reasons[index]
        barred = np.isin(reasons, [Reason.LEFT, Reason.TEACHER, Reason.CROSS_ENCODER])
        known = self.collection.known(query).tolist()
        return {*known, int(self.collection.same_text[query]), *candidates.ids[index, barred].tolist()}

    def _outcome(self, choice: Choice) -> str:
        """The field of `Tally` that counts a row."""
        wanted, fill = self.recipe.num_negatives, self.recipe.fill
        if len(choice.columns) == wanted:
            return "complete"
        if len(choice.negatives) == wanted:
            return "filled"
        return "dropped" if fill == "drop" or not choice.negatives else "short"

    def _texts(self, choices: list[Choice]) -> list[dict[str, Any]]:
        """The output rows; each text is read once."""
        collection, rows = self.collection, [choice.row for choice in choices]
        queries = collection.queries.take(collection.query[rows])
        ids = [[int(collection.positive[choice.row]), *choice.negatives] for choice in choices]
        different = np.unique(np.array([number for row in ids for number in row], dtype=np.int64))
        text = dict(zip(different.tolist(), collection.passages.take(different), strict=True))
        return [
            {"query": query, "positive": text[row[0]], "negatives": [text[number] for number in row[1:]]}
            for query, row in zip(queries, ids, strict=True)
        ]


def write_sources(recipe: MiningRecipe, collection: Collection, root: Path, load: Callable[[], Miner]):
    """Writes the files of all sources that are not there yet.

    Args:
        recipe: What to do.
        collection: The rows.
        root: The output folder.
        load: Makes the miner, if any file is missing.
    """
    miner = None
    for number, source in enumerate(recipe.sources):
        start, stop = (int(bound) for bound in collection.source_starts[number : number + 2])
        pool = np.unique(collection.positive[start:stop])
        for part, first in enumerate(range(start, stop, recipe.shard_rows)):
            name, last = f"part-{part:05d}", min(first + recipe.shard_rows, stop)
            counts = root / "work" / "counts" / source.name / f"{name}.json"
            if counts.exists():
                continue
            miner, tally = miner or load(), Tally()
            write_rows(root / "mined" / source.name / f"{name}.{recipe.format}", miner.rows(first, last, pool, tally))
            with replacing(counts) as file:  # last: it says that the part is done
                file.write_text(json.dumps(asdict(tally), ensure_ascii=False) + "\n", encoding="utf-8")
            logger.info("%s: %d of %d rows", source.name, last - start, stop - start)


def write_rows(path: Path, rows: Iterator[dict[str, Any]]):
    """Writes rows as parquet, JSONL, or JSONL compressed by zstandard, by the ending; no row, no file."""
    first = next(rows, None)
    if first is None:
        return
    with replacing(path) as file, (_parquet if path.suffix == ".parquet" else _lines)(file, path.suffix) as write:
        write(first)
        for row in rows:
            write(row)


@contextmanager
def _parquet(file: Path, _suffix: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    buffer: list[dict[str, Any]] = []

    def flush():
        writer.write_table(pa.Table.from_pylist(buffer, _SCHEMA))
        buffer.clear()

    def write(row: dict[str, Any]):
        buffer.append(row)
        if len(buffer) == _ROWS:
            flush()

    with pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
        yield write
        flush()


@contextmanager
def _lines(file: Path, suffix: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    with open(file, "wb") as raw:
        if suffix == ".zst":
            import zstandard

            raw = zstandard.ZstdCompressor(level=9).stream_writer(raw)
        with io.TextIOWrapper(raw, encoding="utf-8") as lines:
            yield partial(_write_line, lines)


def _write_line(lines: io.TextIOWrapper, row: dict[str, Any]):
    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
