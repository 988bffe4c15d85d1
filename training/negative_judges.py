"""Judges of candidates: a teacher's cosine, a cross-encoder's score, behind one method.

COST: the teacher embeds the passages that are a candidate or a positive of some row, once, to disk; scoring holds
`_PAIRS` pairs of vectors. The cross-encoder reads every pair that it is asked about: it is the slow part of a run.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .embedding_shards import Vectors
from .mining_recipe import CrossEncoderJudge
from .mining_search import Found
from .mining_texts import Texts
from .recipe import RecipeError

_PAIRS = 8192


class Judge(Protocol):
    """What says how relevant a passage is to a query."""

    def scores(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """Of each pair of numbers, `(pairs,) float32`; larger is more relevant."""


class TeacherJudge:
    """Cosine of vectors.

    Args:
        queries: Of all queries.
        passages: Of the passages `ids`.
        ids: `(vectors,) int64`, ascending; the numbers of the passages that have a vector.
    """

    def __init__(self, queries: Vectors, passages: Vectors, ids: np.ndarray):
        self._queries, self._passages, self._ids = queries, passages, ids

    def scores(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """See `Judge`."""
        rows = np.searchsorted(self._ids, passages)
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _PAIRS):
            part = slice(start, start + _PAIRS)
            scores[part] = np.einsum("pw,pw->p", _gather(self._queries, queries[part]),
                                     _gather(self._passages, rows[part]))  # fmt: skip
        return scores


def _gather(vectors: Vectors, ids: np.ndarray) -> np.ndarray:
    """`(ids, width) float32`; each vector is read from disk once."""
    different, inverse = np.unique(ids, return_inverse=True)
    return vectors.take(different)[inverse]


class CrossEncoderScores:
    """`CrossEncoder.predict` on the texts.

    Args:
        judge: The recipe's entry.
        queries: All queries.
        passages: All passages.
        batch_size: Pairs read at a time.
        device: None chooses.

    Raises:
        RecipeError: It cannot be loaded, or gives more than one score a pair.
    """

    def __init__(
        self, judge: CrossEncoderJudge, queries: Texts, passages: Texts, *, batch_size: int, device: str | None
    ):
        from sentence_transformers import CrossEncoder

        try:
            self._model = CrossEncoder(judge.model, max_length=judge.max_length, device=device, trust_remote_code=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"cross_encoder {judge.model}: cannot be loaded ({reason}).") from error
        if self._model.num_labels != 1:
            raise RecipeError(f"cross_encoder {judge.model}: it has {self._model.num_labels} labels, not one score.")
        self._queries, self._passages, self._batch_size = queries, passages, batch_size

    def scores(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """See `Judge`."""
        pairs = list(zip(self._queries.take(queries), self._passages.take(passages), strict=True))
        if not pairs:
            return np.empty(0, np.float32)
        return np.asarray(self._model.predict(pairs, batch_size=self._batch_size, show_progress_bar=False), np.float32)


def needed_passages(found: Sequence[Found], passages: int, query: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The passages that are found for some query or are positives, `(needed,) int64` ascending.

    Args:
        found: Of each retriever.
        passages: Their number; a byte each is held.
        query: `(rows,) int64`.
        positive: `(rows,) int64`.
    """
    needed = np.zeros(passages + 1, bool)  # the last one stands for -1
    needed[positive] = True
    for results in found:
        for start in range(0, int(query.max()) + 1, _PAIRS):
            needed[results.take(np.arange(start, min(start + _PAIRS, int(query.max()) + 1)))] = True
    return np.flatnonzero(needed[:-1])
