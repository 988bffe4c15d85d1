"""Which of the candidates that retrievers found may be negatives, and which of them become negatives.

Law: every candidate has exactly one reason, the first filter that removed it, or `LEFT`; the counts of all reasons sum
to what was retrieved. Filters are pure functions on arrays; candidates of a row stand side by side, the ranking of the
first retriever, then that of the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np


class Reason(IntEnum):
    """What became of a candidate."""

    LEFT = 0
    NOTHING = 1  # no candidate: the retriever found fewer
    POSITIVE = 2  # a known positive of the query
    QUERY = 3  # the text of the query itself
    SKIPPED = 4  # among the best `skip` of a retriever
    DEEPER = 5  # beyond rank `depth`
    REPEATED = 6  # another retriever ranks it better
    TEACHER = 7
    UNREAD = 8  # beyond what the cross-encoder reads
    CROSS_ENCODER = 9


@dataclass
class Candidates:
    """What was found for some rows.

    Attributes:
        ids: `(rows, width) int64`, numbers of passages, -1 where there is none.
        widths: Columns of each retriever, in order; they sum to `width`.
        reasons: `(rows, width) uint8`, values of `Reason`.
        ranks: `(rows, width) int32`, from 1, in the ranking of its retriever without known positives; 0 for those.
        scores: `(rows, width) float32`, the last judge's, NaN where it judged nothing.
        positive_scores: `(rows,) float32`, the last judge's of the rows' positives.
    """

    ids: np.ndarray
    widths: Sequence[int]
    reasons: np.ndarray = field(init=False)
    ranks: np.ndarray = field(init=False)
    scores: np.ndarray = field(init=False)
    positive_scores: np.ndarray = field(init=False)

    def __post_init__(self):
        self.reasons = np.where(self.ids < 0, Reason.NOTHING, Reason.LEFT).astype(np.uint8)
        self.ranks = np.zeros(self.ids.shape, np.int32)
        self.scores = np.full(self.ids.shape, np.nan, np.float32)
        self.positive_scores = np.full(len(self.ids), np.nan, np.float32)

    @property
    def retriever(self) -> np.ndarray:
        """`(width,)`, the retriever of each column."""
        return np.repeat(np.arange(len(self.widths)), self.widths)

    def remove(self, mask: np.ndarray, reason: Reason):
        """Gives a reason to the candidates of a mask `(rows, width) bool` that have none yet."""
        self.reasons[mask & (self.reasons == Reason.LEFT)] = reason

    def left(self) -> np.ndarray:
        """`(rows, width) bool`."""
        return self.reasons == Reason.LEFT


def remove_known(candidates: Candidates, known: Sequence[np.ndarray], same_text: np.ndarray):
    """Known positives of the queries, and passages with the text of the query.

    Args:
        candidates: What was found.
        known: Of each row, the passages that are positives of its query.
        same_text: `(rows,)`, the passage with the query's text, -1 where there is none.
    """
    rows = np.repeat(np.arange(len(known)), [len(passages) for passages in known])
    candidates.remove(_among(candidates.ids, rows, np.concatenate([np.empty(0, np.int64), *known])), Reason.POSITIVE)
    candidates.remove(candidates.ids == same_text[:, None], Reason.QUERY)


def _among(ids: np.ndarray, rows: np.ndarray, passages: np.ndarray) -> np.ndarray:
    """Which of `ids (rows, width)` are one of the passages given for their row: pairs of `rows` and `passages`."""
    span = max(int(ids.max(initial=0)), int(passages.max(initial=0))) + 1
    return np.isin(np.arange(len(ids))[:, None] * span + ids, rows * span + passages) & (ids >= 0)


def remove_by_rank(candidates: Candidates, *, skip: int, depth: int):
    """Ranks what known positives leave; removes those beyond rank `depth`, and the best `skip` of any retriever.

    >>> candidates = Candidates(np.array([[4, 8, 6, 5]]), widths=[4])
    >>> remove_known(candidates, [np.array([8])], np.array([-1]))
    >>> remove_by_rank(candidates, skip=1, depth=2)
    >>> candidates.ranks, [Reason(reason).name for reason in candidates.reasons[0]]
    (array([[1, 0, 2, 3]], dtype=int32), ['SKIPPED', 'POSITIVE', 'LEFT', 'DEEPER'])
    """
    left, start = candidates.left(), 0
    for width in candidates.widths:
        columns = slice(start, start + width)
        candidates.ranks[:, columns] = np.cumsum(left[:, columns], axis=1) * left[:, columns]
        start += width
    rows, columns = np.nonzero(left & (candidates.ranks <= skip))
    candidates.remove(_among(candidates.ids, rows, candidates.ids[rows, columns]), Reason.SKIPPED)
    candidates.remove(candidates.ranks > depth, Reason.DEEPER)


def remove_repeated(candidates: Candidates):
    """Of a passage that several retrievers found, the best rank stays; among equal ranks the first retriever's.

    >>> candidates = Candidates(np.array([[4, 8, 9, 4]]), widths=[2, 2])
    >>> candidates.ranks[:] = [2, 1, 2, 1]
    >>> remove_repeated(candidates)
    >>> candidates.left()
    array([[False,  True,  True,  True]])
    """
    ids = np.where(candidates.left(), candidates.ids, -1)
    order = np.lexsort((candidates.ranks, ids), axis=1)  # stable: among equals by column
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    repeated = np.zeros(ids.shape, bool)
    np.put_along_axis(repeated, order, again, axis=1)
    candidates.remove(repeated, Reason.REPEATED)


def remove_unread(candidates: Candidates, most: int):
    """Of what is left, all but the `most` best ranks of a row; among equal ranks the first retriever is the better."""
    ranks = np.where(candidates.left(), candidates.ranks, np.iinfo(np.int32).max)
    place = np.argsort(np.argsort(ranks, axis=1, kind="stable"), axis=1)
    candidates.remove(place >= most, Reason.UNREAD)


def too_relevant(
    scores: np.ndarray, positive_scores: np.ndarray, *, margin: float | None, relative_margin: float | None
) -> np.ndarray:
    """Which candidates a judge finds too close to the positive, or closer to the query than it.

    Args:
        scores: `(rows, width) float32`, r(q, n); NaN is never too relevant.
        positive_scores: `(rows,) float32`, r(q, p).
        margin: Kept are those with r(q, p) - r(q, n) > margin (JE1).
        relative_margin: Kept are those with r(q, n) <= r(q, p) - relative_margin * |r(q, p)|. The sign of r(q, p) does
            not turn the rule around (sentence-transformers #3819).

    Returns:
        `(rows, width) bool`.

    >>> too_relevant(np.array([[0.9, 0.5, 0.49]]), np.array([0.7]), margin=0.2, relative_margin=None)
    array([[ True,  True, False]])
    """
    positives = positive_scores[:, None].astype(np.float64)
    removed = np.zeros(scores.shape, bool)
    if margin is not None:
        removed |= positives - scores <= margin
    if relative_margin is not None:
        removed |= scores > positives - relative_margin * np.abs(positives)
    return removed


def chosen(
    candidates: Candidates,
    row: int,
    *,
    wanted: int,
    quotas: Sequence[int],
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """The columns of the candidates that become negatives of a row.

    Args:
        candidates: After all filters.
        row: Which row.
        wanted: Negatives at most.
        quotas: Of each retriever, how many are taken from it first; the rest goes by rank over all retrievers.
        generator: Draws from what is left; None takes the best ranks.

    Returns:
        `(negatives,) int64`, best rank first, at most `wanted`.
    """
    left = np.flatnonzero(candidates.left()[row])
    retriever, ranks = candidates.retriever[left], candidates.ranks[row, left]
    order = np.lexsort((retriever, ranks)) if generator is None else generator.permutation(len(left))
    first = [order[retriever[order] == number][:quota] for number, quota in enumerate(quotas)]
    taken = np.concatenate([np.empty(0, np.int64), *first])
    rest = order[~np.isin(order, taken)][: wanted - len(taken)]
    picked = np.concatenate([taken, rest])
    return left[picked[np.lexsort((retriever[picked], ranks[picked]))]]


def drawn(pool: np.ndarray, excluded: set[int], wanted: int, generator: np.random.Generator) -> list[int]:
    """Random passages of a pool of different ones, none of them excluded; fewer where the pool has no more."""
    size = min(len(pool), wanted + len(excluded))
    passages = pool[generator.choice(len(pool), size=size, replace=False)].tolist()
    return [passage for passage in passages if passage not in excluded][:wanted]
