"""Which candidates become negatives: by quota and rank, by what another ranking says, at random."""

from collections import Counter

import numpy as np

from training.negative_filters import (
    Candidates,
    Reason,
    chosen,
    drawn,
    remove_by_rank,
    remove_known,
    remove_repeated,
    remove_unread,
)


def test_quotas_come_first_and_the_rest_goes_by_rank():
    candidates = Candidates(np.arange(10)[None], widths=[5, 5])
    candidates.ranks[:] = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    candidates.reasons[0, [0, 6]] = 7
    assert chosen(candidates, 0, wanted=4, quotas=[0, 0]).tolist() == [5, 1, 2, 7]
    assert chosen(candidates, 0, wanted=4, quotas=[3, 1]).tolist() == [5, 1, 2, 3]
    assert chosen(candidates, 0, wanted=4, quotas=[0, 4]).tolist() == [5, 7, 8, 9]
    assert chosen(candidates, 0, wanted=20, quotas=[9, 9]).tolist() == [5, 1, 2, 7, 3, 8, 4, 9]
    remove_unread(candidates, 3)
    assert np.flatnonzero(candidates.left()[0]).tolist() == [1, 2, 5]


def test_what_one_retriever_skips_is_not_taken_from_another():
    candidates = Candidates(np.array([[3, 4, 5, 6, 4, 3], [9, 8, 7, 8, 6, -1]]), widths=[3, 3])
    remove_known(candidates, [np.array([4]), np.empty(0, np.int64)], np.array([-1, 7]))
    remove_by_rank(candidates, skip=1, depth=2)
    remove_repeated(candidates)
    names = [[Reason(reason).name for reason in row] for row in candidates.reasons]
    assert names[0] == ["SKIPPED", "POSITIVE", "LEFT", "SKIPPED", "POSITIVE", "SKIPPED"]
    assert names[1] == ["SKIPPED", "SKIPPED", "QUERY", "SKIPPED", "LEFT", "NOTHING"]
    assert candidates.ranks.tolist() == [[1, 0, 2, 1, 0, 2], [1, 2, 0, 1, 2, 0]]


def test_random_passages_avoid_what_is_excluded():
    generator, pool = np.random.default_rng(0), np.arange(10) * 3
    assert sorted(drawn(pool, {0, 3, 28}, 20, generator)) == [6, 9, 12, 15, 18, 21, 24, 27]
    counts = Counter(passage for _ in range(500) for passage in drawn(pool, {0}, 3, generator))
    assert set(counts) == set(pool.tolist()) - {0}
    assert min(counts.values()) > 100
