"""From raw text to a folder that a stranger loads: the three stages on the lines in tests/data, export, retrieval.

Also pins: a run that stops and resumes ends where the uninterrupted one does; what is wrong is said before the first
step.
"""

import json

import pytest
import torch
from conftest import REPOSITORY, SHIPPED, run_as_stranger
from omegaconf import OmegaConf
from safetensors.torch import load_file

from hub_repo.export import export
from modeling_jina_bert import modeling_jina_bert
from training import contrastive, mlm
from training.recipe import ContrastiveRecipe, MLMRecipe, RecipeError, load_recipe

DATA = REPOSITORY / "tests" / "data"
RECIPES = REPOSITORY / "training" / "recipes"
SHAPE = (
    "model={vocab_size: 30528, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 48}"
)
QUICK = ["training.logging_steps=1", "training.warmup_steps=1", "training.disable_tqdm=true", "training.use_cpu=true"]


def mlm_recipe(output, *overrides) -> MLMRecipe:
    return load_recipe(
        MLMRecipe,
        RECIPES / "tiny-mlm.yaml",
        [
            f"output_dir={output}", f"tokenizer={SHIPPED}", f"data_dir={DATA}",
            "sources=[{name: facts, path: corpus.jsonl}]", "heldout=[{name: facts, path: corpus.jsonl}]",
            SHAPE, "model.hidden_dropout_prob=0.1", "max_length=64",
            "heldout_sequences=8", "training.max_steps=6", "training.save_steps=3", "training.learning_rate=0.003",
            "training.per_device_train_batch_size=8", *QUICK, *overrides,
        ],
    )  # fmt: skip


def contrastive_recipe(name, model, output, *overrides) -> ContrastiveRecipe:
    file = "triplets" if "hard" in name else "pairs"
    return load_recipe(
        ContrastiveRecipe,
        RECIPES / f"{name}.yaml",
        [
            f"output_dir={output}", f"model={model}", f"data_dir={DATA}",
            f"sources=[{{name: facts, path: {file}.jsonl}}]", "max_length=32",
            "training.max_steps=4", "training.save_steps=2", "training.per_device_train_batch_size=8",
            *QUICK, *overrides,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    backbone = mlm.train(mlm_recipe(root / "mlm"))
    pairs = contrastive.train(contrastive_recipe("tiny-pairs", backbone, root / "pairs"))
    final = contrastive.train(
        contrastive_recipe("tiny-hard-negatives", pairs, root / "hard", "training.per_device_train_batch_size=4")
    )
    return {"root": root, "mlm": backbone, "pairs": pairs, "hard": final}


def weights(folder) -> dict[str, torch.Tensor]:
    return {name.removeprefix("bert."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}


def test_each_stage_changes_the_weights_of_the_one_before(stages):
    before = weights(stages["mlm"])
    for stage in ("pairs", "hard"):
        after = weights(stages[stage])
        name = "encoder.layer.0.attention.self.query.weight"
        assert torch.isfinite(after[name]).all()
        assert not torch.equal(before[name], after[name])
        before = after


def test_logs_and_recipes_lie_beside_the_checkpoints(stages):
    for stage, step in (("mlm", 6), ("pairs", 4), ("hard", 4)):
        folder = stages["root"] / stage
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        assert len(losses) == step
        assert OmegaConf.load(folder / f"checkpoint-{step}" / "recipe.yaml").training.max_steps == step
    entries = [json.loads(line) for line in (stages["root"] / "mlm" / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["eval_masked_tokens"] > 50
    assert 0 <= entries[-1]["eval_accuracy"] <= 1


RETRIEVE = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
folder, *texts = sys.argv[1:]
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
vectors = model.encode(texts)
print(int(np.argmax(vectors[1:] @ vectors[0])))
"""


def test_the_exported_folder_retrieves_in_a_fresh_process(stages, tmp_path):
    folder = export(str(stages["hard"]), tmp_path / "hub")
    pairs = [json.loads(line) for line in (DATA / "pairs.jsonl").read_text().splitlines()][:3]
    texts = [pair["positive"] for pair in pairs]
    process = run_as_stranger(RETRIEVE, folder, texts[1], *texts, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == "1"


def test_an_export_that_differs_from_the_checkpoint_is_refused(stages, tmp_path, monkeypatch):
    import hub_repo.export as module

    def corrupted(tensors, path, metadata):
        save(({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}), path, metadata=metadata)

    save = module.save_file
    monkeypatch.setattr(module, "save_file", corrupted)
    with pytest.raises(RuntimeError, match="other vectors than the checkpoint"):
        export(str(stages["hard"]), tmp_path / "hub")


@pytest.mark.parametrize("stage", ["mlm", "pairs"])
def test_resumed_equals_uninterrupted(stages, tmp_path, stage):
    if stage == "mlm":
        train, whole, half = mlm.train, mlm_recipe(tmp_path / "run"), 3
    else:
        train, whole, half = contrastive.train, contrastive_recipe("tiny-pairs", stages["mlm"], tmp_path / "run"), 2
    checkpoint = stages["root"] / stage / f"checkpoint-{half}"
    resumed = train(whole, resume=str(checkpoint))
    expected, found = weights(stages[stage]), weights(resumed)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert min(entry["step"] for entry in entries) == half + 1


def test_a_checkpoint_of_another_model_is_refused(stages, tmp_path):
    checkpoint = str(stages["root"] / "mlm" / "checkpoint-3")
    with pytest.raises(RecipeError, match="another model: its intermediate_size is 48, the recipe's is 64"):
        mlm.train(mlm_recipe(tmp_path / "run", "model.intermediate_size=64"), resume=checkpoint)


@pytest.mark.parametrize(
    ("overrides", "resume", "message"),
    [
        (["model.hidden=3"], None, r"model\.hidden is not a field"),
        (["model.vocab_size=100"], None, "below the tokenizer's 30522"),
        (["training.max_steps=-1"], None, "max_steps must be set"),
        (["long_documents=drop"], None, "neither 'cut' nor 'split'"),
        ([], True, "there is no checkpoint"),
        ([], "/nowhere", "not a checkpoint"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(tmp_path, overrides, resume, message):
    with pytest.raises(RecipeError, match=message):
        mlm.train(mlm_recipe(tmp_path / "run", *overrides), resume=resume)


def test_a_finished_run_is_not_overwritten(stages):
    with pytest.raises(RecipeError, match="pass --resume"):
        mlm.train(mlm_recipe(stages["root"] / "mlm"))


def run_stage(stages, stage, output, *overrides):
    if stage == "mlm":
        return mlm.train(mlm_recipe(output, *overrides))
    name, start = {"pairs": ("tiny-pairs", "mlm"), "hard": ("tiny-hard-negatives", "pairs")}[stage]
    overrides = (*overrides, *(["training.per_device_train_batch_size=4"] if stage == "hard" else []))
    return contrastive.train(contrastive_recipe(name, stages[start], output, *overrides))


def losses(folder) -> list[float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("stage", ["mlm", "pairs", "hard"])
def test_activation_checkpointing_changes_nothing(stages, tmp_path, stage, monkeypatch):
    calls = []
    attention = modeling_jina_bert.JinaBertSelfAttention
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    folder = run_stage(stages, stage, tmp_path / "run", "training.activation_checkpointing=true")
    with_checkpointing = len(calls)
    calls.clear()
    run_stage(stages, stage, tmp_path / "plain")
    assert with_checkpointing > 1.5 * len(calls) > 0  # the layers ran again in the backward pass
    expected = weights(stages[stage])
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("stage", ["mlm", "pairs", "hard"])
def test_bf16_on_the_cpu(stages, tmp_path, stage):
    run_stage(stages, stage, tmp_path / "run", "training.bf16=true")
    expected, found = losses(stages["root"] / stage), losses(tmp_path / "run")
    assert found != expected
    assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["mlm", "pairs", "hard"])
def test_bf16_on_a_gpu(stages, tmp_path, stage):
    run_stage(stages, stage, tmp_path / "run", "training.bf16=true", "training.use_cpu=false")
    assert losses(tmp_path / "run") == pytest.approx(losses(stages["root"] / stage), rel=0.05)


@pytest.mark.parametrize(
    "size", [pytest.param("small", marks=pytest.mark.slow), pytest.param("base", marks=pytest.mark.slow), "large"]
)
def test_the_full_size_recipes_run(tmp_path, size):
    """Every recipe as it is, bf16, accumulation and cached loss included; only shape, data and steps shrink."""
    tiny = [*QUICK, "training.max_steps=1", "training.use_cpu=true", f"data_dir={DATA}", "training.optim=adamw_torch"]
    backbone = mlm.train(
        load_recipe(
            MLMRecipe,
            RECIPES / f"{size}-mlm.yaml",
            [
                *tiny, f"output_dir={tmp_path / 'mlm'}", f"tokenizer={SHIPPED}", "heldout_sequences=2",
                "sources=[{name: facts, path: corpus.jsonl}]", "heldout=[{name: facts, path: corpus.jsonl}]",
                "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=4",
                "model.intermediate_size=48", "training.per_device_train_batch_size=2", "shuffle_buffer=10",
                "training.gradient_accumulation_steps=2", "training.dataloader_num_workers=0",
            ],
        )
    )  # fmt: skip
    assert json.loads((backbone / "config.json").read_text())["feed_forward_type"] == (
        "reglu" if size == "large" else "geglu"
    )
    model = backbone
    for stage, file in (("pairs", "pairs"), ("hard-negatives", "triplets")):
        model = contrastive.train(
            load_recipe(
                ContrastiveRecipe,
                RECIPES / f"{size}-{stage}.yaml",
                [
                    *tiny, f"output_dir={tmp_path / stage}", f"model={model}", "mini_batch_size=4",
                    f"sources=[{{name: facts, path: {file}.jsonl, heldout_share: 0.2}}]",
                    "training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1",
                    "training.dataloader_num_workers=0",
                ],
            )
        )  # fmt: skip
        assert len(losses(tmp_path / stage)) == 1
