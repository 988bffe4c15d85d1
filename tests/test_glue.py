"""Laws of the GLUE evaluation: a finished run is not computed again, an interrupted one ends where an uninterrupted
one does; the tasks that start from MNLI take its encoder and not its head; a grid point is chosen by its median; what
is wrong is said in one line before the first step.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SHIPPED, tiny_config
from glue_rows import BAD, GOOD, pair, sentence, write, write_tasks
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification

from evaluation import glue, glue_finetuning
from evaluation.glue import main, name_of
from evaluation.glue_data import Split, TaskData, load_task
from evaluation.glue_finetuning import fine_tune, load_backbone, load_classifier, plan
from evaluation.glue_recipe import FineTuning
from evaluation.glue_report import grid_points, main_table, select
from evaluation.glue_tasks import TASKS
from modeling_jina_bert import JinaBertForMaskedLM, JinaBertForSequenceClassification


@pytest.fixture(autouse=True)
def _verbosity():
    """The command silences transformers; other tests read its warnings."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("glue")
    write_tasks(root)
    return root


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> dict[str, Path]:
    """A JinaBERT and a BERT as stage I leaves them, random."""
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    bert = BertConfig(vocab_size=30528, max_position_embeddings=64, **shape)
    models = {
        "jina": JinaBertForMaskedLM(tiny_config(**shape)),
        "bert": BertForMaskedLM(bert),
        "classifier": BertForSequenceClassification(bert),
    }
    for name, model in models.items():
        model.save_pretrained(root / name / "final")
        AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(root / name / "final")
    return {name: root / name / "final" for name in models}


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
        tasks: [CoLA, RTE, STS-B, MNLI, QNLI]
        fine_tuning:
          {learning_rates: [1.0e-3], batch_sizes: [4], epochs: 1, seeds: [1], max_length: 32, eval_batch_size: 4,
           training: {use_cpu: true}}
        per_task:
          CoLA: {learning_rates: [1.0e-3, 1.0e-30], seeds: [1, 2]}
          RTE: {label_names: [not_entailment, entailment]}
        """
    )
    return path


def command(tmp_path: Path, recipe: Path, data: Path, *arguments: object) -> list[str]:
    folders = ["--data", data, "--work", tmp_path / "work", "--output", tmp_path / "glue.json"]
    return ["--config", str(recipe), *map(str, folders), *map(str, arguments)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_command_from_grid_to_report(tmp_path, recipe, data, backbones, capsys, monkeypatch):
    arguments = command(tmp_path, recipe, data, "--markdown", tmp_path / "glue.md")
    arguments += ["--model", str(backbones["jina"]), "--model", f"control={backbones['bert']}"]
    main(arguments)
    assert "| jina | dev |" in capsys.readouterr().out
    content = json.loads((tmp_path / "glue.json").read_text())
    records = {(record["model"], record["task"]): record for record in content["records"]}
    assert list(records) == [(m, t) for m in ("jina", "control") for t in ("MNLI", "CoLA", "STS-B", "RTE")]
    assert {entry["task"] for entry in content["left_out"]} == {"QNLI", "QQP", "SST-2", "MRPC", "WNLI", "AdvGLUE"}

    cola = records["jina", "CoLA"]
    assert [(point["point"]["learning_rate"], len(point["runs"])) for point in cola["grid"]] == [(1e-3, 2), (1e-30, 2)]
    assert cola["grid"][0]["runs"] != cola["grid"][0]["runs"][::-1]
    assert records["control", "RTE"]["settings"]["start"].startswith("MNLI ")
    assert set(records["jina", "STS-B"]["test"]["STS-B"]) == {"pearson", "spearman"}
    assert not cola["test"]

    files = {path.name: path.read_text() for path in (tmp_path / "work/jina/submission").iterdir()}
    assert set(files) == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv", "CoLA.tsv", "STS-B.tsv"}  # RTE has no test split
    assert files["AX.tsv"].startswith("index\tprediction\n0\t")
    assert len(files["AX.tsv"].splitlines()) == 6

    report = (tmp_path / "glue.md").read_text()
    for line in (
        "| most frequent label, or mean | dev | 33.3/33.3 |",
        "| JinaBERT base, paper | GLUE test | 85.7/85.4 | 80.7 | 92.2 | 94.5 | 51.4 | 89.5 | 88.4 | 78.7 | 65.1 |",
        f"- QNLI: no train split in {data / 'QNLI'}.",
        "- AdvGLUE: no task of GLUE.",
        "- AX.tsv has 5 rows, the test server wants 1,104.",
        "- CoLA: 6 rows in the development set, GLUE has 1,043.",
        "- RTE: the integer labels of the files were read as not_entailment, entailment.",
    ):
        assert line in report
    folders = [path for path in (tmp_path / "work").glob("*/*/lr*/model")]
    assert len(folders) == 8  # one a model and task
    assert not list((tmp_path / "work").glob("*/*/lr*/trainer"))

    # Again: nothing is trained. Without one result: that run alone.
    trained = []
    monkeypatch.setattr(glue, "fine_tune", lambda run, *a, **k: trained.append(run) or fine_tune(run, *a, **k))
    main(arguments)
    assert trained == []
    assert json.loads((tmp_path / "glue.json").read_text()) == content
    lost = next((tmp_path / "work/control/CoLA").glob("lr0.001-bs4-seed2-*"))
    (lost / "result.json").unlink()
    main(arguments)
    assert [run.folder for run in trained] == [lost]
    assert json.loads((tmp_path / "glue.json").read_text()) == content


def test_a_fine_tuned_model_has_learned_and_loads_again(tmp_path, backbones):
    rows = [sentence(i % 2, i) for i in range(32)]
    split = Split([row["sentence"] for row in rows], None, [row["label"] for row in rows])
    task_data = TaskData(TASKS["SST-2"], split, {"SST-2": split}, {}, len(split))
    settings = FineTuning([3e-3], [8], epochs=3, max_length=16, best_epoch=True, training={"use_cpu": True})
    backbone = load_backbone("jina", str(backbones["jina"]))
    (run,) = plan(backbone, task_data, settings, tmp_path, start=None)
    result = fine_tune(run, backbone, task_data, settings, start=None)
    assert result["score"] == 1.0
    epochs = [entry["eval_score"] for entry in result["history"] if "eval_score" in entry]
    assert len(epochs) == 3
    assert max(epochs) == result["score"]
    model = JinaBertForSequenceClassification.from_pretrained(run.model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.model_folder)
    assert len(tokenizer("a " * 100)["input_ids"]) == 102  # no truncation was saved
    with torch.no_grad():
        logits = model(**tokenizer([GOOD, BAD], padding=True, return_tensors="pt")).logits
    assert [model.config.id2label[label] for label in logits.argmax(dim=1).tolist()] == ["positive", "negative"]


@pytest.mark.parametrize("task", ["RTE", "STS-B"])
def test_the_encoder_comes_from_mnli_and_the_head_does_not(tmp_path, data, backbones, task):
    backbone = load_backbone("jina", str(backbones["jina"]))
    settings = FineTuning([1e-3], [4], epochs=1, max_length=32, training={"use_cpu": True, "weight_decay": 0.0})
    mnli = load_task(TASKS["MNLI"], data, hub="")
    (start,) = plan(backbone, mnli, settings, tmp_path, start=None)
    fine_tune(start, backbone, mnli, settings, start=None)
    settings.learning_rates = [1e-30]  # moves no float32 weight
    task_data = load_task(TASKS[task], data, hub="")
    (run,) = plan(backbone, task_data, settings, tmp_path, start=start)
    fine_tune(run, backbone, task_data, settings, start=start)
    before, from_mnli, after = weights(backbones["jina"]), weights(start.model_folder), weights(run.model_folder)
    encoder = [name for name in after if name.startswith("bert.")]
    assert len(encoder) > 20
    assert all(torch.equal(after[name], from_mnli[name]) for name in encoder)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(after[name], before[name])
    assert from_mnli["classifier.weight"].shape == (3, 32)
    fresh, _ = load_classifier_with_seed(backbone.path, TASKS[task], settings.seeds[0])
    assert torch.equal(after["classifier.weight"], fresh.classifier.weight)
    assert run.identity["start"] == f"MNLI {start.digest}"
    assert plan(backbone, task_data, settings, tmp_path, start=None)[0].folder != run.folder


def load_classifier_with_seed(path, task, seed):
    transformers.set_seed(seed)
    return load_classifier(path, task)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, data, backbones, monkeypatch):
    backbone = load_backbone("jina", str(backbones["jina"]))
    settings = FineTuning([1e-3], [4], epochs=3, max_length=32, hidden_dropout_prob=0.1, training={"use_cpu": True})
    task_data = load_task(TASKS["CoLA"], data, hub="")
    (whole,) = plan(backbone, task_data, settings, tmp_path / "whole", start=None)
    expected = fine_tune(whole, backbone, task_data, settings, start=None)
    (run,) = plan(backbone, task_data, settings, tmp_path / "cut", start=None)
    collate, batches = glue_finetuning._Collator.__call__, []

    def interrupted(self, rows):
        batches.append(len(rows))
        if len(batches) == 4:  # the second batch of the second epoch
            raise KeyboardInterrupt
        return collate(self, rows)

    monkeypatch.setattr(glue_finetuning._Collator, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(run, backbone, task_data, settings, start=None)
    assert not run.is_finished
    # A checkpoint that was being written when the power went is passed over.
    torn = run.folder / "trainer" / "checkpoint-99"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 9')
    batches[:] = [0] * 4
    result = fine_tune(run, backbone, task_data, settings, start=None)
    assert len(batches) - 4 == 2 * 2 + 1  # two of three epochs, and the development set
    assert result["dev"] == expected["dev"]
    assert all(
        torch.equal(tensor, weights(whole.model_folder)[name]) for name, tensor in weights(run.model_folder).items()
    )


def finished_run(folder: Path, rate: float, seed: int, score: float) -> glue_finetuning.Run:
    run = glue_finetuning.Run({"learning_rate": rate, "batch_size": 8}, seed, {"rate": rate, "seed": seed}, folder)
    folder.mkdir()
    run.result_path.write_text(json.dumps({"dev": {"CoLA": {"matthews": score}}, "score": score}))
    return run


def test_the_point_with_the_best_median_is_chosen_not_the_luckiest_seed(tmp_path):
    scores = {1e-5: [0.1, 0.9, 0.2], 2e-5: [0.5, 0.4, 0.6]}
    runs = [
        finished_run(tmp_path / f"{rate}-{seed}", rate, seed, score)
        for rate, values in scores.items()
        for seed, score in enumerate(values)
    ]
    assert (select(runs).point["learning_rate"], select(runs).seed) == (2e-5, 2)
    first = grid_points(runs)[0]
    assert (first["median"], first["least"], first["most"], first["dev"]) == (0.2, 0.1, 0.9, {"CoLA": 0.2})


def test_the_table_has_a_mean_over_shared_tasks_only():
    def record(model, task, dev):
        return {"model": model, "task": task, "dev": dev, "test": {}, "baseline": {"dev": {}, "test": {}}}

    records = [
        record("a", "MNLI", {"MNLI-m": 0.8, "MNLI-mm": 0.7}),
        record("a", "RTE", {"RTE": 0.6}),
        record("a", "CoLA", {"CoLA": 0.1}),
        record("a", "WNLI", {"WNLI": 0.1}),
        record("b", "RTE", {"RTE": 0.5}),
        record("b", "MNLI", {"MNLI-m": 0.6, "MNLI-mm": 0.6}),
        record("b", "WNLI", {"WNLI": 0.2}),
    ]
    header, rows = main_table(records)
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert cells["a"]["mean of 2"] == f"{(75 + 60) / 2:.1f}"  # MNLI counts once, CoLA is not shared, WNLI never counts
    assert cells["b"]["mean of 2"] == "55.0"
    assert cells["JinaBERT small, paper"]["mean of 2"] == f"{((80.1 + 78.9) / 2 + 68.5) / 2:.1f}"
    assert (cells["b"]["CoLA"], cells["a"]["MNLI-m/mm"]) == ("-", "80.0/70.0")


def test_names_of_models(tmp_path):
    (tmp_path / "mlm" / "final").mkdir(parents=True)
    assert name_of(str(tmp_path / "mlm")) == ("mlm", str(tmp_path / "mlm"))
    assert name_of(str(tmp_path / "mlm" / "final"))[0] == "mlm"
    assert name_of("google-bert/bert-base-uncased")[0] == "google-bert/bert-base-uncased"


ROWS = [sentence(0, 0), sentence(1, 1)]


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("CoLA", [], "train.jsonl.zst: is empty"),
        ("CoLA", [{"text": "a", "label": 1}], "CoLA needs the columns sentence or sentence1; there are text, label"),
        (
            "CoLA",
            [*ROWS, sentence(2, 2)],
            "train.jsonl.zst:3: the label 2 is none of 0 (unacceptable), 1 (acceptable)",
        ),
        ("CoLA", [*ROWS, sentence("fine", 2)], "the label 'fine' is none of"),
        ("CoLA", [*ROWS, {"sentence": "a"}], "train.jsonl.zst:3: no label (column label or score)"),
        ("CoLA", [*ROWS, {"sentence": None, "label": 1}], "train.jsonl.zst:3: no text in the column 'sentence'"),
        ("CoLA", [*ROWS, "{"], "train.jsonl.zst:3: not JSON"),
        ("CoLA", ["[]"], "train.jsonl.zst:1: not a JSON object"),
        ("RTE", [{"sentence1": "a", "label": 1}], "RTE needs the columns sentence1, sentence2; there are sentence1"),
        ("STS-B", [pair(5.5, 0)], "the label 5.5 is not between 0 and 5"),
        ("STS-B", [pair("high", 0)], "the label 'high' is not a number"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, recipe, backbones, capsys, task, rows, message):
    write(tmp_path / f"data/{task}/train.jsonl.zst", rows)
    write(tmp_path / f"data/{task}/dev.jsonl.zst", ROWS)
    arguments = command(tmp_path, recipe, tmp_path / "data", "--model", backbones["bert"], f"tasks=[{task}]")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "work").exists()


def test_a_wrong_command_line_is_named(tmp_path, recipe, data, backbones, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in backbones["jina"].iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    kept = {name: tensor for name, tensor in weights(broken).items() if "layer.1.attention" not in name}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "other.json").write_text("{}")
    jina = ["--model", str(backbones["jina"])]
    for arguments, message in (
        (["--model", str(tmp_path / "nothing")], "nothing: no such folder"),
        (["--model", "no-such-repository/at-all"], "no-such-repository/at-all: cannot be loaded"),
        (["--model", str(data)], "cannot be loaded"),
        (["--model", str(broken)], "tensors of the model"),
        (["--model", str(backbones["classifier"])], "has a classification head already"),
        ([*jina, *jina], "two --model have the same name"),
        (["--model", str(backbones["bert"]), "fine_tuning.max_length=65"], "but bert has 64 positions"),
        ([*jina, "--data", str(tmp_path / "nowhere")], "nowhere: no such folder"),
        ([*jina, "--output", str(tmp_path / "other.json")], "holds no results of evaluation.glue"),
        ([*jina, "--markdown", str(tmp_path)], "is a folder"),
        ([*jina, "tasks=[QNLI]"], "nothing to score: QNLI: no train split"),
        ([*jina, "per_task.RTE.label_names=[yes,no]"], "are not the labels entailment, not_entailment"),
        ([*jina, "--config", str(tmp_path / "none.yaml")], "There is no recipe"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command(tmp_path, recipe, data), *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2, message
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "work").exists()
