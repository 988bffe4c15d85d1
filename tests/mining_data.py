"""Pairs, random models and a recipe, for the tests of hard-negative mining."""

import json
from pathlib import Path

import pytest
import zstandard
from conftest import REPOSITORY, SHIPPED
from datasets import load_dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, set_seed

from training.mining_recipe import MiningRecipe
from training.recipe import load_recipe

RECIPES = REPOSITORY / "training" / "recipes"
PAIRS = [json.loads(line) for line in (REPOSITORY / "tests/data/pairs.jsonl").read_text().splitlines()]
SHAPE = {
    "vocab_size": 30528, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def random_model(folder: Path, seed: int) -> str:
    """A sentence-transformers model of one random layer, mean pooling."""
    set_seed(seed)
    BertModel(BertConfig(**SHAPE)).save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(SHIPPED, model_max_length=64).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(name="models", scope="module")
def random_models(tmp_path_factory) -> dict[str, str]:
    """Folders of two embedding models and a cross-encoder."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: random_model(root / name, seed) for seed, name in enumerate(("first", "second"))}
    set_seed(5)
    reader = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1))
    reader.save_pretrained(root / "cross")
    AutoTokenizer.from_pretrained(SHIPPED, model_max_length=64).save_pretrained(root / "cross")
    return {**folders, "cross": str(root / "cross")}


def rows_of(source: str) -> list[dict[str, str | None]]:
    """Rows of the two sources: pairs, and in them what must not become a row or a negative."""
    pairs = [{"query": pair["query"], "positive": pair["positive"]} for pair in PAIRS]
    if source == "facts":
        shared = {"query": pairs[0]["query"], "positive": pairs[3]["positive"]}
        junk = [{"query": "", "positive": "x"}, {"query": "Same  text", "positive": "same text"}]
        return [*pairs[:50], shared, *junk, {"query": pairs[7]["query"], "positive": None}, pairs[9]]
    loud = {"query": f" {pairs[0]['query'].upper()} ", "positive": pairs[60]["positive"].upper()}
    echo = {"query": pairs[61]["query"], "positive": f"{pairs[0]['query']}\n"}  # a passage with the text of a query
    return [*pairs[50:90], loud, echo]


@pytest.fixture(name="data", scope="module")
def written_sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for source in ("facts", "more"):
        lines = "".join(json.dumps(row) + "\n" for row in rows_of(source))
        (root / f"{source}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    with open(root / "corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"body": pair["positive"]}) + "\n" for pair in PAIRS[80:110])
    return root


RECIPE = """
data_dir: {data}
sources: [{{name: facts, path: facts.jsonl.zst}}, {{name: more, path: more.jsonl.zst}}]
retrievers: [{{name: first, model: {first}, quota: 4}}, {{name: bm25, model: bm25, quota: 3}}]
teacher: {{model: {second}, margin: 0.0}}
num_negatives: 8
depth: 20
query_block: 32
shard_rows: 20
embedding_rows: 25
embeddings_dir: {vectors}
"""


@pytest.fixture(name="recipe")
def loaded_recipe(models, data, tmp_path):
    """Loads the recipe with overrides; each call has an output folder of its own."""
    path, made = tmp_path / "recipe.yaml", iter(range(100))
    path.write_text(RECIPE.format(data=data, vectors=data / "vectors", **models))

    def load(*overrides: str) -> MiningRecipe:
        return load_recipe(MiningRecipe, path, [f"output_dir={tmp_path / f'out{next(made)}'}", *overrides])

    load.path = path
    return load


def mined(recipe: MiningRecipe) -> dict[str, list[dict]]:
    """The rows of each source, as `datasets` reads them."""
    rows = {}
    for source in recipe.sources:
        files = sorted(str(file) for file in (Path(recipe.output_dir) / "mined" / source.name).iterdir())
        kind = "parquet" if recipe.format == "parquet" else "json"
        rows[source.name] = load_dataset(kind, data_files=files, split="train").to_list() if files else []
    return rows
