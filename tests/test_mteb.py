"""Laws of the MTEB run: the tasks are the paper's; real tasks of mteb run offline and score what our metrics score;
results are in mteb's format with what decided them beside, and a result is taken again only if it is whole and of the
same data. LoCo is read by name from a Hub over real HTTP.
"""

import json
import os
import re
import subprocess
import sys

import mteb
import numpy as np
import pytest
import zstandard
from conftest import REPOSITORY, SHIPPED
from hub_server import COMMIT, serve
from mteb.cache import ResultCache
from mteb.results import TaskResult
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from evaluation import mteb_model, mteb_run
from evaluation.metrics import retrieval_scores
from evaluation.mteb_model import TextEncoder
from evaluation.mteb_run import category_means, markdown
from evaluation.mteb_tasks import (
    LOCO,
    LONG,
    PUBLISHED,
    PUBLISHED_LENGTHS,
    mteb_names,
    paper_tasks,
    select_tasks,
    sets_of,
)
from evaluation.mteb_training import TINY
from evaluation.sets import EvaluationError, RetrievalSet, TextSet
from evaluation.systems import top_k

PAIRS = [json.loads(line) for line in (REPOSITORY / "tests/data/pairs.jsonl").read_text().splitlines()][:30]
TEXTS = [json.loads(line) for line in (REPOSITORY / "tests/data/corpus.jsonl").read_text().splitlines()]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture
def data(tmp_path):
    """Folder with the sets ir/Facts and clustering/Kinds."""
    root = tmp_path / "data" / "eval"
    write_rows(
        root / "ir/Facts/corpus.jsonl.zst", [{"_id": f"d{i}", "text": p["positive"]} for i, p in enumerate(PAIRS)]
    )
    write_rows(
        root / "ir/Facts/queries.jsonl.zst", [{"_id": f"q{i}", "text": p["query"]} for i, p in enumerate(PAIRS)]
    )
    rows = "".join(f"q{i}\td{i}\t1\n" for i in range(len(PAIRS)))
    (root / "ir/Facts/qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    labelled = [{"text": row["text"][:200], "label": row["source"]} for row in TEXTS]
    write_rows(root / "clustering/Kinds/test.jsonl.zst", labelled)
    return tmp_path / "data"


def arguments_for(data, output, *more):
    fixed = ["--model", str(SHIPPED), "--name", "me/tiny", "--device", "cpu", "--output", str(output)]
    return [*fixed, "--data", str(data), *map(str, more)]


def run(arguments):
    with pytest.raises(SystemExit) as error:
        mteb_run.main(arguments)
    return error.value.code


def test_the_papers_tasks_and_its_average():
    tasks = paper_tasks()
    assert len(tasks) == 56
    assert tasks["MSMARCO"].eval_splits == ["dev"]
    assert tasks["STS22"].hf_subsets == ["en"]
    # The published averages are those of their columns, weighted by the tasks of each: numbers and tasks agree.
    for row in PUBLISHED.values():
        scores = {name: row[mteb_run.CATEGORIES[task.metadata.type]] / 100 for name, task in tasks.items()}
        means = category_means(scores)
        assert means["average"] == (pytest.approx(row["average"], abs=0.0075), 56, 56)
        assert means["RT"] == (pytest.approx(row["RT"]), 15, 15)
    del scores["MSMARCO"], scores["SummEval"]
    assert category_means(scores)["RT"][1:] == (14, 15)
    assert category_means(scores)["average"][1] == 54
    assert "SM" not in category_means(scores)


def test_tasks_by_name_and_what_is_none():
    names = [task.metadata.name for task in select_tasks(["SciFact", "long", "loco", "LEMBNeedleRetrieval"])]
    assert names == ["SciFact", *(name for name in LONG if name != "SciFact"), *LOCO, "LEMBNeedleRetrieval"]
    assert set(PUBLISHED_LENGTHS) <= {*names}
    assert len(select_tasks(["LongEmbed"])) == 6
    with pytest.raises(EvaluationError, match=r"--tasks SciFacts: .*near it are SciFact") as error:
        select_tasks(["SciFacts"])
    assert "\n" not in str(error.value)
    with pytest.raises(EvaluationError, match="--tasks ir/Facts: is a local set, say with --data"):
        select_tasks(["ir/Facts"])
    with pytest.raises(EvaluationError, match="STSBenchmark: is no retrieval or clustering task"):
        sets_of(select_tasks(["STSBenchmark"])[0])


def test_a_folder_with_the_same_weights_and_other_files_is_another_model():
    model = SentenceTransformer(str(SHIPPED), trust_remote_code=True, device="cpu")

    def sha256() -> str:
        return mteb_model._sha256(model)

    before, found = sha256(), set()
    assert before == sha256()
    model.prompts = {"query": "query: "}
    found.add(sha256())
    model.prompts = {}
    model.max_seq_length = 512
    found.add(sha256())
    model[1].pooling_mode = "cls"
    found.add(sha256())
    assert len(found | {before}) == 4


def test_real_tasks_run_offline_and_are_not_run_again(data, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    arguments = arguments_for(data, output, "--tasks", "ir/Facts", "clustering/Kinds", "--trained-on", "tiny")
    assert run(arguments) == 0
    folder = next((output / "results" / "me__tiny").iterdir())
    assert folder.name.startswith("folder-")
    meta = json.loads((folder / "model_meta.json").read_text())
    assert (meta["name"], meta["max_tokens"], meta["embed_dim"]) == ("me/tiny", 8192, 256)
    assert set(meta["training_datasets"]) == TINY.tasks
    assert (meta["release_date"], meta["adapted_from"]) == (TINY.release_date, TINY.teacher)
    assert set(ResultCache(output).get_task_names()) == {"ir-Facts", "clustering-Kinds"}  # mteb reads them
    result = TaskResult.from_disk(folder / "ir-Facts.json")
    model = SentenceTransformer(str(SHIPPED), trust_remote_code=True, device="cpu")
    vectors = [model.encode([pair[side] for pair in PAIRS]) for side in ("query", "positive")]
    found = {f"q{i}": {f"d{j}": s for j, s in row.items()} for i, row in enumerate(top_k(*vectors, 30))}
    ours = retrieval_scores(found, {f"q{i}": {f"d{i}": 1} for i in range(len(PAIRS))})
    (scores,) = result.scores["test"]
    assert 0.2 < scores["ndcg_at_10"] < 1  # control: a task that could be missed
    for measure in ("ndcg_at_10", "mrr_at_10", "map_at_10", "recall_at_10"):
        assert scores[measure] == pytest.approx(ours[measure], abs=1e-5)
    assert scores["main_score"] == scores["ndcg_at_10"]

    records = json.loads((output / "scores.json").read_text())["records"]
    assert [record["set"] for record in records] == ["ir-Facts", "clustering-Kinds"]
    settings = records[0]["settings"]
    assert {name: settings[name] for name in ("max_length", "dtype", "normalized")} == {
        "max_length": 8192, "dtype": "float32", "normalized": True,
    }  # fmt: skip
    assert settings["revision"] == folder.name
    assert records[0]["sizes"] == {"texts": 60, "truncated_texts": 0}
    assert records[0]["versions"]["mteb"] == mteb.__version__
    assert "| me/tiny, 8192 tokens, float32, length 1" in capsys.readouterr().out

    def nothing_is_embedded(*_, **__):
        raise AssertionError("embedded again")

    monkeypatch.setattr(mteb_model.EmbeddingModel, "embed", nothing_is_embedded)
    assert run(arguments) == 0
    assert json.loads((output / "scores.json").read_text())["records"] == records
    monkeypatch.undo()

    # An interruption broke one result; another set changed since: mteb itself would stop, and take the old score.
    (folder / "clustering-Kinds.json").write_text('{"dataset_rev')
    qrels = data / "eval/ir/Facts/qrels.tsv"
    qrels.write_text(qrels.read_text().replace("q0\td0", "q0\td1"))
    assert run(arguments) == 0
    again = {r["set"]: r for r in json.loads((output / "scores.json").read_text())["records"]}
    assert again["clustering-Kinds"]["metrics"] == records[1]["metrics"]
    assert again["ir-Facts"]["metrics"] != records[0]["metrics"]
    assert again["ir-Facts"]["dataset_revision"] != records[0]["dataset_revision"]
    assert len(again) == 2


def test_lengths_are_experiments_of_their_own(data, tmp_path, capsys, caplog):
    output = tmp_path / "out"
    arguments = arguments_for(data, output, "--tasks", "ir/Facts", "--max-length", 8, 8192)
    assert run([*arguments, "--normalize", "never", "--trained-on", "MSMARCO", "MSMARKO"]) == 0
    folder = next((output / "results" / "me__tiny").iterdir())
    found = {path.parent.name: TaskResult.from_disk(path).main_score for path in folder.rglob("ir-Facts.json")}
    assert set(found) == {"max_length_8__normalize_never", "normalize_never"}
    records = json.loads((output / "scores.json").read_text())["records"]
    assert [(r["settings"]["max_length"], r["settings"]["normalized"]) for r in records] == [(8, False), (8192, False)]
    assert records[0]["sizes"]["truncated_texts"] > 20
    assert found["max_length_8__normalize_never"] < found["normalize_never"]
    assert "not normalised" in capsys.readouterr().out
    meta = json.loads(next(folder.rglob("model_meta.json")).read_text())
    assert set(meta["training_datasets"]) == {"MSMARCO", "MSMARKO"}
    assert "--trained-on MSMARKO: is no task of mteb" in caplog.text
    assert "--trained-on MSMARCO" not in caplog.text
    encoder = TextEncoder(str(SHIPPED), device="cpu", normalize="never")
    (vector,) = encoder.encode([{"text": ["a text"]}], task_metadata=LOCO["LoCoQMSumRetrieval"].metadata,
                               hf_split="test", hf_subset="default")  # fmt: skip
    assert not np.isclose(np.linalg.norm(vector), 1, atol=0.05)


def test_prompts_are_the_models_own():
    bert = SentenceTransformer(str(SHIPPED), trust_remote_code=True, device="cpu")
    encoder = TextEncoder(str(SHIPPED), device="cpu")
    encoder.model_prompts = {"query": "the question is: "}
    metadata = LOCO["LoCoQMSumRetrieval"].metadata
    place = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
    batch = [{"text": ["whales", "bread"]}]
    queries = encoder.encode(batch, prompt_type=mteb.types.PromptType.query, **place)
    documents = encoder.encode(batch, prompt_type=mteb.types.PromptType.document, **place)
    np.testing.assert_allclose(queries, bert.encode(["the question is: whales", "the question is: bread"]), atol=1e-5)
    np.testing.assert_allclose(documents, bert.encode(["whales", "bread"]), atol=1e-5)
    assert (encoder.texts["LoCoQMSumRetrieval"], encoder.truncated["LoCoQMSumRetrieval"]) == (4, 0)
    assert isinstance(encoder.model[0], Transformer)
    assert [type(module) for module in encoder.model][1:] == [Pooling, Normalize]


def test_the_table_says_what_is_incomplete():
    record = {
        "model": "me/tiny", "set": "SciFact", "type": "Retrieval", "metrics": {"ndcg_at_10": 0.5}, "sizes": {},
        "settings": {"max_length": 512, "dtype": "float32", "normalized": True, "revision": "abc"}, "command": "run",
    }  # fmt: skip
    table = markdown([record])
    row = next(line for line in table.splitlines() if line.startswith("| me/tiny"))
    assert row.endswith("| - | - | - | - | 50.00 (1 of 15 tasks) | - | - | 50.00 (1 of 56 tasks) |")
    assert "| jina-embeddings-v2-base-en (published) | 73.45 | 41.73 |" in table
    assert "| SciFact | jina-embeddings-v2-base-en (published) | 62.1 | 66.7 | 69.4 |" in table
    assert "| SciFact | me/tiny |  | 50.0 |  |" in table
    assert "NarrativeQA" not in table
    assert PUBLISHED_LENGTHS["SciFact"] == {128: 62.1, 512: 66.7, 8191: 69.4}, "what is published stays"


def test_without_a_record_the_table_is_what_was_published():
    table = markdown()
    for model, row in PUBLISHED.items():
        assert f"| {model} (published) | {row['CF']:.2f} |" in table
    assert all(f"| {task} | jina-embeddings-v2-base-en (published) |" in table for task in PUBLISHED_LENGTHS)
    assert "Every score" not in table
    assert "```" not in table


WRONG = {
    "--tasks ir/Nothing": "unknown set 'ir/Nothing'",
    "--tasks NoSuchTask": "--tasks NoSuchTask: is no task or benchmark of mteb",
    "--tasks ir/Facts --max-length 2": "--max-length 2: the least is 3 tokens",
    "--tasks ir/Facts --name tiny": "--name tiny: is not OWNER/NAME.",
    "--tasks ir/Facts --model /no/such/folder": "model /no/such/folder: no such folder.",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_input_is_one_line(arguments, data, tmp_path, capsys):
    assert run(arguments_for(data, tmp_path / "out", *arguments.split())) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert WRONG[arguments] in line


def test_a_task_without_data_does_not_stop_the_others(data, tmp_path, capsys):
    assert run(arguments_for(data, tmp_path / "out", "--tasks", "SciFact", "clustering/Kinds")) == 1
    captured = capsys.readouterr()
    assert "error: SciFact: mteb/scifact cannot be loaded (" in captured.err
    assert "Traceback" not in captured.err
    assert "| clustering-Kinds | Clustering | v_measure |" in captured.out


LOCO_PROGRAM = """
from evaluation.mteb_tasks import LOCO, select_tasks, sets_of
(task,) = select_tasks(["LoCoQMSumRetrieval"])
(found,) = sets_of(task)
print(found.documents, found.queries, found.qrels, task.metadata.revision)
for name in ("LoCoGovReportRetrieval", "WikiCitiesClustering"):
    try:
        sets_of(select_tasks([name])[0])
    except ValueError as error:
        print(error)
LOCO["LoCoQMSumRetrieval"].DOCUMENTS = "hazyresearch/other"
try:
    sets_of(LOCO["LoCoQMSumRetrieval"]())
except ValueError as error:
    print(error)
"""


def test_loco_comes_from_the_hub_by_its_name(tmp_path):
    documents = [
        {"dataset": "qmsum", "pid": "p1", "passage": "A meeting about remote controls."},
        {"dataset": "qmsum", "pid": "p2", "passage": None},
        {"dataset": "qasper_title", "pid": "p3", "passage": "A paper."},
    ]
    queries = [
        {"dataset": "qmsum", "qid": "q1", "query": "What did they control?", "answer_pids": ["p1"]},
        {"dataset": "qmsum", "qid": "q2", "query": "Who was absent?", "answer_pids": ["p2"]},
        {"dataset": "qasper_title", "qid": "q3", "query": "On papers", "answer_pids": ["p3"]},
    ]
    lines = {
        name: "".join(json.dumps(row) + "\n" for row in rows).encode()
        for name, rows in (("documents", documents), ("queries", queries))
    }
    datasets = {
        "hazyresearch/LoCoV1-Documents": {"test.jsonl": lines["documents"]},
        "hazyresearch/LoCoV1-Queries": {"test.jsonl": lines["queries"]},
        "hazyresearch/other": {"test.jsonl": b'{"text": "a"}\n'},
    }
    with serve(datasets) as (endpoint, requests):
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        process = subprocess.run(
            [sys.executable, "-c", LOCO_PROGRAM], capture_output=True, text=True, cwd=REPOSITORY, env=environment
        )
    assert process.returncode == 0, process.stderr[-2000:]
    first, no_rows, no_data, no_column = process.stdout.splitlines()
    expected = ({"p1": "A meeting about remote controls."}, {"q1": "What did they control?"}, {"q1": {"p1": 1}})
    assert first == " ".join(map(str, expected)) + f" {COMMIT}+{COMMIT}"
    assert no_rows == "hazyresearch/LoCoV1-Documents: nothing of the source 'gov_report'."
    assert no_data.startswith("WikiCitiesClustering: mteb/WikiCitiesClustering cannot be loaded (")
    assert no_column == "hazyresearch/other: no column 'dataset'; it has text."
    assert any("LoCoV1-Queries" in request for request in requests)


def test_sets_of_a_task_are_its_data(data):
    retrieval, clustering = (sets_of(task)[0] for task in select_tasks(["ir/Facts", "clustering/Kinds"], data))
    assert isinstance(retrieval, RetrievalSet)
    assert retrieval.documents["d3"] == PAIRS[3]["positive"]
    assert retrieval.qrels["q3"] == {"d3": 1}
    assert isinstance(clustering, TextSet)
    assert clustering.texts[7] == TEXTS[7]["text"][:200]
    assert clustering.labels == [row["source"] for row in TEXTS]


def test_the_shipped_models_meta_names_code_data_and_teacher():
    meta = TextEncoder(str(SHIPPED), device="cpu", training=TINY).mteb_model_meta
    assert all(meta.openness[name] for name in ("open weights", "open training code", "open training data"))
    assert TINY.tasks <= {*mteb_names(), *LOCO}, "a name that mteb has not calls no task trained on"
    for known in ("MSMARCO", "NQ", "QuoraRetrieval", "RedditClustering", "StackExchangeClustering.v2"):
        assert meta.is_zero_shot_on([known]) is False
    assert meta.is_zero_shot_on(["SciFact", "STSBenchmark"]) is True
    assert TextEncoder(str(SHIPPED), device="cpu").mteb_model_meta.is_zero_shot_on(["SciFact"]) is None

    recipes = REPOSITORY / "training" / "recipes"
    texts = [path.read_text() for path in recipes.glob("tiny-*.yaml")]
    addresses = {address for text in texts for address in re.findall(r"https://[^\s,\"]+", text)}
    held_out = {"https://github.com/pytorch/examples"}  # WikiText-2, for the loss of stage I
    assert addresses - held_out == {*re.findall(r"https://[^\s,;]+", TINY.data)}
    commands = {command for text in texts for command in re.findall(r"python -m (training\.\w+)", text)}
    assert commands <= {*re.findall(r"training\.\w+", meta.public_training_code)}
