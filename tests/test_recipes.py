"""Recipes and sources: what is wrong is said before the first step, with its name."""

import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, SHIPPED
from omegaconf import OmegaConf
from transformers import AutoTokenizer, TrainingArguments

from modeling_jina_bert import JinaBertConfig, JinaBertModel
from training.mlm import build_model
from training.recipe import (
    ContrastiveRecipe,
    MLMRecipe,
    RecipeError,
    Source,
    accumulation_steps,
    load_recipe,
    training_arguments,
)
from training.source_files import check_columns, open_source
from training.sources import sequences

RECIPES = sorted(
    path
    for path in (REPOSITORY / "training" / "recipes").glob("*.yaml")
    if path.stem.endswith(("-mlm", "-pairs", "-hard-negatives"))
)
"""Those of the three stages; what prepares data, mines and distils is in the tests of those."""


def schema_of(path):
    return MLMRecipe if path.stem.endswith("mlm") else ContrastiveRecipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_published_recipe_is_valid(path):
    recipe = load_recipe(schema_of(path), path)
    known = {name for name in TrainingArguments.__dataclass_fields__}
    assert set(recipe.training) <= known
    assert all(source.url for source in recipe.sources), "name the public source of each set"
    if isinstance(recipe, MLMRecipe):
        assert recipe.mlm_probability == 0.3
    else:
        assert recipe.temperature == 0.05
        assert recipe.num_negatives == (15 if "hard" in path.stem else 0)


def test_all_sizes_have_all_stages():
    names = {path.stem for path in RECIPES}
    assert {
        f"{s}-{v}" for s in ("tiny", "small", "base", "large") for v in ("mlm", "pairs", "hard-negatives")
    } <= names


@pytest.mark.parametrize(
    ("size", "parameters"), [("small", 32_690_688), ("base", 137_368_320), ("large", 435_188_736)]
)
def test_the_recipes_have_the_papers_shapes(size, parameters):
    recipe = load_recipe(MLMRecipe, RECIPES[0].with_name(f"{size}-mlm.yaml"))
    with torch.device("meta"):
        model = JinaBertModel(JinaBertConfig(**recipe.model))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=1", "lerning_rate"),
        ("sources=[{name: x, colour: red}]", "colour"),
        ("sources.0.weight=2", "incompatible container types"),
        ("max_length=many", "max_length"),
        ("sources=[]", "sources is empty"),
    ],
)
def test_a_wrong_key_or_value_is_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(MLMRecipe, RECIPES[0].with_name("tiny-mlm.yaml"), [override])


def test_a_missing_recipe_is_named():
    with pytest.raises(RecipeError, match=r"no-such\.yaml"):
        load_recipe(MLMRecipe, "no-such.yaml")


def test_what_is_no_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(MLMRecipe, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml"):
        load_recipe(MLMRecipe, tmp_path / "latin.yaml")
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(RecipeError, match=r"a\.yaml: extends itself, by way of a\.yaml"):
        load_recipe(MLMRecipe, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_attention_heads=3", "not a multiple"),
        ("model.num_attention_heads=0", "num_attention_heads=0"),
        ("model.hidden_size=wide", "hidden_size"),
        ("model.feed_forward_type=original", "feed_forward_type"),
        ("model.hidden_dropout_prob=7", "dropout probability"),
    ],
)
def test_a_model_that_cannot_be_is_one_line(override, message):
    recipe = load_recipe(MLMRecipe, RECIPES[0].with_name("tiny-mlm.yaml"), [override])
    with pytest.raises(RecipeError, match=f"^model: .*{message}") as error:
        build_model(recipe, AutoTokenizer.from_pretrained(SHIPPED))
    assert "\n" not in str(error.value)


def test_batches_of_nothing_are_refused(tmp_path):
    recipe = MLMRecipe(output_dir=str(tmp_path), training={"per_device_train_batch_size": 0}, global_batch_size=64)
    with pytest.raises(RecipeError, match="per_device_train_batch_size=0 is no number from 1"):
        training_arguments(TrainingArguments, recipe)
    with pytest.raises(RecipeError, match="per_device_train_batch_size=0 is no number from 1"):
        accumulation_steps(recipe, 1)


@pytest.mark.parametrize(
    ("training", "message"),
    [({"warmup_ratios": 0.1}, "warmup_ratios"), ({"remove_unused_columns": True}, "decided by this stage")],
)
def test_training_arguments_are_checked(tmp_path, training, message):
    recipe = MLMRecipe(output_dir=str(tmp_path), training=training)
    with pytest.raises(RecipeError, match=message):
        training_arguments(TrainingArguments, recipe, remove_unused_columns=False)


def test_a_bare_no_of_yaml_is_no_strategy(tmp_path):
    overrides = [f"output_dir={tmp_path}", "training.eval_strategy=no", "training.save_strategy=no"]
    recipe = load_recipe(MLMRecipe, RECIPES[0].with_name("tiny-mlm.yaml"), overrides)
    arguments = training_arguments(TrainingArguments, recipe)
    assert (arguments.eval_strategy, arguments.save_strategy) == ("no", "no")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "nothing-here.jsonl"}, "no file matches"),
        ({"path": "empty.jsonl"}, "is empty"),
        ({"path": "vectors.npy"}, "is none of"),
        ({}, "exactly one of path and hub"),
        ({"path": "a.jsonl", "hub": "b"}, "exactly one of path and hub"),
    ],
)
def test_unreadable_sources_are_named(tmp_path, source, message):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "vectors.npy").write_bytes(b"x")
    with pytest.raises(RecipeError, match=message) as error:
        open_source(Source(name="mine", **source), str(tmp_path), streaming=True)
    assert "mine" in str(error.value)


def test_a_missing_column_is_named():
    source = Source(name="mine", path="pairs.jsonl", text="body")
    dataset = open_source(source, str(REPOSITORY / "tests/data"), streaming=True)
    with pytest.raises(RecipeError, match="source mine: no column 'body'; it has query, positive"):
        check_columns(dataset, source, ["body"])


@pytest.mark.parametrize("form", ["cut", "split"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet", ".txt"])
def test_every_file_type_gives_the_same_sequences(tmp_path, suffix, form):
    import zstandard
    from datasets import Dataset

    texts = [" ".join(f"word{i} {j}" for j in range(40)) for i in range(5)]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        Dataset.from_dict({"text": texts}).to_parquet(str(path))
    elif suffix == ".txt":
        path.write_text("\n".join(texts) + "\n")
    else:
        lines = "".join(f'{{"text": "{text}"}}\n' for text in texts).encode()
        path.write_bytes(zstandard.compress(lines) if suffix.endswith(".zst") else lines)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    recipe = MLMRecipe(data_dir=str(tmp_path), max_length=50, long_documents=form)
    found = [row["input_ids"] for row in sequences(recipe, [Source(name="x", path=path.name)], tokenizer)]
    whole = tokenizer(texts)["input_ids"]
    assert all(len(ids) <= 50 and ids[0] == 101 and ids[-1] == 102 for ids in found)
    if form == "cut":
        assert found == [[*ids[:49], 102] for ids in whole]
    else:
        assert sum(len(ids) - 2 for ids in found) == sum(len(ids) - 2 for ids in whole)  # nothing is lost


@pytest.mark.parametrize("verb", ["mlm", "pairs", "hard_negatives"])
def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, verb):
    recipe = tmp_path / "recipe.yaml"
    OmegaConf.save({"output_dir": str(tmp_path), "typo": 1}, recipe)
    process = subprocess.run(
        [sys.executable, "-m", f"training.{verb}", "--config", str(recipe)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.returncode == 2
    assert "typo" in process.stderr.strip().splitlines()[-1]
    assert "Traceback" not in process.stderr
