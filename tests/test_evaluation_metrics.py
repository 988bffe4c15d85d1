"""Laws of the measures: they are those computed by hand; what cannot be measured is None, not a number."""

import math

import numpy as np
import pytest
from toy_evaluation import HandMade, written_sets  # noqa: F401  pytest finds the fixtures by name

from evaluation.metrics import MEASURES, TASK_MEASURES, retrieval_scores
from evaluation.scoring import Protocol, score
from evaluation.sets import PairSet, RetrievalSet, load_set
from evaluation.systems import BM25

DEFAULT = Protocol()


def test_measures_equal_those_computed_by_hand():
    dataset = RetrievalSet(
        "ir/Hand",
        queries={"q1": "east", "q2": "north"},
        documents={"d1": "a", "d2": "b", "d3": "c", "d4": "d"},
        qrels={"q1": {"d2": 2, "d4": 1}, "q2": {"d1": 1}},
    )
    # q1 scores d1 .9, d2 .8, d3 .1, d4 -.5: d2 is 2nd, d4 is 4th. q2 scores d4 .9, d3 .7, d1 .6, d2 .5: d1 is 3rd.
    vectors = {"east": [1, 0], "north": [0, 1], "a": [0.9, 0.6], "b": [0.8, 0.5], "c": [0.1, 0.7], "d": [-0.5, 0.9]}
    result = score(HandMade(vectors), dataset, DEFAULT)
    first = (2 / math.log2(3) + 1 / math.log2(5)) / (2 + 1 / math.log2(3))
    second = 1 / math.log2(4)
    assert result.metrics == pytest.approx(
        {
            "ndcg_at_10": (first + second) / 2,
            "mrr_at_10": (1 / 2 + 1 / 3) / 2,
            "map_at_10": ((1 / 2 + 2 / 4) / 2 + 1 / 3) / 2,
            "recall_at_10": 1.0,
            "recall_at_100": 1.0,
        },
        rel=1e-12,
    )
    assert result.sizes == {"queries": 2, "documents": 4, "truncated_documents": 0}
    np.testing.assert_allclose(result.samples["ndcg_at_10"], [first, second], rtol=1e-12)
    assert result.samples["group"].tolist() == [1, 0]  # d2 answers q1 best, d1 answers q2


def test_measures_stop_at_rank_10():
    eleven = {f"d{i}": 1.0 - i / 100 for i in range(1, 12)}
    assert retrieval_scores({"q": eleven}, {"q": {"d10": 1}})["mrr_at_10"] == pytest.approx(0.1)
    scores = retrieval_scores({"q": eleven}, {"q": {"d11": 1}})
    assert scores == dict.fromkeys(TASK_MEASURES["retrieval"][:4], 0.0) | {"recall_at_100": 1.0}


def test_a_query_without_results_counts_0():
    scores = retrieval_scores({"q1": {"d": 1.0}, "q2": {}}, {"q1": {"d": 1}, "q2": {"d": 1}, "q3": {"d": 1}})
    assert scores["recall_at_10"] == pytest.approx(1 / 3)


def test_correlations_equal_those_computed_by_hand():
    pairs = PairSet("STSB", first=["a", "b", "c", "d"], second=["x"] * 4, scores=[0.0, 1.0, 2.0, 5.0])
    # Ranks 1 3 2 4 against 1 2 3 4: 1 - 6 * (1 + 1) / (4 * (16 - 1)).
    vectors = {"a": [0.1, 0], "b": [0.5, 0], "c": [0.3, 0], "d": [0.9, 0], "x": [1, 0]}
    found = score(HandMade(vectors), pairs, DEFAULT).metrics
    assert found["spearman"] == pytest.approx(0.8)
    # Deviations -.35 .05 -.15 .45 and -2 -1 0 3: 2 / sqrt(.35 * 14).
    assert found["pearson"] == pytest.approx(2 / math.sqrt(0.35 * 14))
    equal = score(HandMade({text: [1, 0] for text in "abcdx"}), pairs, DEFAULT)
    assert equal.metrics == score(BM25(), pairs, DEFAULT).metrics == {"spearman": None, "pearson": None}
    assert equal.samples is None


def test_bm25_on_the_toy_set(data):
    result = score(BM25(), load_set(data, "ir/Toy"), DEFAULT)
    assert result.metrics == pytest.approx(dict.fromkeys(TASK_MEASURES["retrieval"], 2 / 3))
    runs, _ = BM25().rank(["salt", "", "the"], ["", "bread and salt"], k=100)
    assert [set(run) for run in runs] == [{1}, set(), set()]
    assert BM25().rank(["salt"], ["", ""], k=100)[0] == [{}]


def test_bm25_of_two_sentences_is_what_they_share():
    first = ["the cat sat", "a dog", "", "salt and bread", "salt and bread"]
    second = ["a cat ran", "one bird", "bread", "bread and salt", "bread and wine"]
    found = BM25().similarity(first, second)
    assert found[[1, 2]].tolist() == [0, 0]
    assert found[3] == pytest.approx(1)
    assert 0 < found[0] < 1
    assert 0 < found[4] < 1
    np.testing.assert_allclose(BM25().similarity(second, first), found, rtol=1e-6)
    assert BM25().similarity(["", "the"], ["a", ""]).tolist() == [0, 0]


def test_the_measures_have_labels():
    assert set(retrieval_scores({}, {"q": {"d": 1}})) == set(TASK_MEASURES["retrieval"])
    assert {name for names in TASK_MEASURES.values() for name in names} == set(MEASURES)
