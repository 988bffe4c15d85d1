"""Laws of the types of MTEB: tasks of the paper, of every type, run offline on data in memory through `mteb_run` and
score what scikit-learn, scipy and our metrics say of the same vectors; the data of a task are had whole, subset by
subset, split by split and row by row.
"""

import json

import mteb
import numpy as np
import pytest
from conftest import REPOSITORY, SHIPPED
from datasets import Dataset, DatasetDict
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.results import TaskResult
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from evaluation import mteb_run
from evaluation.metrics import retrieval_scores
from evaluation.mteb_model import TextEncoder
from evaluation.mteb_tasks import CATEGORIES, sets_of

PAIRS = [json.loads(line) for line in (REPOSITORY / "tests/data/pairs.jsonl").read_text().splitlines()][:24]
TEXTS = [json.loads(line) for line in (REPOSITORY / "tests/data/corpus.jsonl").read_text().splitlines()]
QUERIES = [pair["query"] for pair in PAIRS]
ANSWERS = [pair["positive"] for pair in PAIRS]


def in_memory(name, dataset):
    """The task of that name with other data."""
    task = mteb.get_task(name)
    task.dataset, task.data_loaded = dataset, True
    return task


def as_test_split(**columns):
    return DatasetDict({"test": Dataset.from_dict(columns)})


def candidates(number):
    """For reranking: the answer of a query and the three that follow it."""
    return [(number + step) % len(PAIRS) for step in range(4)]


def classes():
    """Two classes that no model tells apart well: 8 texts of each to learn from, all of which mteb takes, and 24."""
    parts = {"train": QUERIES[:16], "test": ANSWERS}
    return DatasetDict(
        {
            split: Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))]})
            for split, texts in parts.items()
        }
    )


def tasks_of_every_type():
    count = len(PAIRS)
    corpus = Dataset.from_list([{"id": f"d{i}", "title": "", "text": text} for i, text in enumerate(ANSWERS)])
    queries = Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)])
    judged = {f"q{i}": {f"d{j}": int(i == j) for j in candidates(i)} for i in range(count)}
    ranked = {f"q{i}": [f"d{j}" for j in candidates(i)] for i in range(count)}
    retrieval = {"corpus": corpus, "queries": queries, "relevant_docs": judged}
    rows = [[row["text"][:200] for row in TEXTS[start::2]] for start in (0, 1)]
    labels = [[row["source"] for row in TEXTS[start::2]] for start in (0, 1)]
    return [
        in_memory("Banking77Classification", classes()),
        in_memory("TwentyNewsgroupsClustering", as_test_split(sentences=rows, labels=labels)),
        in_memory(
            "TwitterSemEval2015",
            as_test_split(
                sentence1=QUERIES * 2, sentence2=ANSWERS + ANSWERS[1:] + ANSWERS[:1], labels=[1] * count + [0] * count
            ),
        ),
        in_memory("AskUbuntuDupQuestions", {"default": {"test": {**retrieval, "top_ranked": ranked}}}),
        in_memory("SciFact", {"default": {"test": {**retrieval, "top_ranked": None}}}),
        in_memory(
            "STSBenchmark",
            as_test_split(sentence1=QUERIES, sentence2=ANSWERS[1:] + ANSWERS[:1], score=[i % 6 for i in range(count)]),
        ),
        in_memory(
            "SummEval",
            as_test_split(
                text=ANSWERS[:6],
                human_summaries=[QUERIES[i : i + 2] for i in range(6)],
                machine_summaries=[ANSWERS[i : i + 5] for i in range(6)],
                relevance=[[5.0, 4.0, 1.5, 2.0, 0.0 + i] for i in range(6)],
            ),
        ),
    ]


def expected_scores(vectors):
    """Task -> main score, from the vectors of length 1.

    Args:
        vectors: Texts -> `(texts, hidden) float32`.
    """
    queries, answers = vectors(QUERIES), vectors(ANSWERS)
    cosines = queries @ answers.T  # (queries, answers)
    following = np.roll(cosines, -1, axis=1).diagonal()
    paired = [1] * len(PAIRS) + [0] * len(PAIRS)
    both = np.concatenate([answers, np.roll(answers, -1, axis=0)])
    manhattan = -np.abs(np.tile(queries, (2, 1)) - both).sum(axis=1)
    similarities = (np.concatenate([cosines.diagonal(), following]), manhattan)  # mteb takes the best
    data = classes()
    classifier = LogisticRegression(max_iter=100).fit(vectors(data["train"]["text"]), data["train"]["label"])
    judged = {f"q{i}": {f"d{i}": 1} for i in range(len(PAIRS))}
    found = [{f"d{j}": float(score) for j, score in enumerate(row)} for row in cosines]
    ranked = [{f"d{j}": row[f"d{j}"] for j in candidates(i)} for i, row in enumerate(found)]
    reranking, retrieval = (
        retrieval_scores({f"q{i}": row for i, row in enumerate(rows)}, judged) for rows in (ranked, found)
    )
    # TRAP: SummEval's first version, the paper's, takes the mean of the correlations and of their p-values.
    summaries = [spearmanr([5.0, 4.0, 1.5, 2.0, 0.0 + i], cosines[i : i + 2, i : i + 5].max(axis=0)) for i in range(6)]
    return {
        "Banking77Classification": classifier.score(vectors(data["test"]["text"]), data["test"]["label"]),
        "TwitterSemEval2015": max(average_precision_score(paired, scores) for scores in similarities),
        "AskUbuntuDupQuestions": reranking["map_at_10"],
        "SciFact": retrieval["ndcg_at_10"],
        "STSBenchmark": spearmanr([i % 6 for i in range(len(PAIRS))], following).statistic,
        "SummEval": np.mean(summaries),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of the results, and the lines of what failed."""
    output = tmp_path_factory.mktemp("types")
    encoder = TextEncoder(str(SHIPPED), device="cpu")
    return output, mteb_run.evaluate(encoder, tasks_of_every_type(), output, command="a test")


def test_tasks_of_every_type_score_what_their_vectors_say(run):
    output, failures = run
    assert failures == []
    records = {record["set"]: record for record in json.loads((output / "scores.json").read_text())["records"]}
    assert {record["type"] for record in records.values()} == set(CATEGORIES)
    model = SentenceTransformer(str(SHIPPED), trust_remote_code=True, device="cpu")
    for name, expected in expected_scores(lambda texts: model.encode(list(texts))).items():
        ((measure, score),) = records[name]["metrics"].items()
        assert score == pytest.approx(expected, abs=1e-4), (name, measure)
        assert abs(score) not in (0, 1), f"control: {name} could be missed"
        assert records[name]["sizes"]["texts"] > 0
    (clustered,) = TaskResult.from_disk(next(output.rglob("TwentyNewsgroupsClustering.json"))).scores["test"]
    assert len(clustered["v_measures"]) == 2, "each row is clustered by itself"
    assert clustered["main_score"] == pytest.approx(np.mean(clustered["v_measures"]), abs=1e-5)
    assert records["TwentyNewsgroupsClustering"]["sizes"]["texts"] == 50


def test_every_column_of_the_papers_table_has_its_task(run):
    output, _ = run
    records = json.loads((output / "scores.json").read_text())["records"]
    row = next(line for line in mteb_run.markdown(records).splitlines() if line.startswith("| hub_repo/tiny"))
    assert [cell.strip().partition(" ")[2] for cell in row.strip("|").split("|")[1:]] == [
        "(1 of 12 tasks)", "(1 of 11 tasks)", "(1 of 3 tasks)", "(1 of 4 tasks)", "(1 of 15 tasks)",
        "(1 of 10 tasks)", "", "(7 of 56 tasks)",
    ]  # fmt: skip


def test_sets_of_a_clustering_task_are_its_rows():
    legacy = next(task for task in tasks_of_every_type() if task.metadata.name == "TwentyNewsgroupsClustering")
    first, second = sets_of(legacy)
    assert (first.name, second.name) == ("TwentyNewsgroupsClustering:0", "TwentyNewsgroupsClustering:1")
    assert second.texts == [row["text"][:200] for row in TEXTS[1::2]]
    assert second.labels == [row["source"] for row in TEXTS[1::2]]


def test_sets_of_a_task_with_splits_and_with_subsets():
    def split(number):
        return {
            "corpus": Dataset.from_list([{"id": "d", "title": "A title", "text": ANSWERS[number]}]),
            "queries": Dataset.from_list([{"id": "q", "text": QUERIES[number]}]),
            "relevant_docs": {"q": {"d": 1}},
        }

    retrieval = in_memory("LEMBNeedleRetrieval", {"default": {"test_256": split(0), "test_512": split(1)}})
    short, long = sets_of(retrieval)
    assert (short.name, long.name) == ("LEMBNeedleRetrieval:test_256", "LEMBNeedleRetrieval:test_512")
    assert long.documents == {"d": f"A title {ANSWERS[1]}"}
    assert (short.queries, short.qrels) == ({"q": QUERIES[0]}, {"q": {"d": 1}})

    labels = [0] * 5 + [1] * 5
    parts = {"Rosch1973": QUERIES[:10], "Rosch1975": QUERIES[10:20], "McCloskey1978": ANSWERS[:10]}
    rows = {name: Dataset.from_dict({"item": texts, "category": labels}) for name, texts in parts.items()}
    found = sets_of(in_memory("HumanConceptsClustering", DatasetDict(rows)))
    assert [(dataset.name, dataset.texts) for dataset in found] == [
        (f"HumanConceptsClustering:{name}", texts) for name, texts in parts.items()
    ]

    subsets = {"title and abstract": ANSWERS[:10], "title": QUERIES[:10]}
    rows = {name: as_test_split(sentences=texts, labels=labels) for name, texts in subsets.items()}
    found = sets_of(in_memory("ClusTREC-Covid", rows))
    assert [(dataset.name, dataset.texts) for dataset in found] == [
        (f"ClusTREC-Covid:{name}", texts) for name, texts in subsets.items()
    ]


def test_the_committed_run_is_in_mtebs_format_and_agrees_with_our_own():
    folder = REPOSITORY / "evaluation" / "results"
    records = json.loads((folder / "mteb" / "scores.json").read_text())["records"]
    assert (folder / "mteb" / "table.md").read_text() == mteb_run.markdown(records)
    cache = ResultCache(folder / "mteb")
    whole = json.loads((folder / "tiny.json").read_text())["records"]
    local = {(r["model"], r["set"].replace("/", "-")): r["metrics"] for r in whole}
    compared = 0
    for record in records:
        meta = ModelMeta.create_empty({"name": record["model"], "revision": record["settings"]["revision"]})
        result = cache.load_task_result(record["set"], meta)
        assert result.dataset_revision == record["dataset_revision"]
        (scores,) = result.scores["test"]
        assert scores["main_score"] == pytest.approx(next(iter(record["metrics"].values())), abs=1e-5)
        ours = local.get((record["model"].removeprefix("sentence-transformers/"), record["set"]), {})
        for measure in ours.keys() & scores.keys():
            assert scores[measure] == pytest.approx(ours[measure], abs=1e-4), (record["model"], record["set"], measure)
            compared += 1
    assert compared == 20, "two models, two sets, five measures"
