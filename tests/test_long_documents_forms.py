"""The table of what `long_documents` costs: by hand on a few documents, and as the batches of stage I have it."""

import json
import sys

import pytest
from conftest import REPOSITORY, SHIPPED

from training import long_documents
from training.long_documents import tallies
from training.packing import Tally
from training.recipe import MLMRecipe, Source

RECIPE = REPOSITORY / "training" / "recipes" / "tiny512-mlm.yaml"


@pytest.fixture
def recipe(tmp_path) -> MLMRecipe:
    """Documents of 3, 10 and 25 tokens; at most 8 of one sequence are words."""
    rows = [json.dumps({"text": " ".join(["word"] * count)}) + "\n" for count in (3, 10, 25)]
    (tmp_path / "x.jsonl").write_text("".join([*rows, '{"text": " "}\n']))
    training = {"per_device_train_batch_size": 1}
    return MLMRecipe(
        data_dir=str(tmp_path), sources=[Source(name="x", path="x.jsonl")], max_length=10, training=training
    )


def test_shares_by_hand(recipe, tokenizer):
    found = tallies(recipe, tokenizer)
    cut, split, pack = found["cut"], found["split"], found["pack"]
    assert cut == Tally(sequences=3, tokens=5 + 10 + 10, positions=25, lost=2 + 17)
    assert cut.lost_share == pytest.approx(19 / 38)
    assert split == Tally(sequences=1 + 2 + 4, tokens=38 + 2 * 7, positions=52)
    assert pack.lost == 0
    recipe.training["per_device_train_batch_size"] = 3
    assert tallies(recipe, tokenizer)["cut"] == Tally(sequences=3, tokens=25, positions=30, lost=19)


def test_a_packed_batch_is_filled(recipe, tokenizer):
    recipe.training["per_device_train_batch_size"] = 3
    pack = tallies(recipe, tokenizer)["pack"]
    assert 3 <= pack.sequences < 7  # the last batch is open
    assert pack.tokens <= 30 * pack.sequences / 3


def test_the_command_prints_a_row_a_form(tmp_path, monkeypatch, capsys):
    sources = "sources=[{name: facts, path: corpus.jsonl}]"
    arguments = [f"data_dir={REPOSITORY / 'tests' / 'data'}", sources, f"tokenizer={SHIPPED}", "max_length=24"]
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(RECIPE), *arguments])
    long_documents.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == [
        "long_documents",
        "cut",
        "split",
        "pack",
    ]
    assert "| 0.0% |" in lines[-1]
