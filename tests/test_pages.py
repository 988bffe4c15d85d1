"""The recipes that the pages of `training/` show to newcomers are what the code takes, and the first one trains."""

import json
import re

import pytest
from conftest import REPOSITORY
from mlm_runs import log

from training import mlm
from training.mining_recipe import MiningRecipe
from training.pair_recipe import PairRecipe
from training.recipe import ContrastiveRecipe, MLMRecipe, load_recipe

SCHEMAS = {
    "mine.yaml": MLMRecipe,
    "mine-preparation.yaml": PairRecipe,
    "mine-pairs.yaml": ContrastiveRecipe,
    "mine-mining.yaml": MiningRecipe,
    "mine-hard-negatives.yaml": ContrastiveRecipe,
}


def shown_recipes(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "training" / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The working folder of a newcomer, with the repository's folders in it."""
    for name in ("training", "hub_repo"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_newcomers_first_recipe_trains(root):
    (shown,) = shown_recipes("README.md")
    (root / "mine.yaml").write_text(shown, encoding="utf-8")
    texts = [json.loads(line)["text"] for line in (REPOSITORY / "tests/data/corpus.jsonl").open(encoding="utf-8")]
    rows = [json.dumps({"text": f"{number}: {text}"}) for text in texts for number in range(1 + 300 // len(texts))]
    (root / "texts").mkdir()
    (root / "texts" / "one.jsonl").write_text("\n".join(rows[::2]), encoding="utf-8")
    (root / "texts" / "two.jsonl").write_text("\n".join(rows[1::2]), encoding="utf-8")
    small = ["model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=24", "max_length=32"]
    short = ["training.max_steps=2", "training.eval_steps=2", "training.logging_steps=1", "training.use_cpu=true"]
    final = mlm.train(load_recipe(MLMRecipe, root / "mine.yaml", [*small, *short, "heldout_sequences=8"]))
    assert final.resolve() == root.resolve() / "runs" / "mine" / "final"
    assert (final / "config.json").is_file()
    entries = log(root / "runs" / "mine")
    assert any("eval_accuracy" in entry for entry in entries)
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2]


def test_the_recipes_of_the_later_stages_are_valid(root):
    shown = shown_recipes("STAGES.md")
    assert len(shown) == 4
    for text in shown:
        name = text.split()[1].rstrip(":")
        (root / name).write_text(text, encoding="utf-8")
        recipe = load_recipe(SCHEMAS[name], root / name)
        assert recipe.output_dir == f"runs/{name.removesuffix('.yaml')}"
        assert {source.licence for source in recipe.sources} == {"your own"}
