"""Laws of GLUE's tasks: measures equal those computed by hand; the test server's files are exact to the byte; a label
means the same in every notation; recipes are checked; the Hub's data set is read over real HTTP.
"""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, SHIPPED, tiny_config
from glue_rows import pair, sentence, write, write_tasks
from hub_server import serve
from transformers import AutoTokenizer

from evaluation.glue_data import LeftOut, Split, baseline, load_task
from evaluation.glue_finetuning import measures_of
from evaluation.glue_recipe import load_recipe
from evaluation.glue_report import PAPER, submission
from evaluation.glue_tasks import TASKS, decode, measure, task_score
from evaluation.sets import EvaluationError
from modeling_jina_bert import JinaBertForMaskedLM

RECIPES = REPOSITORY / "evaluation" / "recipes"


def test_the_measures_are_those_computed_by_hand():
    labels, predictions = (
        [1, 1, 0, 0, 1],
        np.array([1, 0, 0, 1, 1]),
    )  # 2 true, 1 false positive; 1 true, 1 false negative
    assert measure(TASKS["CoLA"], predictions, labels) == {"matthews": pytest.approx(1 / 6)}
    assert measure(TASKS["SST-2"], predictions, labels) == {"accuracy": 0.6}
    both = measure(TASKS["QQP"], predictions, labels)
    assert both == {"accuracy": 0.6, "f1": pytest.approx(2 / 3)}
    assert task_score(both) == pytest.approx((0.6 + 2 / 3) / 2)
    similar = measure(TASKS["STS-B"], np.array([1.0, 2.0, 3.0]), [1.0, 2.0, 6.0])
    assert similar == {"pearson": pytest.approx(5 / np.sqrt(28)), "spearman": pytest.approx(1.0)}
    assert measure(TASKS["STS-B"], np.full(3, 2.0), [1.0, 2.0, 6.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert measure(TASKS["MRPC"], np.zeros(2, dtype=int), [1, 0]) == {"accuracy": 0.5, "f1": 0.0}


def test_outputs_become_predictions_and_a_diverged_run_counts_nothing():
    logits = np.array([[0.1, 0.9, 0.0], [3.0, 1.0, 2.0]])
    assert decode(TASKS["MNLI"], logits).tolist() == [1, 0]
    assert decode(TASKS["STS-B"], np.array([[2.5], [7.0]])).tolist() == [2.5, 7.0]
    assert measures_of(TASKS["MNLI"], logits, [1, 0]) == {"accuracy": 1.0}
    assert measures_of(TASKS["MNLI"], np.array([[0.1, np.nan, 0.0], [3.0, 1.0, 2.0]]), [0, 0]) == {"accuracy": 0.0}


def test_the_baseline_is_the_majority_of_the_train_split():
    train, dev = Split(["a"] * 3, None, [1, 1, 0]), Split(["a"] * 4, None, [0, 0, 0, 1])
    assert baseline(train, dev, TASKS["SST-2"]) == {"accuracy": 0.25}
    assert baseline(train, Split(["a"], None, None), TASKS["SST-2"]) is None
    assert baseline(Split(["a"], ["b"], [3.0]), Split(["a"] * 2, ["b"] * 2, [1.0, 2.0]), TASKS["STS-B"]) == {
        "pearson": 0.0,
        "spearman": 0.0,
    }


@pytest.mark.parametrize(
    ("task", "predictions", "lines"),
    [
        ("CoLA", [0, 1], ["0\t0", "1\t1"]),
        ("SST-2", [1, 0], ["0\t1", "1\t0"]),
        ("MRPC", [1, 1], ["0\t1", "1\t1"]),
        ("QQP", [0, 1], ["0\t0", "1\t1"]),
        ("WNLI", [0, 1], ["0\t0", "1\t1"]),
        ("STS-B", [-0.2, 5.0004, 3.14159], ["0\t0.000", "1\t5.000", "2\t3.142"]),
        ("MNLI", [0, 1, 2], ["0\tentailment", "1\tneutral", "2\tcontradiction"]),
        ("QNLI", [0, 1], ["0\tentailment", "1\tnot_entailment"]),
        ("RTE", [1, 0], ["0\tnot_entailment", "1\tentailment"]),
    ],
)
def test_the_files_for_the_test_server(task, predictions, lines):
    text = submission(TASKS[task], np.array(predictions))
    assert text.encode() == "\n".join(["index\tprediction", *lines, ""]).encode()


# wc -l of a whole submission, as people who made one state it; a header each.
SUBMISSION = {
    "AX": 1105, "CoLA": 1064, "MNLI-mm": 9848, "MNLI-m": 9797, "MRPC": 1726, "QNLI": 5464, "QQP": 390_966, "RTE": 3001,
    "SST-2": 1822, "STS-B": 1380, "WNLI": 147,
}  # fmt: skip


def test_the_server_gets_eleven_files_and_the_paper_has_a_score_for_all_but_the_diagnostic_one():
    parts = {part.name: part.test_rows for task in TASKS.values() for part in task.parts}
    assert parts == {name: lines - 1 for name, lines in SUBMISSION.items()}
    assert all(set(scores) == set(parts) - {"AX"} for scores in PAPER.values())


# The data


def test_labels_mean_the_same_in_every_notation(tmp_path):
    for split in ("train", "dev"):
        write(tmp_path / f"RTE/{split}.jsonl", [pair(1, 0), pair(0, 1), pair("entailment", 2)])
    as_hub = load_task(TASKS["RTE"], tmp_path, hub="")
    assert as_hub.train.labels == [1, 0, 0]
    turned = load_task(TASKS["RTE"], tmp_path, hub="", label_names=["not_entailment", "entailment"])
    assert turned.train.labels == [0, 1, 0]
    assert turned.train.sha256 != as_hub.train.sha256
    assert turned.test == {}


def test_the_splits_of_a_task(tmp_path):
    write_tasks(tmp_path)
    mnli = load_task(TASKS["MNLI"], tmp_path, hub="")
    assert list(mnli.dev) == ["MNLI-m", "MNLI-mm"]
    assert {name: (len(split), split.labels) for name, split in mnli.test.items()} == {
        "MNLI-m": (4, None),
        "MNLI-mm": (4, None),
        "AX": (5, None),
    }
    similar = load_task(TASKS["STS-B"], tmp_path, hub="")
    assert similar.train.labels[1] == 0.625
    assert similar.test["STS-B"].labels == [0.0, 5 / 3, 10 / 3]  # public, so it is scored
    with pytest.raises(LeftOut, match=r"no train split in .*QNLI"):
        load_task(TASKS["QNLI"], tmp_path, hub="")


def test_a_sample_is_the_same_every_time_and_not_the_first_rows(tmp_path):
    write_tasks(tmp_path)
    whole = load_task(TASKS["CoLA"], tmp_path, hub="").train
    sample = load_task(TASKS["CoLA"], tmp_path, hub="", max_train_rows=4)
    assert sample.train_rows == 8
    assert sample.train == whole.sample(4)
    assert sample.train.first != whole.first[:4]
    assert set(zip(sample.train.first, sample.train.labels, strict=True)) < set(
        zip(whole.first, whole.labels, strict=True)
    )
    assert whole.sample(8) == whole


# Recipes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("glue*.yaml")), ids=lambda path: path.stem)
def test_the_published_recipes_are_valid(path):
    recipe, settings = load_recipe(path, ["fine_tuning.training.bf16=false"])  # a CPU of the tests may have none
    assert recipe.tasks == list(TASKS)
    assert next(iter(settings)) == "MNLI"
    if path.stem == "glue":
        assert {its.epochs for its in settings.values()} == {10}
        assert (settings["RTE"].seeds, settings["MNLI"].seeds) == ([42, 43, 44, 45, 46], [42])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks=[RTE,SNLI]", "unknown task 'SNLI'; there are MNLI, QQP"),
        ("tasks=[]", "tasks is empty"),
        ("per_task.SNLI.epochs=1", "unknown task 'SNLI'"),
        ("fine_tuning.epoch=1", "'epoch' not in 'FineTuning'"),
        ("per_task.RTE.epoch=1", "RTE: Key 'epoch' not in 'FineTuning'"),
        ("fine_tuning.epochs=many", "epochs"),
        ("fine_tuning.epochs=0", "epochs must be positive, not 0"),
        ("fine_tuning.learning_rates=1", "learning_rates"),
        ("fine_tuning.learning_rates=[]", r"learning_rates=\[\] is empty"),
        ("fine_tuning.learning_rates=[-1]", "learning_rates must be positive"),
        ("fine_tuning.seeds=[1,1]", "names a value twice"),
        ("fine_tuning.max_length=2", "max_length=2"),
        ("fine_tuning.hidden_dropout_prob=1", "hidden_dropout_prob"),
        ("per_task.RTE.max_train_rows=0", "RTE: max_train_rows must be positive"),
        ("fine_tuning.training.warmup_ratio=0.1", "training.warmup_ratio is not a field"),
        ("fine_tuning.training.num_train_epochs=2", "training.num_train_epochs is decided"),
        ("fine_tuning.training.lr_scheduler_type=square", "training: .*square"),
    ],
)
def test_a_wrong_recipe_is_named(override, message):
    with pytest.raises(EvaluationError, match=message) as error:
        load_recipe(RECIPES / "glue-tiny.yaml", [override])
    assert "\n" not in str(error.value)


# The Hub

CARD = """---
configs:
- config_name: cola
  data_files:
  - {split: train, path: cola/train-*}
  - {split: validation, path: cola/validation-*}
  - {split: test, path: cola/test-*}
---
"""


def parquet(rows: list[dict]) -> bytes:
    from datasets import ClassLabel, Dataset, Features, Value

    label = ClassLabel(names=["unacceptable", "acceptable"])
    features = Features({"sentence": Value("string"), "label": label, "idx": Value("int32")})
    buffer = io.BytesIO()
    Dataset.from_list(rows, features=features).to_parquet(buffer)
    return buffer.getvalue()


PROGRAM = """
import sys
from evaluation.glue import main
try:
    main([*sys.argv[1:], "tasks=[RTE]"])
except SystemExit as stop:
    print("status", stop.code)
main([*sys.argv[1:], "tasks=[CoLA]"])
"""


def test_the_command_on_the_hubs_data_set(tmp_path):
    files = {"README.md": CARD.encode()}
    for split, size in (("train", 8), ("validation", 4), ("test", 3)):
        rows = [sentence(i % 2 if split != "test" else -1, i) for i in range(size)]
        files[f"cola/{split}-00000-of-00001.parquet"] = parquet(rows)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    JinaBertForMaskedLM(tiny_config(**shape)).save_pretrained(tmp_path / "mlm")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "mlm")
    arguments = ["--config", RECIPES / "glue.yaml", "--model", tmp_path / "mlm", "--work", tmp_path / "work"]
    arguments += ["--output", tmp_path / "glue.json", "per_task.CoLA.seeds=[1]", "fine_tuning.learning_rates=[0.001]"]
    arguments += ["fine_tuning.batch_sizes=[4]", "fine_tuning.epochs=1", "fine_tuning.training.bf16=false"]
    arguments += ["fine_tuning.training.dataloader_num_workers=0"]
    with serve({"nyu-mll/glue": files}) as (endpoint, _):
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
    assert process.returncode == 0, process.stderr[-2000:]
    # A configuration that the repository does not have, then one that it has.
    assert process.stdout.startswith("status 2\n")
    assert "error: nyu-mll/glue, rte: cannot be had" in process.stderr
    (record,) = json.loads((tmp_path / "glue.json").read_text())["records"]
    assert record["rows"] == {"train": 8, "train_split": 8, "dev CoLA": 4, "test CoLA": 3}
    lines = (tmp_path / "work/mlm/submission/CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert len(lines) == 4
