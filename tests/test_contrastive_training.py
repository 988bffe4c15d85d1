"""Training of stages II and III, and fine-tuning: resuming, several processes, what stops a run.

Laws: a resumed run is the uninterrupted one bit for bit; two processes are one with the batch of both; what is not
finite is not saved; a CSV file and a published folder are enough.
"""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, REPOSITORY
from contrastive_runs import (  # noqa: F401  pytest finds the fixture by name
    PAIRS,
    RECIPES,
    log,
    losses,
    overrides,
    recipe,
    start_folder,
    weights,
)
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from hub_repo.model_card import check_card
from modeling_jina_bert import JinaBertModel
from training import contrastive, finetune
from training.contrastive import load_model
from training.recipe import ContrastiveRecipe, RecipeError, load_recipe
from training.run import TrainingDiverged, exit_on_recipe_error


def test_the_attention_of_a_recipe(start, tmp_path):
    for name in (None, "eager", "flex_attention"):
        asked = [] if name is None else [f"attn_implementation={name}"]
        model = load_model(recipe("pairs", start, tmp_path, *asked))
        assert model[0].auto_model.config._attn_implementation == (name or "sdpa")
    with pytest.raises(RecipeError, match="nothing"):
        load_model(recipe("pairs", start, tmp_path, "attn_implementation=nothing"))


def test_a_resume_with_fewer_batches_a_step_trains_all_steps(start, tmp_path):
    """The batches of the steps before are not the steps that are left."""
    contrastive.train(recipe("pairs", start, tmp_path, "training.gradient_accumulation_steps=2"))
    once = ("training.gradient_accumulation_steps=1", "training.max_steps=8")
    contrastive.train(recipe("pairs", start, tmp_path, *once), resume=str(tmp_path / "checkpoint-3"))
    assert [entry["step"] for entry in log(tmp_path) if "loss" in entry][-5:] == [4, 5, 6, 7, 8]


def test_the_final_model_reads_whole_texts(start, tmp_path):
    """Training cuts at max_length, what comes out of it does not."""
    final = contrastive.train(recipe("pairs", start, tmp_path, "max_length=8", "training.max_steps=1"))
    texts = ["word " * 20 + "one", "word " * 20 + "two"]
    model = SentenceTransformer(str(final), trust_remote_code=True, device="cpu")
    assert model.max_seq_length == JinaBertModel.from_pretrained(final).config.model_max_length == 8192
    vectors = model.encode(texts)
    assert abs(vectors[0] - vectors[1]).max() > 1e-5
    ours = JinaBertModel.from_pretrained(final).encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(ours, vectors, atol=1e-5)
    assert json.loads((final / "tokenizer.json").read_text())["truncation"] is None
    with pytest.raises(RecipeError, match="max_length=2 leaves no room"):
        contrastive.train(recipe("pairs", start, tmp_path / "short", "max_length=2"))


def test_a_checkpoint_without_the_optimiser_is_not_resumed_from(start, tmp_path):
    contrastive.train(recipe("pairs", start, tmp_path, "training.save_only_model=true"))
    with pytest.raises(RecipeError, match=r"checkpoint-6 was saved with training\.save_only_model"):
        contrastive.train(recipe("pairs", start, tmp_path), resume=True)


def test_a_checkpoint_of_an_epoch_is_looked_through(start, tmp_path, monkeypatch):
    """It is asked for after the last step, which has looked at nothing then."""
    monkeypatch.setattr("training.monitor._not_finite", lambda model: 1)
    with pytest.raises(TrainingDiverged, match="the weights are not finite"):
        contrastive.train(recipe("pairs", start, tmp_path, "training.save_strategy=epoch", "training.max_steps=1000"))
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("module", ["pairs", "hard_negatives", "finetune", None])
def test_several_gpus_in_one_process_are_told_how_to_launch(start, tmp_path, monkeypatch, module):
    monkeypatch.setattr(SentenceTransformerTrainingArguments, "n_gpu", 2)
    command = module and f"training.{module}"
    with pytest.raises(RecipeError, match="2 GPUs in one process: ") as error:
        contrastive.train(recipe("pairs", start, tmp_path), command=command)
    assert (f"-m {command} ..., or set" in str(error.value)) == ("accelerate" in str(error.value)) == bool(module)


def test_stage_three_resumes_bit_for_bit(start, tmp_path):
    """Two sources, dropout, accumulation, token budget; the second half with a worker that fetches ahead."""
    changes = ("mini_batch_tokens=100", "num_negatives=3", "training.gradient_accumulation_steps=2")
    whole = contrastive.train(recipe("hard-negatives", start, tmp_path / "whole", *changes))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    worker = "training.dataloader_num_workers=1"
    resumed = contrastive.train(
        recipe("hard-negatives", start, tmp_path / "half", *changes, worker), resume=str(checkpoint)
    )
    expected, found = weights(whole), weights(resumed)
    assert not torch.equal(expected["encoder.layer.0.mlp.wo.weight"], weights(start)["encoder.layer.0.mlp.wo.weight"])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
    assert {step: losses(tmp_path / "whole")[step] for step in (4, 5, 6)} == losses(tmp_path / "half")
    place = json.loads((checkpoint / "data-process0.json").read_text())["own"]["0"][1]
    assert place["batches"] == 6
    assert set(place["cursors"]) <= {"a", "b"}
    entries = [entry for entry in log(tmp_path / "whole") if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and 0 < entry["padding_share"] < 1 for entry in entries)
    assert entries[-1]["tokens"] == log(tmp_path / "whole")[-1]["data_tokens_kept"] + 2 * 2 * 4 * 5 * 6
    finished = contrastive.train(recipe("hard-negatives", start, tmp_path / "whole", *changes), resume=True)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights(finished)[name], tensor, rtol=0, atol=0, msg=name)


PROCESSES = """
import json, sys
from training import contrastive
from training.recipe import ContrastiveRecipe, load_recipe
for path, overrides in json.loads(sys.argv[1]):
    contrastive.train(load_recipe(ContrastiveRecipe, path, overrides))
"""


def test_two_processes_are_one_with_the_batch_of_both(start, tmp_path):
    """Without negatives, whole batches; with negatives, the cached loss; Matryoshka; and that it matters to gather."""
    still = tmp_path / "still"  # no dropout: processes draw their own
    JinaBertModel.from_pretrained(start, hidden_dropout_prob=0.0).save_pretrained(still)
    for file in (*start.glob("token*"), *start.glob("*.jsonl")):
        (still / file.name).write_bytes(file.read_bytes())
    runs = {
        "pairs": ("pairs",),
        "hard": ("hard-negatives", "mini_batch_tokens=60", "num_negatives=2"),
        "matryoshka-pairs": ("pairs", "matryoshka_dims=[32,12]"),
        "matryoshka-hard": ("hard-negatives", "mini_batch_tokens=60", "num_negatives=2", "matryoshka_dims=[32,12]"),
        "apart": ("pairs", "gather_across_devices=false"),
    }
    short = ("training.max_steps=3", "training.save_steps=100")
    jobs = [
        (str(RECIPES / f"tiny-{stage}.yaml"), overrides(stage, still, tmp_path / f"two-{name}", *short, *changes))
        for name, (stage, *changes) in runs.items()
    ]
    program = tmp_path / "program.py"
    program.write_text(PROCESSES)
    process = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            program, json.dumps(jobs),
        ],
        capture_output=True, text=True, cwd=tmp_path, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    for name in runs.keys() - {"apart"}:
        stage, *changes = runs[name]
        double = ("training.per_device_train_batch_size=8",)
        one = contrastive.train(recipe(stage, still, tmp_path / name, *short, *changes, *double))
        two = tmp_path / f"two-{name}"
        assert losses(two) == pytest.approx(losses(tmp_path / name), rel=1e-5)
        assert log(two)[-2]["tokens"] == log(tmp_path / name)[-2]["tokens"]
        norms = [[e["grad_norm"] for e in log(folder) if "loss" in e] for folder in (two, tmp_path / name)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        for key, tensor in weights(two / "final").items():
            if key.endswith("key.bias"):
                continue  # no gradient but rounding, which AdamW makes a step of: the softmax does not see it
            torch.testing.assert_close(weights(one)[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    for name in ("pairs", "hard"):  # a loss more, of the first 12 dimensions
        plain, both = (losses(tmp_path / f"two-{run}")[1] for run in (name, f"matryoshka-{name}"))
        assert both > 1.5 * plain
    assert losses(tmp_path / "two-apart")[1] < losses(tmp_path / "two-pairs")[1] - 0.1  # half as many to tell apart


def test_what_is_not_finite_stops_the_run(start, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"step 3, process 0: the (loss|gradient norm|weights)"):
        contrastive.train(recipe("pairs", start, tmp_path / "run", "training.learning_rate=1e38"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert "rows of this step" in log(tmp_path / "run")[-1]["stopped"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.eval_strategy=steps"], "nothing is held out"),
        (["training.save_total_limit=1"], "would leave nothing"),
        (["training.batch_sampler=batch_sampler"], "decided by this stage"),
        (["training.per_device_train_batch_size=100"], "a batch needs 100 rows"),
        (["lora={r: 0}"], "lora.r=0 is below 1"),
        (["lora={rank: 4}"], "rank"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(start, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        contrastive.train(recipe("pairs", start, tmp_path / "run", *changes))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "mine.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["question", "answer"], *([row["query"], row["positive"]] for row in PAIRS)])
    return path


def finetune_command(table, output, *changes) -> list[str]:
    return [
        "finetune", "--config", str(RECIPES / "finetune.yaml"), f"data={table}", "anchor=question", "positive=answer",
        f"model={GOLDEN / 'A-small4h'}", f"output_dir={output}", "heldout_share=0.25", "max_length=48",
        "training.per_device_train_batch_size=16", "training.num_train_epochs=4", "training.learning_rate=0.003",
        "training.disable_tqdm=true", "training.use_cpu=true", *changes,
    ]  # fmt: skip


def test_from_a_csv_and_a_published_folder_to_a_model(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", finetune_command(table, tmp_path / "run", "license=mit"))
    finetune.main()
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "heldout.json").read_text())
    before, after = (found[moment]["data_cosine_ndcg@10"] for moment in ("before", "after"))
    assert before != after
    assert 0 < after <= 1
    assert f"ndcg@10{before:>23.4f}{after:>9.4f}" in printed
    assert next(entry["step"] for entry in log(tmp_path / "run") if "eval_sequential_score" in entry) == 0
    final = tmp_path / "run" / "final"
    assert check_card((final / "README.md").read_text(encoding="utf-8")) == []
    assert ModelCard.load(final / "README.md").data.license == "mit"

    # What was reported, by hand: held-out questions among all answers.
    config = load_recipe(finetune.FinetuneRecipe, RECIPES / "finetune.yaml", finetune_command(table, tmp_path)[3:])
    training, heldout = contrastive.split_heldout(contrastive.load_sources(config), config)
    held = heldout["data"].to_list()
    assert 0.1 * len(PAIRS) < len(held) < 0.4 * len(PAIRS)
    assert not {row["anchor"] for row in held} & set(training["data"]["anchor"])
    model = load_model(ContrastiveRecipe(model=str(final), max_length=48))
    texts = list(dict.fromkeys([row["positive"] for row in held] + training["data"]["positive"][:]))
    queries = list(dict.fromkeys(row["anchor"] for row in held))
    ranks = np.argsort(-model.encode(queries) @ model.encode(texts).T, axis=1)[:, :10]
    answers = [{row["positive"] for row in held if row["anchor"] == query} for query in queries]
    assert after == pytest.approx(np.mean([ndcg(r, texts, a) for r, a in zip(ranks, answers, strict=True)]), abs=0.01)


def test_the_metrics_are_those_of_the_model_that_is_saved(table, tmp_path, monkeypatch):
    best = ["training.load_best_model_at_end=true", "training.metric_for_best_model=eval_sequential_score"]
    best += ["training.save_strategy=epoch", "training.learning_rate=0.05", "training.num_train_epochs=3"]
    monkeypatch.setattr(sys, "argv", finetune_command(table, tmp_path / "run", *best))
    finetune.main()
    found = json.loads((tmp_path / "run" / "heldout.json").read_text())["after"]
    epochs = [entry for entry in log(tmp_path / "run") if entry["step"] and "eval_sequential_score" in entry]
    chosen = max(epochs[:3], key=lambda entry: entry["eval_sequential_score"])
    assert found["data_cosine_ndcg@10"] == pytest.approx(chosen["eval_data_cosine_ndcg@10"], abs=1e-6)


def test_nothing_held_out_is_not_evaluated(table, tmp_path, monkeypatch, capsys):
    short = ["heldout_share=0", "training.max_steps=1", "training.save_strategy=no"]
    monkeypatch.setattr(sys, "argv", finetune_command(table, tmp_path / "run", *short))
    finetune.main()
    assert "held out" not in capsys.readouterr().out
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "heldout.json").exists()


def test_the_table_has_a_line_for_each_source():
    moments = {"before": {"a_cosine_ndcg@10": 0.9, "b_x_cosine_ndcg@10": 0.3}, "after": {"a_cosine_ndcg@10": 0.5}}
    lines = [line.split() for line in finetune.summary(moments).splitlines()]
    assert lines == [
        ["held", "out", "before", "after"],
        ["a", "ndcg@10", "0.9000", "0.5000"],
        ["b_x", "ndcg@10", "0.3000", "-"],
    ]


def ndcg(ranks: np.ndarray, texts: list[str], answers: set[str]) -> float:
    gains = sum(1 / np.log2(place + 2) for place, i in enumerate(ranks) if texts[i] in answers)
    return gains / sum(1 / np.log2(place + 2) for place in range(min(len(answers), 10)))


def test_the_command_says_what_is_wrong_in_one_line(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", finetune_command(table, tmp_path / "run", "anchor=query"))
    with pytest.raises(SystemExit) as error:
        exit_on_recipe_error(finetune.main)
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: source data: no column 'query'; it has question, answer."
    )
