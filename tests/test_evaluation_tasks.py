"""Laws of pair classification, clustering and classification: the draws, assignments and scores are those of mteb on
the same vectors; the measures are those of scikit-learn; a malformed set is named.
"""

import json
import types

import numpy as np
import pytest
import zstandard
from sklearn.metrics import average_precision_score, f1_score, v_measure_score

from evaluation.local import evaluate, load_sets, small_first
from evaluation.metrics import scores
from evaluation.scoring import SEED, Protocol, score
from evaluation.sets import EvaluationError, LabelledPairSet, TextSet, available_sets, load_set
from evaluation.systems import BM25

LABELS = ["red", "green", "blue"]
PAIR = {"sentence1": "a", "sentence2": "b"}


class Vectors:
    """A system whose vectors follow from the number in a text: three clouds that overlap."""

    name, settings, placed = "vectors", {"kind": "test"}, {}

    def __init__(self):
        self.embedded: list[list[str]] = []

    def vectors(self, texts):
        self.embedded.append(list(texts))
        return np.stack([self.vector(text) for text in texts]), 0

    def vector(self, text):
        label, number = text.split()
        generator = np.random.default_rng([LABELS.index(label), int(number)])
        vector = np.eye(3, 8)[LABELS.index(label)] + 0.6 * generator.standard_normal(8)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def similarity(self, first, second):
        return (self.vectors(first)[0] * self.vectors(second)[0]).sum(axis=1)


def texts_of(count: int, start: int = 0) -> tuple[list[str], list[str]]:
    labels = [LABELS[(7 * i + i // 5) % 3] for i in range(start, start + count)]
    return [f"{label} {start + i}" for i, label in enumerate(labels)], labels


def text_set(task: str, *, texts: int = 90, examples: int = 0) -> TextSet:
    return TextSet(f"{task}/Toy", task, *texts_of(texts), *(texts_of(examples, start=1000) if examples else ()))


def numbers(labels):
    return [sorted(LABELS).index(label) for label in labels]


# mteb


def mteb_task(kind: str, *, name: str, **attributes):
    """An mteb task of ours, whose own code scores vectors of ours."""
    abstasks = pytest.importorskip("mteb.abstasks")
    from mteb.abstasks.task_metadata import TaskMetadata

    metadata = TaskMetadata(
        dataset={"path": "local/toy", "revision": "1"},
        name=name,
        description="ours",
        type="Classification",
        eval_langs=["eng-Latn"],
        main_score="accuracy",
    )
    return type(name, (getattr(abstasks, kind),), {"metadata": metadata, **attributes})()


def mteb_classification(task, train, test) -> list[tuple[float, float]]:
    """Accuracy and macro F1 of each experiment, by mteb's own draws, fits and scores; sets are (vectors, labels)."""
    from datasets import Dataset
    from mteb.timing import TimingStack

    task.evaluator_model.set_params(random_state=task.seed)
    train_set, test_set = (Dataset.from_dict({"label": labels}) for _, labels in (train, test))
    order, found = None, []
    for i in range(task.n_experiments):
        drawn_set, order, drawn = task._undersample_data(train_set, i, order)
        of_one, _ = task._run_experiment(drawn_set, test_set, train[0][drawn], test[0], timer=TimingStack())
        found.append((of_one["accuracy"], of_one["f1"]))
    return found


def test_classification_equals_mteb():
    dataset, system = text_set("classification", examples=300), Vectors()
    found = score(system, dataset, Protocol(runs=3, samples_per_label=4))
    sets = [
        (np.stack([system.vector(text) for text in texts]), numbers(labels))
        for texts, labels in ((dataset.example_texts, dataset.example_labels), (dataset.texts, dataset.labels))
    ]
    task = mteb_task("AbsTaskClassification", name="Ours", samples_per_label=4, n_experiments=3)
    expected = mteb_classification(task, *sets)
    assert found.metrics == pytest.approx(dict(zip(["accuracy", "macro_f1"], np.mean(expected, axis=0), strict=True)))
    assert 0.5 < found.metrics["accuracy"] < 0.95  # neither chance nor certain, so that it can differ
    assert len({accuracy for accuracy, _ in expected}) > 1
    assert len(system.embedded[1]) <= 3 * 3 * 4 < len(dataset.example_texts)  # only the examples that are drawn


def test_cross_validation_equals_mteb():
    from sklearn.model_selection import KFold

    dataset, system = text_set("classification"), Vectors()
    found = score(system, dataset, Protocol(samples_per_label=4))
    vectors, labels = np.stack([system.vector(text) for text in dataset.texts]), np.array(numbers(dataset.labels))
    task = mteb_task("AbsTaskClassification", name="OursToo", samples_per_label=4, n_experiments=1)
    task.evaluator_model.set_params(random_state=task.seed)
    from datasets import Dataset
    from mteb.timing import TimingStack

    order, accuracies = None, []
    for train, test in KFold(5, shuffle=True, random_state=task.seed).split(range(len(labels))):
        train_set, test_set = (Dataset.from_dict({"label": labels[x].tolist()}) for x in (train, test))
        drawn_set, order, drawn = task._undersample_data(train_set, 0, order)
        of_one, _ = task._run_experiment(
            drawn_set, test_set, vectors[train][drawn], vectors[test], timer=TimingStack()
        )
        accuracies.append(of_one["accuracy"])
    assert found.metrics["accuracy"] == pytest.approx(np.mean(accuracies))
    assert found.metrics["accuracy"] < 1


def test_clustering_equals_mteb():
    evaluators = pytest.importorskip("mteb._evaluators.clustering_evaluator")
    from datasets import Dataset
    from mteb.timing import TimingStack

    dataset, system = text_set("clustering"), Vectors()
    found = score(system, dataset, Protocol(runs=3))
    vectors = system.vectors(dataset.texts)[0]
    rows = Dataset.from_dict({"text": dataset.texts, "labels": dataset.labels})
    encoder = types.SimpleNamespace(encode=lambda *_, **__: vectors)
    v_measures = []
    for seed in range(SEED, SEED + 3):
        evaluator = evaluators.ClusteringEvaluator(
            rows,
            input_column_name="text",
            label_column_name="labels",
            task_metadata=mteb_task("AbsTaskClassification", name=f"Ours{seed}").metadata,
            hf_split="test",
            hf_subset="default",
            timer=TimingStack(),
            seed=seed,
        )
        v_measures.append(v_measure_score(dataset.labels, evaluator(encoder, encode_kwargs={})))
    assert found.metrics["v_measure"] == pytest.approx(np.mean(v_measures), rel=1e-9)
    assert found.samples["assigned"].shape == (3, 90)
    assert 0.1 < np.mean(v_measures) < 0.95


def test_pair_classification_equals_mteb():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 80)
    similarity = np.round(0.3 * labels + generator.normal(size=80), 1).astype(np.float32)  # with ties
    found = scores("pair-classification", {"similarity": similarity, "gold": labels.astype(np.uint8)})
    task = mteb_task("AbsTaskPairClassification", name="OurPairs")
    expected = task._compute_metrics_values(similarity.tolist(), labels, True)
    assert found == pytest.approx(
        {"ap": expected["ap"], "best_f1": expected["f1"], "best_accuracy": expected["accuracy"]}
    )
    assert found["ap"] == pytest.approx(average_precision_score(labels, similarity))
    assert len(set(similarity.tolist())) < 60


def test_retrieval_equals_mteb():
    metrics = pytest.importorskip("mteb._evaluators.retrieval_metrics")
    from evaluation.metrics import retrieval_scores

    generator = np.random.default_rng(0)
    documents = [f"d{i}" for i in range(150)]
    runs, qrels = {}, {}
    for i in range(12):
        judged = generator.choice(documents, 4, replace=False)
        qrels[f"q{i}"] = {str(x): int(grade) for x, grade in zip(judged, [2, 1, 1, 0], strict=True)}
        some = generator.choice(documents, 120, replace=False)
        ranked = {str(x): round(float(y), 1) for x, y in zip(some, generator.random(120), strict=True)}  # ties
        best = sorted(ranked, key=lambda x: (ranked[x], x), reverse=True)[:100]
        runs[f"q{i}"] = {x: ranked[x] for x in best}
        runs[f"q{i}"][str(judged[0])] = 0.9  # or the measures at 10 were nearly all 0
    expected = metrics.calculate_retrieval_scores(runs, qrels, [10, 100])
    found = retrieval_scores(runs, qrels)
    # mteb rounds to five decimals.
    assert found["ndcg_at_10"] == pytest.approx(expected.ndcg["NDCG@10"], abs=1e-5)
    assert found["map_at_10"] == pytest.approx(expected.map["MAP@10"], abs=1e-5)
    assert found["mrr_at_10"] == pytest.approx(expected.mrr["MRR@10"], abs=1e-5)
    assert found["recall_at_10"] == pytest.approx(expected.recall["Recall@10"], abs=1e-5)
    assert found["recall_at_100"] == pytest.approx(expected.recall["Recall@100"], abs=1e-5)
    assert len(set(found.values())) == 5
    assert min(found.values()) > 0.01


# Scores


def test_macro_f1_and_v_measure_are_scikit_learns():
    generator = np.random.default_rng(1)
    gold = generator.integers(0, 5, 60)
    assigned = np.where(generator.random((2, 60)) < 0.5, gold, generator.integers(0, 4, (2, 60)))
    samples = {"assigned": assigned.astype(np.uint16), "gold": gold.astype(np.uint16)}
    expected = np.mean([f1_score(gold, x, average="macro") for x in assigned])
    assert scores("classification", samples)["macro_f1"] == pytest.approx(expected)
    expected = np.mean([v_measure_score(gold, x) for x in assigned])
    assert scores("clustering", samples)["v_measure"] == pytest.approx(expected)


def test_bm25_has_no_score_where_vectors_are_needed(tmp_path):
    dataset = text_set("clustering")
    assert score(BM25(), dataset, Protocol()).metrics == {"v_measure": None}
    output = tmp_path / "results.json"
    first = evaluate([BM25()], [dataset], output, command="first")
    assert evaluate([BM25()], [dataset], output, command="second") == first
    assert "samples" not in first[0]


def test_labels_that_seem_inverted_are_said(caplog):
    first, labels = texts_of(40)
    pairs = LabelledPairSet("pair-classification/Toy", first, [f"red {i}" for i in range(40)], [])
    red = [label == "red" for label in labels]
    right = score(Vectors(), LabelledPairSet(pairs.name, first, pairs.second, red), Protocol())
    assert right.metrics["ap"] > 0.6
    assert not caplog.records
    score(Vectors(), LabelledPairSet(pairs.name, first, pairs.second, [not x for x in red]), Protocol())
    assert "worse than chance" in caplog.text


def test_the_protocol_is_in_the_record(tmp_path):
    dataset = text_set("classification", examples=60)
    output = tmp_path / "results.json"
    for protocol in (Protocol(runs=2), Protocol(runs=2, max_texts=50)):
        evaluate([Vectors()], [dataset], output, command="", protocol=protocol)
    whole, cut = json.loads(output.read_text())["records"]
    assert whole["protocol"] == {"experiments": 2, "samples_per_label": 8, "seed": SEED}
    assert cut["protocol"] == whole["protocol"] | {"max_texts": 50, "cut_from": dataset.sizes}
    assert (whole["sizes"]["texts"], cut["sizes"]["texts"]) == (90, 50)
    assert cut["data_sha256"] != whole["data_sha256"]


# Files


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def labelled(count, start=0):
    return [{"text": text, "label": label} for text, label in zip(*texts_of(count, start), strict=True)]


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "eval"
    write(root / "clustering" / "Colours" / "test.jsonl.zst", labelled(30))
    write(root / "clustering" / "Colours" / "dev.jsonl.zst", labelled(20, start=100))
    write(root / "clustering" / "Numbers" / "all.jsonl.zst", [{"text": str(i), "label": i % 2} for i in range(12)])
    pairs = [{"sentence1": "a", "sentence2": str(i), "label": i % 2} for i in range(4)]
    write(root / "glue" / "MRPC" / "test.jsonl.zst", pairs)
    write(
        root / "glue" / "RTE" / "dev.jsonl.zst",
        [{**x, "label": ["not_entailment", "entailment"][x["label"]]} for x in pairs],
    )
    write(root / "glue" / "WNLI" / "dev.jsonl.zst", pairs)
    return tmp_path


def test_labelled_sets_are_found_and_read(data):
    assert available_sets(data) == [
        *("pair-classification/MRPC", "pair-classification/RTE"),
        *("clustering/Colours", "clustering/Numbers", "classification/Colours", "classification/Numbers"),
    ]
    pairs = load_set(data, "pair-classification/RTE")
    assert pairs.scores == [False, True, False, True]
    with_examples = load_set(data, "classification/Colours")
    assert with_examples.sizes == {"texts": 30, "labels": 3, "examples": 20}
    assert load_set(data, "clustering/Colours").example_texts == []
    assert load_set(data, "classification/Numbers").labels[:3] == ["0", "1", "0"]
    names = [dataset.name for dataset in load_sets(data, None)]
    assert names.index("classification/Colours") - names.index("clustering/Colours") == 1  # they share their texts
    assert small_first([]) == []


@pytest.mark.parametrize(
    ("file", "rows", "name", "message"),
    [
        ("clustering/Colours/dev", labelled(2, 100), "classification/Colours", "has no example in dev.jsonl.zst"),
        ("clustering/Colours/test", labelled(9), "clustering/Colours", "9 texts; ten are the least"),
        ("clustering/Numbers/all", [{"text": "a", "label": 1.5}], "clustering/Numbers", "all.jsonl.zst:1: no field"),
        ("clustering/Numbers/all", [{"text": "a", "label": "b"}] * 12, "clustering/Numbers", "12 texts; ten"),
        ("glue/MRPC/test", [{**PAIR, "label": 2}], "pair-classification/MRPC", ":1: the label 2"),
        ("glue/MRPC/test", [{**PAIR, "label": 1}], "pair-classification/MRPC", "both labels"),
        ("STSB/test", [{**PAIR, "score": float("nan")}], "STSB", ":1: the score nan"),
    ],
)
def test_malformed_labelled_sets_are_named(data, file, rows, name, message):
    write(data / "eval" / f"{file}.jsonl.zst", rows)
    with pytest.raises(EvaluationError, match=message):
        load_set(data, name)
