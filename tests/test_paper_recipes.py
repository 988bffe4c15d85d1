"""The recipes of the paper's road at full size, and what every published source of pairs says of itself.

Laws: prepare, stage II, mine, stage III name each other's outputs; retrieval sets have mined negatives, the others
random ones, all_nli its own; a kind and a licence go into the report, the recipe and the card of what was trained.
"""

import re
import signal
from pathlib import Path

import pytest
from conftest import REPOSITORY
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from training import pair_preparation
from training.contrastive import add_sources
from training.distillation import DistillationRecipe
from training.mining_recipe import MiningRecipe, check
from training.pair_recipe import PairRecipe
from training.pair_report import _sources as report_table
from training.pair_sources import load_sources
from training.recipe import ContrastiveRecipe, RecipeError, Source, SourceKind, load_recipe

RECIPES = REPOSITORY / "training" / "recipes"
SCHEMAS = {
    "preparation": PairRecipe, "mining": MiningRecipe, "pairs": ContrastiveRecipe, "negatives": ContrastiveRecipe,
    "distillation": DistillationRecipe,
}  # fmt: skip
PAIRS = {path: SCHEMAS[end] for path in sorted(RECIPES.glob("*.yaml")) if (end := path.stem.split("-")[-1]) in SCHEMAS}


def published(name: str):
    path = RECIPES / f"{name}.yaml"
    return load_recipe(PAIRS[path], path)


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_every_published_source_of_pairs_says_what_it_is(path):
    sources = load_recipe(PAIRS[path], path).sources
    assert len({source.name for source in sources}) == len(sources)
    for source in sources:
        assert isinstance(source.kind, SourceKind), source.name
        assert source.licence, source.name
        assert (source.hub is None) != (source.path is None), source.name


def test_the_recipes_of_the_newcomers_page_load_and_lead_from_one_to_the_next(tmp_path):
    page = (REPOSITORY / "training" / "STAGES.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n# (mine-[a-z-]+)\.yaml.*?\n(.*?)```", page, flags=re.DOTALL)
    recipes = {}
    for name, text in blocks:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.replace("extends: training/recipes", f"extends: {RECIPES}"))
        recipes[name] = load_recipe(SCHEMAS[name.split("-")[-1]], path)
    assert list(recipes) == ["mine-preparation", "mine-pairs", "mine-mining", "mine-hard-negatives"]
    preparation, pairs, mining, last = recipes.values()
    names = [source.name for source in preparation.sources]
    assert [source.name for source in pairs.sources] == [source.name for source in last.sources] == names
    assert pairs.data_dir == mining.data_dir == f"{preparation.output_dir}/pairs"
    assert mining.retrievers[0].model == last.model == f"{pairs.output_dir}/final"
    assert [source.name for source in mining.sources] == [s.name for s in preparation.sources if s.is_minable]
    assert (preparation.consistency.top, last.num_negatives, last.fill_negatives) == (2, 15, "random")


def test_the_road_at_full_size_is_one():
    preparation, pairs, mining, last = map(
        published, ("small-pairs-preparation", "small-pairs", "small-mining", "small-hard-negatives")
    )
    assert (preparation.consistency.pool, preparation.consistency.top) == (1_000_000, 2)
    prepared = {source.name: source for source in preparation.sources}
    assert len(prepared) == 40
    assert all(source.url == f"https://huggingface.co/datasets/{source.hub}" for source in prepared.values())
    folder = Path(preparation.output_dir).relative_to(pairs.data_dir)
    too_small = {"mr_tydi", "billsum", "squad"}  # for a batch of eight GPUs
    assert {source.name: source.path for source in pairs.sources} == {
        name: f"{folder}/pairs/{name}/*.parquet" for name in prepared if name not in too_small
    }
    for recipe in (pairs, mining, last):
        for source in recipe.sources:
            assert (source.kind, source.licence) == (prepared[source.name].kind, prepared[source.name].licence)
    mined = {source.name for source in mining.sources}
    assert {"msmarco", "natural_questions"} <= mined
    assert {prepared[name].kind for name in mined} == {SourceKind.retrieval, SourceKind.qa}
    assert mining.retrievers[0].model == last.model == f"{pairs.output_dir}/final"
    for source in last.sources:
        if source.name in mined:
            assert source.path == f"{Path(mining.output_dir).name}/mined/{source.name}/*.{mining.format}"
            assert source.negatives == "negatives"
        elif source.name != "all_nli":
            assert source.path == f"{folder}/pairs/{source.name}/*.parquet"
            assert source.negatives is None
    assert last.fill_negatives == "random"
    assert mining.num_negatives == last.num_negatives == 15


def test_the_preparation_at_full_size_is_a_chain_of_slurm_jobs(tmp_path):
    recipe = published("small-pairs-preparation")
    recipe.output_dir = str(tmp_path)
    handler = signal.getsignal(signal.SIGUSR1)
    chain = pair_preparation.executors(recipe, pair_preparation.stages(recipe), job="pairs")
    signal.signal(signal.SIGUSR1, handler)
    assert {name: executor.tasks for name, executor in chain.items()} == {
        "read": 256, "duplicates": 64, "clean": 256, "choose": 1, "pool": 256, "consistency": 256, "report": 1,
    }  # fmt: skip
    assert [executor.depends for executor in chain.values()] == [None, *list(chain.values())[:-1]]
    assert chain["pool"].get_sbatch_args()["gres"] == chain["consistency"].get_sbatch_args()["gres"] == "gpu:1"
    assert "gres" not in chain["read"].get_sbatch_args()


def test_near_duplicates_are_no_negatives(tmp_path):
    """Their column of negatives is not read, whatever it holds, and mining refuses them."""
    rows = [f'{{"query": "question {i}", "positive": "wording {i}", "negatives": ["near {i}"]}}\n' for i in range(9)]
    (tmp_path / "x.jsonl").write_text("".join(rows))
    changes = {"data_dir": str(tmp_path), "num_negatives": 2, "fill_negatives": "random"}
    found = {}
    for kind in (SourceKind.qa, SourceKind.duplicates, SourceKind.paraphrase, SourceKind.citation):
        source = Source(name="mine", path="x.jsonl", kind=kind)
        found[kind] = load_sources(ContrastiveRecipe(sources=[source], **changes))["mine"]
    assert all(row["negative_1"].startswith("near") for row in found[SourceKind.qa])
    for kind in (SourceKind.duplicates, SourceKind.paraphrase, SourceKind.citation):
        assert all(row[f"negative_{i}"].startswith("wording") for row in found[kind] for i in (1, 2))
        mining = published("tiny-mining")
        mining.sources = [Source(name="mine", path="x.jsonl", kind=kind)]
        with pytest.raises(RecipeError, match=f"source mine: what is near {kind.value} may match"):
            check(mining)


def test_an_unknown_kind_is_named_with_those_there_are():
    with pytest.raises(RecipeError, match=r"'essay', expected one of \[retrieval, qa, .*kind"):
        load_recipe(ContrastiveRecipe, RECIPES / "tiny-pairs.yaml", ["sources=[{name: a, path: b, kind: essay}]"])


def test_kind_and_licence_go_into_report_and_card(tmp_path):
    sources = [
        Source(
            name="asked", path="a.csv", kind=SourceKind.title_body, licence="CC0", url="https://example.org", weight=2
        ),
        Source(name="mine", path="b.csv"),
    ]
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# A model\n")
    add_sources(card, ContrastiveRecipe(sources=sources))
    loaded = ModelCard.load(card)
    assert loaded.data.license == "mit"
    table = [
        "| asked | 2 | title body | CC0 | https://example.org |",
        "| mine | 1 | not stated | not stated | b.csv |",
    ]
    assert loaded.text.splitlines()[-2:] == table
    rows = OmegaConf.to_container(OmegaConf.structured(PairRecipe(sources=sources)), enum_to_str=True)["sources"]
    assert report_table(rows)[2:] == [
        "| asked | title body | CC0 | https://example.org |", "| mine | not stated | not stated | b.csv |",
    ]  # fmt: skip
