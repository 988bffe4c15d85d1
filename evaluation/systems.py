"""What is evaluated: embedding models (`SentenceTransformer`) and BM25, behind the three methods of `System`.

Laws: the search is exact; a baseline runs with its published settings; what decides the scores is in `settings`.
COST: a batch holds `TOKENS_PER_BATCH` tokens at most, or one text; a search holds `QUERY_BLOCK` x documents scores.
Vectors are kept, up to `CACHE_BYTES`, since sets share texts: a corpus with several sets of queries is embedded once.
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from .loading import Placement, check_finite, load_sentence_transformer, pipeline_sha256, placed, weights_sha256
from .set_types import EvaluationError

try:
    import bm25s
    from sentence_transformers import SentenceTransformer
except ImportError as error:
    raise ImportError("evaluation.systems needs: pip install -e '.[evaluate]'") from error

logger = logging.getLogger(__name__)

BATCH_SIZE = 32  # texts
CACHE_BYTES = 2**28  # of vectors
TOKENS_PER_BATCH = 8192  # padding included
QUERY_BLOCK = 1024  # queries in one matrix product
_STOPWORDS = "english"  # the list of bm25s


class System(Protocol):
    """What can be evaluated: `EmbeddingModel` or `BM25`."""

    name: str

    @property
    def settings(self) -> dict[str, object]:
        """JSON values; two runs with equal settings have equal scores."""

    @property
    def placed(self) -> dict[str, str | None]:
        """Device and commit, for the records (`evaluation.loading.placed`); empty where there is no model."""

    def rank(self, queries: Sequence[str], documents: Sequence[str], k: int) -> tuple[list[dict[int, float]], int]:
        """For each query {document index: score} of the `k` best; and the number of documents that were truncated."""

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray | None:
        """`(pairs,) float32`, the similarity of each pair; None where the system has no such score."""

    def vectors(self, texts: Sequence[str]) -> tuple[np.ndarray, int] | None:
        """`(texts, hidden) float32` and how many texts were truncated; None where the system has no vectors."""


class BM25:
    """Lexical search by bm25s with the defaults of that library: Lucene's formula, English stop words, no stemming."""

    name = "bm25"

    @property
    def settings(self) -> dict[str, object]:
        """The formula and its constants; the tokenizer lower-cases and keeps words of two characters or more."""
        index = bm25s.BM25()
        return {
            "kind": "bm25",
            "method": index.method,
            "k1": index.k1,
            "b": index.b,
            "stopwords": _STOPWORDS,
            "stemmer": None,
            "similarity": "of two sentences, by the scores of each for itself",
        }

    @property
    def placed(self) -> dict[str, str | None]:
        """Nothing: there is no model."""
        return {}

    def rank(self, queries: Sequence[str], documents: Sequence[str], k: int) -> tuple[list[dict[int, float]], int]:
        """The documents that share a word with each query, `k` at most.

        Args:
            queries: Texts, empty ones included.
            documents: Texts, empty ones included.
            k: Documents for each query at most.

        Returns:
            For each query {document index: score > 0}; and 0, the number of truncated documents.
        """
        tokens = bm25s.tokenize(list(documents), stopwords=_STOPWORDS, show_progress=False)
        if not any(tokens.ids):  # bm25s cannot index a corpus without a word
            return [{} for _ in queries], 0
        index = bm25s.BM25()
        index.index(tokens, show_progress=False)
        found, scores = index.retrieve(
            bm25s.tokenize(list(queries), stopwords=_STOPWORDS, show_progress=False),
            k=min(k, len(documents)),
            show_progress=False,
            backend_selection="numpy",
        )
        runs = [
            {int(document): float(score) for document, score in zip(*row, strict=True) if score > 0}
            for row in zip(found, scores, strict=True)
        ]
        return runs, 0

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """What two sentences share: the scores of each for the other, over those of each for itself.

        The corpus, for the weights of the words, are the sentences of all pairs.

        Args:
            first: Texts, empty ones included.
            second: The other text of each pair.

        Returns:
            `(pairs,) float32`, from 0 where no word is shared to about 1 for the same words.
        """
        texts = {text: number for number, text in enumerate(dict.fromkeys([*first, *second]))}
        tokens = bm25s.tokenize(list(texts), stopwords=_STOPWORDS, show_progress=False, return_ids=False)
        if not any(tokens):
            return np.zeros(len(first), np.float32)
        index = bm25s.BM25()
        index.index(tokens, show_progress=False)
        pairs = [(texts[a], texts[b]) for a, b in zip(first, second, strict=True)]
        wanted = defaultdict(set)
        for pair in pairs:
            for number in pair:
                wanted[number].update(pair)
        found = {}
        for number, others in wanted.items():
            row = index.get_scores(tokens[number]) if tokens[number] else np.zeros(len(texts))
            found.update({(number, other): float(row[other]) for other in others})
        shared = np.array([found[a, b] + found[b, a] for a, b in pairs])
        own = np.array([found[a, a] + found[b, b] for a, b in pairs])
        return np.divide(shared, own, out=np.zeros_like(own), where=own > 0).astype(np.float32)

    def vectors(self, texts: Sequence[str]) -> None:
        """None: BM25 has no vectors."""


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
        self._pipeline_sha256 = pipeline_sha256(model)
        self._known: dict[tuple[str, int | None, str], tuple[np.ndarray, int]] = {}
        """(Way of encoding, limit in tokens, text) -> vector, untruncated length in tokens."""
        if max_length is not None:
            model.max_seq_length = max_length

    @property
    def settings(self) -> dict[str, object]:
        """Limit in tokens, dtype, size, and hashes of weights and pipeline, by which another model is scored anew."""
        return {
            "kind": "embedding",
            "similarity": "cosine",
            "max_length": self.model.max_seq_length,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "dimensions": self.model.get_embedding_dimension(),
            "weights_sha256": weights_sha256(self.model),
            "pipeline_sha256": self._pipeline_sha256,
        }

    @property
    def placed(self) -> dict[str, str | None]:
        """See `System.placed`."""
        return placed(self.model)

    def rank(self, queries: Sequence[str], documents: Sequence[str], k: int) -> tuple[list[dict[int, float]], int]:
        """See `System.rank`; queries and documents get the model's own prompts, where it has any."""
        query_vectors, _ = self.embed(queries, self.model.encode_query)
        document_vectors, truncated = self.embed(documents, self.model.encode_document)
        return top_k(query_vectors, document_vectors, k), truncated

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """Cosine of each pair, `(pairs,) float32`."""
        vectors, _ = self.embed([*first, *second], self.model.encode)
        return (vectors[: len(first)] * vectors[len(first) :]).sum(axis=1)

    def vectors(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """See `System.vectors`; of length 1."""
        return self.embed(texts, self.model.encode)

    def embed(self, texts: Sequence[str], encode: Callable) -> tuple[np.ndarray, int]:
        """Embeds texts in batches of texts of similar length; those embedded before, with this limit, are not again.

        Args:
            texts: Empty ones included.
            encode: `encode`, `encode_query` or `encode_document` of the model.

        Returns:
            `(texts, hidden) float32` of length 1, and the number of texts that were truncated.

        Raises:
            EvaluationError: A vector with NaN or infinity.
        """
        limit = self.model.max_seq_length
        keys = [(encode.__name__, limit, text) for text in texts]
        if sum(vector.nbytes for vector, _ in self._known.values()) > CACHE_BYTES:
            self._known = {key: self._known[key] for key in keys if key in self._known}
        new = list(dict.fromkeys(key for key in keys if key not in self._known))
        if new:
            found, lengths = self._embed_new([text for *_, text in new], encode)
            self._known.update(zip(new, zip(found, lengths, strict=True), strict=True))
        vectors = np.stack([self._known[key][0] for key in keys])
        if len(set(texts)) > 1 and np.ptp(vectors, axis=0).max() == 0:
            logger.warning("%s: the vectors of %d different texts are all equal.", self.name, len(set(texts)))
        return vectors, sum(limit is not None and self._known[key][1] > limit for key in keys)

    def _embed_new(self, texts: Sequence[str], encode: Callable) -> tuple[np.ndarray, list[int]]:
        """Vectors and untruncated lengths in tokens."""
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
        check_finite(vectors, texts, self.name)
        return vectors, lengths

    def _token_lengths(self, texts: Sequence[str], chunk: int = 256) -> list[int]:
        lengths: list[int] = []
        for start in range(0, len(texts), chunk):
            encoded = self.model.tokenizer(list(texts[start : start + chunk]), truncation=False, verbose=False)
            lengths.extend(map(len, encoded["input_ids"]))
        return lengths


def load_system(
    name: str, *, placement: Placement | None = None, max_length: int | None = None, baseline: bool = False
) -> System:
    """A model or baseline by name.

    Args:
        name: "bm25", "all-MiniLM-L6-v2", a folder or a Hub repository.
        placement: Which weights are loaded, where and how; None is the default one.
        max_length: Tokens a text is cut at; a baseline keeps its own limit where that is lower.
        baseline: Whether it is one.

    Raises:
        EvaluationError: It cannot be loaded, or has no positions for `max_length` tokens.
        ImportError: It needs a package that is not installed.
    """
    if name == BM25.name:
        return BM25()
    placement = placement or Placement()
    model = load_sentence_transformer(name, placement.of_baseline if baseline else placement)
    if max_length is not None:
        if baseline:
            max_length = min(max_length, model.max_seq_length or max_length)
        tables = [p.shape[0] for key, p in model.named_parameters() if key.endswith("position_embeddings.weight")]
        if tables and max_length > min(tables):
            raise EvaluationError(f"--max-length {max_length}: {name} has {min(tables)} positions.")
    return EmbeddingModel(name, model, max_length=max_length)
