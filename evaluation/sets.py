"""The evaluation sets on disk, under DATA/eval, and the checks that every one passes.

    ir/NAME, long/NAME          retrieval: corpus.jsonl, queries.jsonl, and qrels.tsv or, as in BEIR, qrels/test.tsv
                                or, where there is none, qrels/dev.tsv
    ir/NAME/PART, long/...      the same corpus with queries_PART.jsonl and qrels_PART.tsv
    NAME                        sentence similarity: test.jsonl with sentence1, sentence2, score
    pair-classification/NAME    test (or dev) with sentence1, sentence2, label; also glue/MRPC, QQP, RTE, QNLI
    clustering/NAME             test (or all) with text, label
    classification/NAME         the same files; a train (or dev, val) file gives the examples, else cross-validation

Every file may be compressed: .zst or .gz behind its name.

Laws: a set that loads is consistent; anything else is an `EvaluationError` that names file, line and offender. What
is odd but usable (texts without a word, queries that nothing answers) is logged, and counted in `oddities`.
COST: a set is held in memory whole.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from .rows import SUFFIXES, read_lines, read_rows, stored
from .set_types import EvaluationError, EvaluationSet, LabelledPairSet, PairSet, RetrievalSet, TextSet

__all__ = [
    "EvaluationError",
    "EvaluationSet",
    "LabelledPairSet",
    "PairSet",
    "RetrievalSet",
    "TextSet",
    "available_sets",
    "load_set",
    "read_rows",
    "select_sets",
]

logger = logging.getLogger(__name__)

_GLUE_PAIRS = ("MRPC", "QQP", "RTE", "QNLI")  # those of eval/glue where a high similarity should mean label 1
_POSITIVE = {1: True, 0: False, "1": True, "0": False}
_POSITIVE |= dict.fromkeys(("entailment", "equivalent", "duplicate"), True)
_POSITIVE |= dict.fromkeys(("not_entailment", "not_equivalent", "not_duplicate"), False)
_SCORED = ("test", "all", "dev")  # the file that is scored: the first of these
_EXAMPLES = ("train", "dev", "val")  # the file of the examples of a classifier: the first of these
_QRELS = ("test", "dev")  # the file of judgements in BEIR's folder qrels: the first of these
_QRELS_HEADER = ["query-id", "corpus-id", "score"]


def available_sets(data: Path) -> list[str]:
    """Names of the sets under `data`/eval, kind by kind.

    Raises:
        EvaluationError: There is no such folder.
    """
    root = data / "eval"
    if not root.is_dir():
        raise EvaluationError(f"--data {data}: no folder {root}.")
    names = []
    for kind in ("ir", "long"):
        for folder in sorted({path.parent for path in _files(root, f"{kind}/*/corpus.jsonl")}):
            name = folder.relative_to(root).as_posix()
            parts = {path.name.partition(".jsonl")[0] for path in _files(folder, "queries_*.jsonl")}
            names += [name, *(f"{name}/{part.removeprefix('queries_')}" for part in sorted(parts))]
    names += sorted({path.parent.name for path in _files(root, "*/test.jsonl")})
    pairs = {folder.name for folder in (root / "pair-classification").glob("*") if _has(folder, _SCORED)}
    pairs |= {name for name in _GLUE_PAIRS if _has(root / "glue" / name, _SCORED)}
    names += [f"pair-classification/{name}" for name in sorted(pairs)]
    texts = {x: _text_folders(root, x) for x in ("clustering", "classification")}
    names += [f"clustering/{name}" for name in sorted(texts["clustering"])]
    return names + [f"classification/{name}" for name in sorted(texts["clustering"] | texts["classification"])]


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for suffix in SUFFIXES for path in folder.glob(pattern + suffix)]


def _text_folders(root: Path, kind: str) -> set[str]:
    return {folder.name for folder in (root / kind).glob("*") if _has(folder, _SCORED[:2])}


def _has(folder: Path, names: Iterable[str]) -> bool:
    return any(_files(folder, f"{name}.jsonl") for name in names)


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((path for name in names if (path := stored(folder / f"{name}.jsonl"))), None)


def _file(path: Path) -> Path:
    """The file of that name, compressed or not.

    Raises:
        EvaluationError: There is none, or there are several.
    """
    found = stored(path)
    if found is None:
        raise EvaluationError(f"{path}: there is no such file, nor with {' or '.join(filter(None, SUFFIXES))}.")
    return found


def select_sets(data: Path, patterns: Iterable[str]) -> list[str]:
    """Names of the sets that match, in the order of the patterns.

    Args:
        data: Folder that has eval/.
        patterns: Names, or patterns with * and ? ("long/*").

    Raises:
        EvaluationError: A pattern that matches nothing.
    """
    names = available_sets(data)
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matching:
            raise EvaluationError(f"unknown set {pattern!r}; there are {', '.join(names) or 'none'}.")
        found |= dict.fromkeys(matching)
    return list(found)


def load_set(data: Path, name: str) -> EvaluationSet:
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
    root = data / "eval"
    kind, _, rest = name.partition("/")
    if not rest:
        dataset: EvaluationSet = _read_pairs(_file(root / name / "test.jsonl"), name)
    elif kind in ("ir", "long"):
        folder, _, part = rest.partition("/")
        dataset = _read_retrieval(root / kind / folder, name, suffix=f"_{part}" if part else "")
    else:
        folder = root / kind / rest
        if not folder.is_dir():
            folder = root / ("glue" if kind == "pair-classification" else "clustering") / rest
        dataset = _read_labelled_pairs(folder, name) if kind == "pair-classification" else _read_texts(folder, name)
    if dataset.oddities:
        logger.warning("%s: %s.", name, ", ".join(f"{n} {x.replace('_', ' ')}" for x, n in dataset.oddities.items()))
    return dataset


def _read_pairs(path: Path, name: str) -> PairSet:
    fields = {"sentence1": (str,), "sentence2": (str,), "score": (int, float)}
    rows = []
    for place, row in read_rows(path, fields):
        if not math.isfinite(row["score"]):
            raise EvaluationError(f"{place}: the score {row['score']} is not finite.")
        rows.append(row)
    if len(rows) < 2:
        raise EvaluationError(f"{path}: {len(rows)} pairs, a correlation needs two.")
    return PairSet(name, *([row[field] for row in rows] for field in fields))


def _read_labelled_pairs(folder: Path, name: str) -> LabelledPairSet:
    path = _first(folder, _SCORED)
    assert path is not None, "available_sets has named it"
    first, second, labels = [], [], []
    for place, row in read_rows(path, {"sentence1": (str,), "sentence2": (str,), "label": (int, str, bool)}):
        if row["label"] not in _POSITIVE:
            raise EvaluationError(f"{place}: the label {row['label']!r} is none of {', '.join(map(str, _POSITIVE))}.")
        first.append(row["sentence1"])
        second.append(row["sentence2"])
        labels.append(_POSITIVE[row["label"]])
    if len(set(labels)) < 2:
        raise EvaluationError(f"{path}: pairs of both labels are needed, 1 (alike) and 0.")
    return LabelledPairSet(name, first, second, labels)


def _read_texts(folder: Path, name: str) -> TextSet:
    path = _first(folder, _SCORED[:2])
    assert path is not None, "available_sets has named it"
    texts, labels = _read_labels(path)
    task = name.partition("/")[0]
    examples = _first(folder, _EXAMPLES) if task == "classification" else None
    if examples is None:
        return TextSet(name, task, texts, labels)
    example_texts, example_labels = _read_labels(examples)
    unknown = sorted(set(labels) - set(example_labels))
    if unknown:
        raise EvaluationError(f"{path}: the label {unknown[0]!r} has no example in {examples.name}.")
    return TextSet(name, task, texts, labels, example_texts, example_labels)


def _read_labels(path: Path) -> tuple[list[str], list[str]]:
    rows = [row for _, row in read_rows(path, {"text": (str,), "label": (int, str, bool)})]
    return [row["text"] for row in rows], [str(row["label"]) for row in rows]


def _read_retrieval(folder: Path, name: str, *, suffix: str) -> RetrievalSet:
    documents = _read_documents(_file(folder / "corpus.jsonl"))
    queries = _read_documents(_file(folder / f"queries{suffix}.jsonl"))
    path = _qrels_file(folder, suffix)
    qrels = _read_qrels(path, queries, documents)
    answered = {query: judged for query, judged in qrels.items() if max(judged.values()) > 0}
    if not answered:
        raise EvaluationError(f"{path}: no query has a relevant document.")
    return RetrievalSet(
        name,
        {query: queries[query] for query in answered},
        documents,
        answered,
        unanswered=len(qrels) - len(answered),
    )


def _qrels_file(folder: Path, suffix: str) -> Path:
    names = [f"qrels{suffix}.tsv", *(f"qrels/{name}.tsv" for name in _QRELS if not suffix)]
    found = [path for name in names if (path := stored(folder / name))]
    if not found:
        raise EvaluationError(f"{folder}: has no {' or '.join(names)}.")
    if found[0].parent == folder and len(found) > 1:
        raise EvaluationError(f"{found[0]}: {found[1].relative_to(folder)} lies beside it; keep one of them.")
    return found[0]


def _read_documents(path: Path) -> dict[str, str]:
    """Id -> text, after the title and a space where there is a title."""
    texts: dict[str, str] = {}
    for place, row in read_rows(path, {"_id": (str, int), "text": (str,)}):
        identifier, title = str(row["_id"]), row.get("title") or ""
        if identifier in texts:
            raise EvaluationError(f"{place}: the id {identifier!r} is used twice.")
        if not isinstance(title, str):
            raise EvaluationError(f"{place}: the title {title!r} is not a text.")
        texts[identifier] = f"{title} {row['text']}" if title else row["text"]
    return texts


def _read_qrels(path: Path, queries: dict[str, str], documents: dict[str, str]) -> dict[str, dict[str, int]]:
    lines = read_lines(path)
    place, header = next(lines, (f"{path}:1", ""))
    if header.split("\t") != _QRELS_HEADER:
        raise EvaluationError(f"{place}: the header is not {', '.join(_QRELS_HEADER)}, separated by tabs.")
    qrels: dict[str, dict[str, int]] = defaultdict(dict)
    for place, line in lines:
        try:
            query, document, score = line.split("\t")
            relevance = _integer(score)
        except ValueError as error:
            raise EvaluationError(f"{place}: {line!r} is not an id, an id and an integer.") from error
        if query not in queries:
            raise EvaluationError(f"{place}: there is no query {query!r}.")
        if document not in documents:
            raise EvaluationError(f"{place}: there is no document {document!r}.")
        if document in qrels[query]:
            raise EvaluationError(f"{place}: query {query!r} and document {document!r} are judged twice.")
        qrels[query][document] = relevance
    if not qrels:
        raise EvaluationError(f"{path}: no judgements.")
    return dict(qrels)


def _integer(text: str) -> int:
    """A relevance, also as "1.0".

    Raises:
        ValueError: It is none.

    Example:
        >>> _integer("2"), _integer("1.0")
        (2, 1)
    """
    value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(value)
