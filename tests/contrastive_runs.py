"""Short runs of stages II and III and of distillation, for tests: a tiny model, two sources, what a run wrote."""

import json
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, tiny_config
from safetensors.torch import load_file

from modeling_jina_bert import JinaBertModel
from training.recipe import ContrastiveRecipe, load_recipe

DATA = REPOSITORY / "tests" / "data"
RECIPES = REPOSITORY / "training" / "recipes"
PAIRS = [json.loads(line) for line in (DATA / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", name="start")
def start_folder(tmp_path_factory, tokenizer):
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
