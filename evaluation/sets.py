"""The evaluation sets on disk, under DATA/eval: retrieval (ir/NAME, long/NAME) and sentence similarity (NAME).

Law: a set that loads is consistent; anything else is an `EvaluationError` that names file, line and offender.
COST: a set is held in memory whole.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import zstandard
except ImportError as error:
    raise ImportError("evaluation.sets needs: pip install 'modeling-jina-bert[evaluate]'") from error


class EvaluationError(ValueError):
    """A name, a file or a row is wrong; the message is one line that says which, and what was expected."""


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, documents and which documents answer which query.

    Attributes:
        name: "ir/NAME" or "long/NAME".
        queries: Query id -> text, the judged queries only.
        documents: Document id -> title and text.
        qrels: Query id -> {document id: relevance}.
    """

    name: str
    queries: dict[str, str]
    documents: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of judged queries and of documents."""
        return {"queries": len(self.queries), "documents": len(self.documents)}


@dataclass(frozen=True)
class PairSet:
    """Sentence pairs with the similarity that people gave them.

    Attributes:
        name: Name of the folder.
        first: First sentence of each pair.
        second: Second sentence of each pair.
        scores: Similarity of each pair, on the scale of the set.
    """

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of pairs."""
        return {"pairs": len(self.scores)}


def available_sets(data: Path) -> list[str]:
    """Names of the sets under `data`/eval: "ir/NAME", "long/NAME" and the sentence similarity sets.

    Raises:
        EvaluationError: There is no such folder.
    """
    root = data / "eval"
    if not root.is_dir():
        raise EvaluationError(f"--data {data}: no folder {root}.")
    retrieval = [path.parent for kind in ("ir", "long") for path in root.glob(f"{kind}/*/corpus.jsonl.zst")]
    pairs = [path.parent for path in root.glob("*/test.jsonl.zst")]
    return [path.relative_to(root).as_posix() for path in sorted(retrieval) + sorted(pairs)]


def load_set(data: Path, name: str) -> RetrievalSet | PairSet:
    """Reads and checks one set.

    Args:
        data: Folder that has eval/.
        name: One of `available_sets(data)`.

    Raises:
        EvaluationError: An unknown name; a file missing or malformed; a judgement of an unknown query or document.
    """
    names = available_sets(data)
    if name not in names:
        raise EvaluationError(f"unknown set {name!r}; there are {', '.join(names) or 'none'}.")
    folder = data / "eval" / name
    if "/" not in name:
        return _read_pairs(folder / "test.jsonl.zst", name)
    documents = _read_texts(folder / "corpus.jsonl.zst")
    queries = _read_texts(folder / "queries.jsonl.zst")
    qrels = _read_qrels(folder / "qrels.tsv", queries, documents)
    return RetrievalSet(name, {query: queries[query] for query in qrels}, documents, qrels)


def _read_rows(path: Path, fields: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path:line", row) of each line, the named fields present and of their type."""
    try:
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{path}:{number}"
                row = json.loads(line)
                for field, kind in fields.items():
                    if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                        raise EvaluationError(f"{place}: no field {field!r}, or it has the wrong type.")
                yield place, row
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{place}: not JSON ({error}).") from error
    except (OSError, UnicodeDecodeError, zstandard.ZstdError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}).") from error


def _read_pairs(path: Path, name: str) -> PairSet:
    fields = {"sentence1": str, "sentence2": str, "score": (int, float)}
    rows = [row for _, row in _read_rows(path, fields)]
    if len(rows) < 2:
        raise EvaluationError(f"{path}: {len(rows)} pairs, a correlation needs two.")
    return PairSet(name, *([row[field] for row in rows] for field in fields))


def _read_texts(path: Path) -> dict[str, str]:
    """Id -> text, after the title and a space where there is a title."""
    texts: dict[str, str] = {}
    for place, row in _read_rows(path, {"_id": str, "text": str}):
        if row["_id"] in texts:
            raise EvaluationError(f"{place}: the id {row['_id']!r} is used twice.")
        title = row.get("title")
        texts[row["_id"]] = f"{title} {row['text']}" if title else row["text"]
    return texts


def _read_qrels(path: Path, queries: dict[str, str], documents: dict[str, str]) -> dict[str, dict[str, int]]:
    try:
        # Not splitlines(): an id may hold one of the other line ends of Unicode.
        header, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}).") from error
    if header.split("\t") != ["query-id", "corpus-id", "score"]:
        raise EvaluationError(f"{path}:1: the header is not query-id, corpus-id, score, separated by tabs.")
    qrels: dict[str, dict[str, int]] = defaultdict(dict)
    for number, line in enumerate(lines, start=2):
        try:
            query, document, score = line.split("\t")
            relevance = int(score)
        except ValueError as error:
            raise EvaluationError(f"{path}:{number}: {line!r} is not an id, an id and an integer.") from error
        if query not in queries:
            raise EvaluationError(f"{path}:{number}: there is no query {query!r}.")
        if document not in documents:
            raise EvaluationError(f"{path}:{number}: there is no document {document!r}.")
        if document in qrels[query]:
            raise EvaluationError(f"{path}:{number}: query {query!r} and document {document!r} are judged twice.")
        qrels[query][document] = relevance
    if not qrels:
        raise EvaluationError(f"{path}: no judgements.")
    return dict(qrels)
