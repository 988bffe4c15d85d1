"""Retrieval and sentence similarity on local files, for embedding models and BM25.

    python -m evaluation.local --model hub_repo/tiny --data DATA --baseline bm25 --output results.json

Laws: everything wrong with names and files is reported before the first text is embedded; the search is exact; a score already
in the output, of the same model with the same weights and settings, is not computed again. The measures are trec_eval's (linear
gain; ties broken by document id, descending) and scipy's.
COST: all data sets and models of the run are held in memory; a batch holds `TOKENS_PER_BATCH` tokens at most, or one text.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from .baselines import BM25, MINILM, load_minilm

try:
    import pytrec_eval
    import zstandard
    from rich.console import Console
    from rich.table import Table
    from scipy.stats import spearmanr
except ImportError as error:
    raise ImportError("evaluation.local needs: pip install 'modeling-jina-bert[evaluate]'") from error

logger = logging.getLogger(__name__)

BATCH_SIZE = 32  # texts
TOKENS_PER_BATCH = 8192  # padding included
RETRIEVED = 100  # documents for each query
CUTOFF = 10  # of the measures
QUERY_BLOCK = 1024  # queries in one matrix product

MEASURES = {f"ndcg_at_{CUTOFF}": "nDCG@10", f"mrr_at_{CUTOFF}": "MRR@10", f"recall_at_{CUTOFF}": "recall@10", "spearman": "Spearman"}
_PACKAGES = ("torch", "transformers", "sentence-transformers", "numpy", "scipy", "bm25s", "pytrec-eval-terrier")


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
        EvaluationError: An unknown name, or a file that is missing or malformed; a judgement of an unknown query or document.
    """
    names = available_sets(data)
    if name not in names:
        raise EvaluationError(f"unknown set {name!r}; there are {', '.join(names) or 'none'}.")
    folder = data / "eval" / name
    if "/" not in name:
        rows = [row for _, row in _read_rows(folder / "test.jsonl.zst", {"sentence1": str, "sentence2": str, "score": (int, float)})]
        if len(rows) < 2:
            raise EvaluationError(f"{folder / 'test.jsonl.zst'}: {len(rows)} pairs, a correlation needs two.")
        return PairSet(name, *([row[column] for row in rows] for column in ("sentence1", "sentence2", "score")))
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
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file.")
    header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
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
        qrels[query][document] = relevance
    if not qrels:
        raise EvaluationError(f"{path}: no judgements.")
    return dict(qrels)


class System(Protocol):
    """What can be evaluated: `EmbeddingModel` or `BM25`."""

    name: str

    @property
    def settings(self) -> dict[str, object]:
        """JSON values; two runs with equal settings have equal scores."""

    def rank(self, queries: Sequence[str], documents: Sequence[str], k: int) -> tuple[list[dict[int, float]], int]:
        """For each query {document index: score} of the `k` best; and the number of documents that were truncated."""

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray | None:
        """`(pairs,) float32`, the similarity of each pair; None where the system has no such score."""


def batch_size_for(tokens: int) -> int:
    """The batch size of texts of that length: the power of two that fits `TOKENS_PER_BATCH`, from 1 to `BATCH_SIZE`.

    Example:
        >>> [batch_size_for(tokens) for tokens in (2, 256, 257, 5000, 20000)]
        [32, 32, 16, 1, 1]
    """
    fitting = max(1, TOKENS_PER_BATCH // max(1, tokens))
    return min(BATCH_SIZE, 1 << (fitting.bit_length() - 1))


def top_k(queries: np.ndarray, documents: np.ndarray, k: int) -> list[dict[int, float]]:
    """Exact search by inner product, blockwise over the queries.

    Args:
        queries: `(queries, hidden) float32`.
        documents: `(documents, hidden) float32`.
        k: Documents for each query at most.

    Returns:
        For each query {document index: score}, `min(k, documents)` entries.
    """
    k = min(k, len(documents))
    runs = []
    for start in range(0, len(queries), QUERY_BLOCK):
        scores = queries[start : start + QUERY_BLOCK] @ documents.T  # (block, documents)
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]  # (block, k)
        for row, indices in zip(scores, best, strict=True):
            runs.append(dict(zip(indices.tolist(), row[indices].tolist(), strict=True)))
    return runs


class EmbeddingModel:
    """A sentence-transformers model with cosine similarity.

    Args:
        name: Its name in the results.
        model: The model.
        max_length: Tokens a text is cut at; None keeps the model's own limit.
    """

    def __init__(self, name: str, model: SentenceTransformer, *, max_length: int | None = None):
        self.name, self.model = name, model
        if max_length is not None:
            model.max_seq_length = max_length

    @property
    def settings(self) -> dict[str, object]:
        """Limit in tokens, dtype, embedding size, and a hash of the weights so that a retrained model is scored anew."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        return {
            "kind": "embedding",
            "similarity": "cosine",
            "max_length": self.model.max_seq_length,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "dimensions": self.model.get_embedding_dimension(),
            "weights_sha256": digest.hexdigest(),
        }

    def rank(self, queries: Sequence[str], documents: Sequence[str], k: int) -> tuple[list[dict[int, float]], int]:
        """See `System.rank`; queries and documents get the model's own prompts, where it has any."""
        query_vectors, _ = self.embed(queries, self.model.encode_query)
        document_vectors, truncated = self.embed(documents, self.model.encode_document)
        return top_k(query_vectors, document_vectors, k), truncated

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """Cosine of each pair, `(pairs,) float32`."""
        vectors, _ = self.embed([*first, *second], self.model.encode)
        return (vectors[: len(first)] * vectors[len(first) :]).sum(axis=1)

    def embed(self, texts: Sequence[str], encode: Callable) -> tuple[np.ndarray, int]:
        """Embeds texts in batches of texts of similar length.

        Args:
            texts: Empty ones included.
            encode: `encode`, `encode_query` or `encode_document` of the model.

        Returns:
            `(texts, hidden) float32` of length 1, and the number of texts that were truncated.

        Raises:
            ValueError: A vector with NaN or infinity.
        """
        lengths = self._token_lengths(texts)
        limit = self.model.max_seq_length or max(lengths)
        groups = defaultdict(list)
        for index, length in enumerate(lengths):
            groups[batch_size_for(min(length, limit))].append(index)
        vectors = np.empty((len(texts), self.model.get_embedding_dimension()), dtype=np.float32)
        for batch_size, indices in sorted(groups.items()):
            vectors[indices] = encode(
                [texts[index] for index in indices],
                batch_size=batch_size,
                normalize_embeddings=True,
                show_progress_bar=sys.stderr.isatty(),
            )
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            text = texts[int(np.argmin(finite))]
            raise ValueError(f"{self.name}: {(~finite).sum()} vectors are not finite, the first is that of {text[:80]!r}.")
        return vectors, sum(length > limit for length in lengths)

    def _token_lengths(self, texts: Sequence[str], chunk: int = 256) -> list[int]:
        lengths: list[int] = []
        for start in range(0, len(texts), chunk):
            ids = self.model.tokenizer(list(texts[start : start + chunk]), truncation=False, verbose=False)["input_ids"]
            lengths.extend(map(len, ids))
        return lengths


def load_system(name: str, *, max_length: int | None = None, baseline: bool = False) -> System:
    """A model or baseline by name.

    Args:
        name: "bm25", "all-MiniLM-L6-v2", a folder or a Hub repository.
        max_length: Tokens a text is cut at; a baseline keeps its own limit where that is lower.
        baseline: Whether it is one.

    Raises:
        EvaluationError: It cannot be loaded, or has no positions for `max_length` tokens.
        ImportError: It needs a package that is not installed.
    """
    if name == BM25.name:
        return BM25()
    if name == MINILM:
        model = load_minilm()
    else:
        folder = Path(name)
        if not folder.is_dir() and (folder.is_absolute() or folder.parent.is_dir() and folder.parent != Path()):
            raise EvaluationError(f"model {name}: no such folder.")
        try:
            model = SentenceTransformer(name, trust_remote_code=True, device="cpu")
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise EvaluationError(f"model {name}: cannot be loaded ({reason}).") from error
    if max_length is not None:
        if baseline:
            max_length = min(max_length, model.max_seq_length or max_length)
        tables = [p.shape[0] for key, p in model.named_parameters() if key.endswith("position_embeddings.weight")]
        if tables and max_length > min(tables):
            raise EvaluationError(f"--max-length {max_length}: {name} has {min(tables)} positions.")
    return EmbeddingModel(name, model, max_length=max_length)


def retrieval_scores(runs: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]]) -> dict[str, float]:
    """Means over the judged queries of trec_eval's measures; a query without a retrieved document counts 0.

    Args:
        runs: Query id -> {document id: score}.
        qrels: Query id -> {document id: relevance}; relevant from 1 on.

    Returns:
        The retrieval measures, 0 to 1.
    """
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{CUTOFF}", f"recall.{CUTOFF}", "recip_rank"})
    queries = evaluator.evaluate({query: runs.get(query, {}) for query in qrels}).values()
    # trec_eval has no cut-off for the reciprocal rank: one below 1 / CUTOFF lies behind the cut.
    reciprocal = [query["recip_rank"] if query["recip_rank"] >= 1 / CUTOFF else 0.0 for query in queries]
    return {
        f"ndcg_at_{CUTOFF}": float(np.mean([query[f"ndcg_cut_{CUTOFF}"] for query in queries])),
        f"mrr_at_{CUTOFF}": float(np.mean(reciprocal)),
        f"recall_at_{CUTOFF}": float(np.mean([query[f"recall_{CUTOFF}"] for query in queries])),
    }


def score(system: System, dataset: RetrievalSet | PairSet) -> dict[str, Any]:
    """Scores of one system on one set, with the sizes of the set; `spearman` is None where it is undefined."""
    if isinstance(dataset, PairSet):
        similarity = system.similarity(dataset.first, dataset.second)
        if similarity is not None and (np.ptp(similarity) == 0 or np.ptp(dataset.scores) == 0):
            logger.warning("%s on %s: all similarities are equal, no correlation.", system.name, dataset.name)
            similarity = None
        spearman = None if similarity is None else float(spearmanr(similarity, dataset.scores).statistic)
        return {"metrics": {"spearman": spearman}, "sizes": dataset.sizes}
    document_ids = list(dataset.documents)
    found, truncated = system.rank(list(dataset.queries.values()), list(dataset.documents.values()), RETRIEVED)
    runs = {
        query: {document_ids[index]: value for index, value in run.items()}
        for query, run in zip(dataset.queries, found, strict=True)
    }
    sizes = {**dataset.sizes, "truncated_documents": truncated}
    return {"metrics": retrieval_scores(runs, dataset.qrels), "sizes": sizes}
