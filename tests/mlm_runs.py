"""Short runs of stage I, for tests: a tiny model, three batches a step, two workers, what a run wrote."""

import json
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SHIPPED
from safetensors.torch import load_file

from training import mlm
from training.recipe import MLMRecipe, load_recipe

RECIPES = REPOSITORY / "training" / "recipes"
OVERRIDES = [
    f"tokenizer={SHIPPED}", f"data_dir={REPOSITORY / 'tests' / 'data'}",
    "sources=[{name: facts, path: corpus.jsonl, heldout_share: 0.1}]", "heldout=[]",
    "model={vocab_size: 30528, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 24}",
    "model.hidden_dropout_prob=0.1", "max_length=32", "long_documents=pack", "shuffle_buffer=50",
    "heldout_sequences=8", "training.max_steps=6", "training.save_steps=2", "training.learning_rate=0.003",
    "training.save_total_limit=null", "training.per_device_train_batch_size=4", "training.logging_steps=1",
    "training.warmup_steps=1", "training.disable_tqdm=true", "training.use_cpu=true",
]  # fmt: skip


def recipe(output, *overrides) -> MLMRecipe:
    return load_recipe(MLMRecipe, RECIPES / "tiny-mlm.yaml", [f"output_dir={output}", *OVERRIDES, *overrides])


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_weights(folder, other):
    expected, found = (load_file(Path(path) / "model.safetensors") for path in (folder, other))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


WORKERS = ("training.dataloader_num_workers=2", "training.gradient_accumulation_steps=3")


@pytest.fixture(scope="module", name="run")
def undisturbed_run(tmp_path_factory):
    """A run with two workers, three batches a step, packed batches and held-out documents; uninterrupted."""
    folder = tmp_path_factory.mktemp("run")
    mlm.train(recipe(folder, "peak_tflops=0.001", *WORKERS))
    return folder
