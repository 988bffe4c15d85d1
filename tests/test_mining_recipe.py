"""The recipe of hard-negative mining: what is wrong with it, or with its data, is one line."""

import runpy
import sys
from pathlib import Path

import pytest
from mining_data import (  # noqa: F401  pytest finds the fixtures by name
    RECIPES,
    loaded_recipe,
    random_models,
    written_sources,
)

from training.mining_recipe import MiningRecipe, check, input_files
from training.recipe import RecipeError, load_recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["retrievers=[]"], "retrievers is empty"),
        (["retrievers=[{name: a, model: runs/none/x}]"], "retriever a: there is no folder runs/none/x"),
        (["retrievers=[{name: a/b, model: bm25}]"], "'a/b' cannot name a folder"),
        (["retrievers=[{name: a, model: bm25}, {name: a, model: bm25}]"], "two are named 'a'"),
        (["retrievers=[{name: a, model: bm25, quota: 1}, {name: b, model: bm25}]"], "either all have a quota"),
        (["retrievers=[{name: a, model: bm25, quota: 9}]"], "sum above num_negatives=8"),
        (["retrievers=[{name: a, model: bm25, index: hnsw}]"], "index='hnsw' is neither"),
        (["teacher={model: bm25}"], "teacher: bm25 has no similarity"),
        (["teacher.margin=null"], "teacher: give margin or relative_margin"),
        (["cross_encoder={model: ./nowhere}"], "cross_encoder: there is no folder ./nowhere"),
        (["fill=zero"], "fill='zero' is none of random, fewer, drop"),
        (["format=csv"], "format='csv' is none of"),
        (["depth=0"], "depth=0 must be at least 1"),
        (["depth=9", "skip=6"], "leave 6 candidates for num_negatives=8"),
        (["skip=-1"], "must not be negative"),
        (["sources=[{name: a, path: none.jsonl}]"], "source a: no file matches"),
        (["sources=[{name: a, path: facts.jsonl.zst, anchor: question}]"], "source a: no column 'question'"),
        (["corpus={name: c, path: corpus.jsonl}"], "source c: no column 'text'"),
        (
            ["sources=[{name: a, path: facts.jsonl.zst, heldout_share: 0.1}]"],
            "source a: heldout_share is for training",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_any_work(recipe, overrides, message):
    ours = recipe(*overrides)
    with pytest.raises(RecipeError, match=message.replace("[", r"\[").replace(".", r"\.")):
        check(ours)
    assert not Path(ours.output_dir).exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"query": "a", "positive": "b"}\n{"query": "c", "pos', "source mine: cannot be read"),
        ('{"query": 3, "positive": "b"}\n', "source mine: column 'query' holds int, not text"),
        ('{"query": "a", "positive": "A "}\n', "source mine: all pairs are empty or have anchor == positive"),
    ],
    ids=["damaged", "numbers", "no-pair"],
)
def test_bad_input_ends_the_command_with_one_line_and_status_two(
    recipe, tmp_path, monkeypatch, capsys, lines, message
):
    (tmp_path / "mine.jsonl").write_text(lines)
    overrides = [f"data_dir={tmp_path}", "sources=[{name: mine, path: mine.jsonl}]", f"output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["mining", "--config", str(recipe.path), *overrides])
    with pytest.raises(SystemExit) as raised:
        runpy.run_module("training.mining", run_name="__main__", alter_sys=True)
    assert raised.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_the_files_of_a_pattern_are_known_wherever_it_begins(recipe, tmp_path, monkeypatch):
    """A change in one of them is seen when mining goes on."""
    (tmp_path / "part-1.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (f"{tmp_path}/part-*.jsonl", "~/part-*.jsonl"):
        ours = recipe(f"sources=[{{name: mine, path: '{path}'}}]")
        assert [file for file in input_files(ours) if file.endswith("part-1.jsonl")] == [f"{tmp_path}/part-1.jsonl"]


def test_the_published_recipe_is_valid_and_names_its_sources():
    published = load_recipe(MiningRecipe, RECIPES / "tiny-mining.yaml")
    assert published.num_negatives == 15
    assert published.teacher.margin == 0.2
    assert sum(retriever.quota for retriever in published.retrievers) == 15
    assert all(source.url for source in published.sources)
