"""Training of stages II and III, of distillation and fine-tuning: resuming, several processes, what stops a run.

Laws: a resumed run is the uninterrupted one bit for bit; two processes are one with the batch of both; what is not
finite is not saved; a CSV file and a published folder are enough.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, REPOSITORY, SHIPPED, tiny_config
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from torch.nn.functional import normalize, softmax

from modeling_jina_bert import JinaBertModel
from training import contrastive, finetune
from training.contrastive import load_model
from training.distillation import DistillationRecipe, distillation, distillation_loss
from training.recipe import ContrastiveRecipe, RecipeError, load_recipe
from training.run import TrainingDiverged, exit_on_recipe_error

DATA = REPOSITORY / "tests" / "data"
RECIPES = REPOSITORY / "training" / "recipes"
PAIRS = [json.loads(line) for line in (DATA / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer):
    """A folder with a tiny model with dropout, and `data`: two files of pairs, two of pairs with negatives."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    JinaBertModel(tiny_config(hidden_size=32, intermediate_size=48, hidden_dropout_prob=0.1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("pairs", "triplets"):
        lines = (DATA / f"{name}.jsonl").read_text().splitlines()
        (folder / f"{name}-0.jsonl").write_text("\n".join(lines[::3]))
        (folder / f"{name}-1.jsonl").write_text("\n".join(lines[1::3] + lines[2::3]))
    return folder


def overrides(stage: str, start: Path, output: Path, *changes: str) -> list[str]:
    file = "triplets" if "hard" in stage else "pairs"
    sources = f"[{{name: a, path: {file}-0.jsonl, weight: 2.0}}, {{name: b, path: {file}-1.jsonl}}]"
    return [
        f"model={start}", f"output_dir={output}", f"data_dir={start}", f"sources={sources}", "max_length=16",
        "training.max_steps=6", "training.save_steps=3", "training.per_device_train_batch_size=4",
        "training.learning_rate=0.01", "training.logging_steps=1", "training.warmup_steps=1",
        "training.disable_tqdm=true", "training.use_cpu=true", *changes,
    ]  # fmt: skip


def recipe(stage: str, *arguments, schema=ContrastiveRecipe) -> ContrastiveRecipe:
    return load_recipe(schema, RECIPES / f"tiny-{stage}.yaml", overrides(stage, *arguments))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in log(folder) if "loss" in entry}


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
    """Without negatives, whole batches; with negatives, the cached loss; and that it matters to gather."""
    still = tmp_path / "still"  # no dropout: processes draw their own
    JinaBertModel.from_pretrained(start, hidden_dropout_prob=0.0).save_pretrained(still)
    for file in (*start.glob("token*"), *start.glob("*.jsonl")):
        (still / file.name).write_bytes(file.read_bytes())
    runs = {
        "pairs": ("pairs",),
        "hard": ("hard-negatives", "mini_batch_tokens=60", "num_negatives=2"),
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
    for name in ("pairs", "hard"):
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


def distilled(start, output, *changes, resume=None) -> Path:
    student = ("training.learning_rate=0.003", f"teacher={SHIPPED}", f"cache_dir={output.parent / 'teacher'}")
    config = recipe("distillation", start, output, *student, *changes, schema=DistillationRecipe)
    return contrastive.train(config, resume=resume, objective=distillation)


def test_distillation_moves_towards_the_teacher_and_resumes(start, tmp_path, caplog):
    steps = ("training.max_steps=20", "training.save_steps=10", "training.per_device_train_batch_size=16")
    caplog.set_level("INFO")
    whole = distilled(start, tmp_path / "whole", *steps)
    assert "280 of 280 document texts to embed" in caplog.text
    found = losses(tmp_path / "whole")
    assert sum(found[step] for step in range(16, 21)) < 0.85 * sum(found[step] for step in range(1, 6))
    caplog.clear()
    resumed = distilled(start, tmp_path / "half", *steps, resume=str(tmp_path / "whole" / "checkpoint-10"))
    assert "0 of 280 document texts to embed" in caplog.text
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=0, msg=name)
    with pytest.raises(RecipeError, match="distillation has none"):
        distilled(start, tmp_path / "other", "mini_batch_tokens=100")


def test_the_distillation_loss_is_that_of_sentence_transformers():
    temperature, generator = 0.3, torch.Generator().manual_seed(1)
    student, teacher = (
        [torch.randn(5, width, generator=generator, dtype=torch.float64) for _ in range(2)] for width in (6, 9)
    )

    def scores(anchors, documents):
        return normalize(anchors, dim=1) @ normalize(documents, dim=1).T

    def expected(anchors, documents, wanted) -> torch.Tensor:
        # Candidate k of row i is document i + k.
        shifted = [documents.roll(-k, 0) for k in range(5)]
        labels = torch.stack([wanted.roll(-k, 1).diagonal() for k in range(5)], dim=1)
        loss = DistillKLDivLoss(
            SentenceTransformer(modules=[torch.nn.Identity()]),
            similarity_fct=lambda a, b: (normalize(a, dim=1) * normalize(b, dim=1)).sum(dim=1),
            temperature=temperature,
        )
        return loss.compute_loss_from_embeddings([anchors, *shifted], labels) / temperature**2

    wanted = scores(*teacher)
    both = expected(*student, wanted), expected(*student[::-1], wanted.T)
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(sum(both).item() / 2, rel=1e-12)
    p, q = softmax(wanted / temperature, dim=1), softmax(scores(*student) / temperature, dim=1)
    assert both[0].item() == pytest.approx((p * (p / q).log()).sum().item() / 5, rel=1e-12)
    # Further documents count in the first direction alone; a teacher that agrees costs nothing.
    assert distillation_loss([*student, student[0]], [*teacher, teacher[1]], temperature) != pytest.approx(
        distillation_loss(student, teacher, temperature)
    )
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-12)


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
    monkeypatch.setattr(sys, "argv", finetune_command(table, tmp_path / "run"))
    finetune.main()
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "heldout.json").read_text())
    before, after = (found[moment]["data_cosine_ndcg@10"] for moment in ("before", "after"))
    assert before != after
    assert 0 < after <= 1
    assert f"ndcg@10{before:>23.4f}{after:>9.4f}" in printed
    assert next(entry["step"] for entry in log(tmp_path / "run") if "eval_sequential_score" in entry) == 0
    final = tmp_path / "run" / "final"

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
