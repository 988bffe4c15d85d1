"""Laws of intervals and tests: a weight of 2 is the item twice; 95 % intervals hold the truth about 95 % of the time;
p-values of equal systems are uniform, and small for systems that differ; the command compares like with like only.
"""

import json

import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr, spearmanr, wilcoxon

from evaluation import significance
from evaluation.compare import adjust, compare, main, read_models
from evaluation.local import evaluate
from evaluation.metrics import TASK_MEASURES, scores, statistic
from evaluation.records import samples_path
from evaluation.scoring import Protocol
from evaluation.sets import PairSet
from evaluation.significance import (
    bounds,
    differences,
    holm,
    intervals,
    permutation_p,
    resampled_scores,
    resampled_weights,
)


def make_samples(task: str, *, count: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """Samples with ties, groups of two queries, and three runs."""
    generator = np.random.default_rng(seed)
    if task == "retrieval":
        values = {name: generator.integers(0, 4, count) / 3 for name in TASK_MEASURES[task]}
        return values | {"group": (np.arange(count) // 2).astype(np.int32)}
    gold = generator.integers(0, 4, count)
    if task == "similarity":
        noise = generator.normal(size=count)
        return {"similarity": np.round(gold + noise, 1).astype(np.float32), "gold": gold.astype(np.float32)}
    if task == "pair-classification":
        similarity = np.round(gold % 2 + generator.normal(size=count), 1).astype(np.float32)
        return {"similarity": similarity, "gold": (gold % 2).astype(np.uint8)}
    assigned = np.where(generator.random((3, count)) < 0.6, gold, generator.integers(0, 4, (3, count)))
    return {"assigned": assigned.astype(np.uint16), "gold": gold.astype(np.uint16)}


def repeated(samples, weights, run_weights):
    """The samples with every item and run as often as its weight says."""
    rows, runs = (np.repeat(np.arange(len(x)), x.astype(int)) for x in (weights, run_weights))
    return {name: x[runs][:, rows] if x.ndim == 2 else x[rows] for name, x in samples.items()}


@pytest.mark.parametrize("task", list(TASK_MEASURES))
def test_weights_are_repetitions(task):
    samples = make_samples(task)
    blocks = list(resampled_weights(samples))
    weights, run_weights = blocks[0]
    found = statistic(task, samples)(weights[:5], run_weights[:5])
    for i in range(5):
        expected = scores(task, repeated(samples, weights[i], run_weights[i]))
        assert {name: values[i] for name, values in found.items()} == pytest.approx(expected, rel=1e-9)
    assert sum(len(x) for x, _ in blocks) == significance.RESAMPLES
    assert len({tuple(row) for row in weights[:5]}) == 5
    if task == "retrieval":  # the queries of a document come and go together
        np.testing.assert_array_equal(weights[:, ::2], weights[:, 1::2])


def test_correlations_are_scipys():
    samples = make_samples("similarity")
    found = scores("similarity", samples)
    assert found["spearman"] == pytest.approx(spearmanr(samples["similarity"], samples["gold"]).statistic, rel=1e-12)
    assert found["pearson"] == pytest.approx(pearsonr(samples["similarity"], samples["gold"]).statistic, rel=1e-6)


def test_blocks_do_not_matter(monkeypatch):
    samples = make_samples("clustering")
    whole = resampled_scores("clustering", samples)["v_measure"]
    assert len(whole) == significance.RESAMPLES
    monkeypatch.setattr(significance, "BLOCK", 40 * 333)  # 2000 = 6 * 333 + 2
    parts = resampled_scores("clustering", samples)["v_measure"]
    assert len(parts) == significance.RESAMPLES
    assert parts.std() == pytest.approx(whole.std(), rel=0.1)
    assert np.isfinite(parts).all()


def test_intervals_hold_the_truth(monkeypatch):
    monkeypatch.setattr(significance, "RESAMPLES", 300)
    generator, truth, held, trials = np.random.default_rng(0), 0.6, 0, 200
    for _ in range(trials):
        x, noise = generator.normal(size=(2, 80))
        samples = {"similarity": truth * x + np.sqrt(1 - truth**2) * noise, "gold": x}
        low, high = intervals("similarity", samples)["pearson"]
        held += low <= truth <= high
    assert binomtest(held, trials, 0.94).pvalue > 0.01  # a bootstrap of 80 pairs is a little too narrow


def test_an_interval_ends_where_its_measure_does():
    found = np.ones(40)
    found[:2] = 0.5
    samples = {name: found for name in TASK_MEASURES["retrieval"]} | {"group": np.arange(40)}
    drawn = resampled_scores("retrieval", samples)["ndcg_at_10"]
    low, high = np.percentile(drawn - drawn.mean() + found.mean(), [2.5, 97.5])
    assert high > 1  # control: without the cut it would not
    assert intervals("retrieval", samples)["ndcg_at_10"] == (pytest.approx(low), 1.0)
    nothing = dict.fromkeys(TASK_MEASURES["retrieval"], np.zeros(40)) | {"group": np.arange(40)}
    assert differences("retrieval", samples, nothing)["ndcg_at_10"].interval[0] == -1.0
    gold = np.arange(40) % 2
    clusters = {"gold": gold, "assigned": np.random.default_rng(1).integers(2, size=(1, 40))}
    assert intervals("clustering", clusters)["v_measure"][0] == 0.0
    assert bounds("spearman") == (-1.0, 1.0)


def test_the_interval_of_a_v_measure_is_around_it():
    samples = make_samples("clustering", count=300)
    score = scores("clustering", samples)["v_measure"]
    resampled = resampled_scores("clustering", samples)["v_measure"]
    assert resampled.mean() > score + 0.2 * resampled.std()  # why the percentiles are moved
    low, high = intervals("clustering", samples)["v_measure"]
    assert (low + high) / 2 == pytest.approx(score, abs=0.1 * resampled.std())
    assert high - low == pytest.approx(2 * 1.96 * resampled.std(), rel=0.15)


def test_runs_are_resampled_too():
    """Experiments that agree on no text but have unlike accuracies: the interval must show it."""
    gold = np.zeros(2000, dtype=np.uint16)
    good, bad = np.zeros(2000, dtype=np.uint16), np.ones(2000, dtype=np.uint16)
    samples = {"assigned": np.stack([good, bad, good, bad]), "gold": gold}
    low, high = intervals("classification", samples)["accuracy"]
    assert high - low > 0.5


def test_the_permutation_test_by_hand_and_beside_wilcoxon():
    # Three groups with sums 2, 1, 1 over signs: |sum| >= 4 in 2 of 8 cases.
    p = permutation_p(np.array([1.0, 1.0, 1.0, 1.0]), np.array([0, 0, 1, 2]))
    assert p == pytest.approx(0.25, abs=0.02)
    generator = np.random.default_rng(0)
    values = generator.normal(0.3, 1.0, 60)
    assert permutation_p(values, np.arange(60)) == pytest.approx(wilcoxon(values).pvalue, abs=0.02)
    # Groups: 30 documents with two queries that always agree hold half of the evidence.
    twice = np.repeat(values[:30], 2)
    alone = permutation_p(twice, np.arange(60))
    together = permutation_p(twice, np.repeat(np.arange(30), 2))
    assert together == pytest.approx(permutation_p(values[:30], np.arange(30)), abs=0.02)
    assert alone < together


@pytest.mark.parametrize("task", list(TASK_MEASURES))
def test_a_system_does_not_differ_from_itself(task):
    samples = make_samples(task)
    for difference in differences(task, samples, samples).values():
        assert (difference.value, difference.p) == (0.0, 1.0)
        assert difference.interval == (0.0, 0.0)


def test_p_values_of_equal_systems_are_uniform_and_of_others_small(monkeypatch):
    monkeypatch.setattr(significance, "RESAMPLES", 200)
    monkeypatch.setattr(significance, "PERMUTATIONS", 200)
    generator, found, trials = np.random.default_rng(0), [], 150
    for _ in range(trials):
        gold = generator.normal(size=60)
        first, second = ({"similarity": gold + generator.normal(size=60), "gold": gold} for _ in range(2))
        found.append(differences("similarity", first, second)["spearman"].p)
    assert binomtest(sum(p <= 0.1 for p in found), trials, 0.1).pvalue > 0.01
    better = {"similarity": gold + 0.3 * generator.normal(size=60), "gold": gold}
    difference = differences("similarity", first, better)["spearman"]
    assert difference.p < 0.01
    assert 0 < difference.interval[0] < difference.value < difference.interval[1]
    assert differences("similarity", better, first)["spearman"].value == -difference.value


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# The command


class Cosines:
    """A system with its own similarity of each pair."""

    def __init__(self, name, similarity):
        self.name, self.settings, self._similarity = name, {"kind": "test", "max_length": 8}, similarity
        self.placed = {}

    def similarity(self, first, second):
        return self._similarity[: len(first)].astype(np.float32)


@pytest.fixture
def results(tmp_path):
    """a.json and b.json: b is better on STS-same, of other texts on STS-other, and STS-noise is the same noise."""
    generator = np.random.default_rng(0)
    gold = generator.normal(size=120)
    noise = generator.normal(size=(2, 120))

    def pairs(name, count=120):
        return PairSet(name, [str(i) for i in range(count)], ["x"] * count, gold[:count].tolist())

    for name, similarity in (("a", gold + 2 * noise[0]), ("b", gold + 0.2 * noise[1])):
        output = tmp_path / f"{name}.json"
        sets = [pairs("STS-same"), pairs("STS-other", 100 if name == "a" else 90)]
        evaluate([Cosines(name, similarity)], sets, output, command=f"command of {name}", protocol=Protocol())
        evaluate([Cosines(name, noise[0])], [pairs("STS-noise")], output, command="noise", protocol=Protocol())
    return tmp_path


def test_like_is_compared_with_like(results, caplog):
    (a,), (b,) = (read_models(results / f"{name}.json") for name in "ab")
    found = adjust(compare(a, b))
    assert [x["set"] for x in found] == ["STS-same", "STS-noise"]
    assert "b (8 tokens) has no score of the same texts on STS-other: not compared." in caplog.text
    same, noise = found
    assert same["verdict"] == "better"
    assert same["difference"] == pytest.approx(same["scores"][1] - same["scores"][0])
    assert same["p_adjusted"] == pytest.approx(2 * same["p"])
    assert (noise["verdict"], noise["difference"]) == ("no difference shown", 0.0)
    assert [x["verdict"] for x in adjust(compare(b, a))] == ["worse", "no difference shown"]
    both = compare(a, b, measures=["spearman", "pearson"])
    assert [x["measure"] for x in both] == ["spearman", "pearson"] * 2


def test_the_command_writes_differences_and_a_table(results, capsys):
    main([str(results / "a.json"), str(results / "b.json"), "--output", str(results / "d.json"), "--markdown",
          str(results / "t.md")])  # fmt: skip
    assert "better" in capsys.readouterr().out
    records = json.loads((results / "d.json").read_text())["records"]
    assert [x["verdict"] for x in records] == ["better", "no difference shown"]
    text = (results / "t.md").read_text()
    assert "| set | queries x documents | measure | a (8 tokens) | b (8 tokens) |" in text
    assert sum(line.endswith("▲ |") for line in text.splitlines()) == 1
    assert "    command of a\n" in text
    assert "    command of b\n" in text


def test_two_models_of_one_name_are_told_apart(results):
    (results / "c.json").write_text((results / "b.json").read_text().replace('"model": "b"', '"model": "a"'))
    samples_path(results / "c.json").write_bytes(samples_path(results / "b.json").read_bytes())
    main([str(results / "a.json"), str(results / "c.json"), "--output", str(results / "d.json")])
    models = json.loads((results / "d.json").read_text())["records"][0]["models"]
    assert models == [f"a (8 tokens) {results}/a.json", f"a (8 tokens) {results}/c.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/a.json"], "one model only"),
        (["{tmp}/a.json", "{tmp}/none.json"], "{tmp}/none.json: no such file."),
        (["{tmp}/a.json", "{tmp}/b.json", "--models", "c"], "{tmp}/a.json: no results of c."),
        (["{tmp}/a.json", "{tmp}/b.json", "--measures", "beauty"], "--measures beauty: is none of"),
        (["{tmp}/a.json", "{tmp}/old.json"], "{tmp}/old.json: no record has samples in {tmp}/old.npz"),
        (["{tmp}/a.json", "{tmp}/b.json", "--output", "{tmp}"], "{tmp}: is a folder"),
        (["{tmp}/a.json", "{tmp}/b.json", "--measures", "ap"], "the models have no set"),
    ],
)
def test_wrong_arguments_end_with_one_line(results, capsys, arguments, message):
    (results / "old.json").write_text((results / "b.json").read_text())
    with pytest.raises(SystemExit) as exit_info:
        main([argument.format(tmp=results) for argument in arguments])
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message.format(tmp=results) in lines[0]
