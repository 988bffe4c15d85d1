"""LoRA on both published layouts, in the official form: what is trained, saved, loaded elsewhere and merged.

Laws, of stages II and III: only adapters are trained; the adapter beside its base, and the merged folder, give the
same embeddings in a process that has not got our package; a resumed run is the uninterrupted one.
"""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, REPOSITORY, run_as_stranger
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from modeling_jina_bert import JinaBertModel
from training import contrastive
from training.lora import add_lora, merge_lora
from training.recipe import ContrastiveRecipe, LoraRecipe, RecipeError, load_recipe

LAYOUTS = {
    "A-small4h": {"query", "key", "value", "dense", "gated_layers", "wo"},
    "B-8h": {"query", "key", "value", "dense", "up_gated_layer", "down_layer"},
}
TEXTS = ["How is the weather today?", "", "A longer text, of many words. " * 5]


def recipe(layout: str, output, *changes: str, stage: str = "pairs") -> ContrastiveRecipe:
    file = "triplets" if "hard" in stage else "pairs"
    return load_recipe(
        ContrastiveRecipe,
        REPOSITORY / "training" / "recipes" / f"tiny-{stage}.yaml",
        [
            f"model={GOLDEN / layout}", f"output_dir={output}", f"data_dir={REPOSITORY / 'tests' / 'data'}",
            f"sources=[{{name: facts, path: {file}.jsonl}}]", "max_length=32", "lora={r: 4, alpha: 8, dropout: 0.1}",
            "training.max_steps=4", "training.save_steps=2", "training.per_device_train_batch_size=8",
            "training.learning_rate=0.01", "training.warmup_steps=0", "training.disable_tqdm=true",
            "training.use_cpu=true", *changes,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An adapter trained for each layout: its folder of output."""
    root = tmp_path_factory.mktemp("lora")
    for layout in LAYOUTS:
        contrastive.train(recipe(layout, root / layout))
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_linear_layer_of_the_encoder_gets_an_adapter_and_nothing_else_is_trained(layout, tmp_path):
    model = contrastive.load_model(recipe(layout, tmp_path))
    before = model.encode(TEXTS)
    add_lora(model, LoraRecipe(r=4))
    np.testing.assert_allclose(model.encode(TEXTS), before, atol=1e-6)  # a new adapter adds nothing
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert {name.rpartition(".")[2] for name in adapted} == LAYOUTS[layout]
    assert len(adapted) == 6 * 3  # of 3 layers; not the pooler
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(adapted)
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    # Merged, with weights that matter: the same embeddings, and the parameters of a plain model.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = model.encode(TEXTS)
    assert abs(expected - before).max() > 0.01
    merge_lora(model)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    plain = JinaBertModel.from_pretrained(GOLDEN / layout)
    assert set(model[0].auto_model.state_dict()) == set(plain.state_dict())
    with pytest.raises(ValueError, match="no adapter"):
        merge_lora(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_leaves_the_base_as_it_was(runs, layout):
    base = JinaBertModel.from_pretrained(GOLDEN / layout).state_dict()
    for name, tensor in load_file(runs / layout / "base" / "model.safetensors").items():
        torch.testing.assert_close(tensor, base[name], rtol=0, atol=0)
    saved = load_file(runs / layout / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 6 * 3
    assert all(tensor.abs().max() > 0 for tensor in saved.values())
    merged = load_file(runs / layout / "final" / "model.safetensors")
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert {name.split(".")[-2] for name in changed} == LAYOUTS[layout]
    assert not any("pooler" in name for name in changed)
    assert not (runs / layout / "final" / "adapter_config.json").exists()


LOAD = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
output, *texts = sys.argv[1:]
folders = [f"{layout}/{kind}" for layout in ("A-small4h", "B-8h") for kind in ("adapter", "final")]
vectors = [
    SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(texts) for folder in folders
]
np.save(output, np.stack(vectors))
"""


def test_adapter_and_merged_folder_are_one_in_a_fresh_process(runs, tmp_path):
    process = run_as_stranger(LOAD, tmp_path / "vectors.npy", *TEXTS, cwd=runs)
    assert process.returncode == 0, process.stderr[-2000:]
    a, a_merged, b, b_merged = np.load(tmp_path / "vectors.npy")
    for layout, adapter, merged in (("A-small4h", a, a_merged), ("B-8h", b, b_merged)):
        np.testing.assert_allclose(adapter, merged, atol=1e-5)
        ours = SentenceTransformer(str(runs / layout / "final"), trust_remote_code=True, device="cpu").encode(TEXTS)
        np.testing.assert_allclose(merged, ours, atol=1e-5)
        assert abs(ours - contrastive.load_model(recipe(layout, runs / layout)).encode(TEXTS)).max() > 0.01


def test_resumed_equals_uninterrupted(runs, tmp_path):
    checkpoint = runs / "A-small4h" / "checkpoint-2"
    assert "adapter_model.safetensors" in json.loads((checkpoint / "complete.json").read_text())
    resumed = contrastive.train(recipe("A-small4h", tmp_path / "run"), resume=str(checkpoint))
    expected = load_file(runs / "A-small4h" / "final" / "model.safetensors")
    for name, tensor in load_file(resumed / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    with pytest.raises(RecipeError, match=r"is a checkpoint of an adapter, the recipe's of a whole model"):
        contrastive.train(recipe("A-small4h", tmp_path / "whole", "lora=null"), resume=str(checkpoint))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stage_three_trains_the_adapters_alone_and_resumes(layout, tmp_path):
    """With three negatives a row, through the cached loss."""
    changes = ("num_negatives=3", "mini_batch_tokens=200")
    final = contrastive.train(recipe(layout, tmp_path / "run", *changes, stage="hard-negatives"))
    base = JinaBertModel.from_pretrained(GOLDEN / layout).state_dict()
    for name, tensor in load_file(tmp_path / "run" / "base" / "model.safetensors").items():
        torch.testing.assert_close(tensor, base[name], rtol=0, atol=0)
    merged = load_file(final / "model.safetensors")
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert {name.split(".")[-2] for name in changed} == LAYOUTS[layout]
    adapted, plain = (
        SentenceTransformer(str(tmp_path / "run" / kind), trust_remote_code=True, device="cpu").encode(TEXTS)
        for kind in ("adapter", "final")
    )
    np.testing.assert_allclose(adapted, plain, atol=1e-5)
    resumed = contrastive.train(
        recipe(layout, tmp_path / "resumed", *changes, stage="hard-negatives"),
        resume=str(tmp_path / "run" / "checkpoint-2"),
    )
    for name, tensor in load_file(resumed / "model.safetensors").items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraRecipe(targets=["query", "up_gated_layer"]), "'up_gated_layer' is no linear layer of this model; it has"),
        (LoraRecipe(r=0), "lora.r=0"),
        (LoraRecipe(dropout=1.0), "lora.dropout=1.0"),
    ],
)
def test_adapters_that_cannot_be_are_refused(tmp_path, lora, message):
    with pytest.raises(RecipeError, match=message):
        add_lora(contrastive.load_model(recipe("A-small4h", tmp_path)), lora)
