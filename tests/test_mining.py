"""Hard-negative mining: exact whatever the blocks, never a known positive, the same output however often it is killed.

Also pins: results equal those of sentence-transformers' `mine_hard_negatives` on the same settings; a text is embedded
once; every candidate is counted once; stage III reads the rows. Models are random: what is asked of them is the order
of their own scores.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import REPOSITORY, SHIPPED
from datasets import Dataset, load_dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import mine_hard_negatives
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, set_seed

from training import mining, mining_texts, mining_timing
from training.contrastive import load_sources
from training.embedding_shards import Embedder, Vectors, VectorStore, embed, load_embedder
from training.mining_recipe import MiningRecipe, Retriever, check
from training.mining_search import BM25Search, DenseSearch, block_rows, top_k
from training.mining_texts import Texts, normalised, text_hashes
from training.negative_filters import (
    Candidates,
    Reason,
    chosen,
    drawn,
    remove_by_rank,
    remove_known,
    remove_repeated,
    remove_unread,
)
from training.recipe import ContrastiveRecipe, RecipeError, load_recipe

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


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
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


@pytest.fixture
def recipe(models, data, tmp_path):
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


def shards(folder: Path, vectors: np.ndarray, rows: int, order: np.ndarray | None = None) -> Vectors:
    """Vectors in files of `rows`, text i in place `order[i]`."""
    folder.mkdir(parents=True)
    place = np.arange(len(vectors)) if order is None else order
    stored = np.empty_like(vectors)
    stored[place] = vectors
    files = [folder / f"{start:04d}.npy" for start in range(0, len(vectors), rows)]
    for number, file in enumerate(files):
        np.save(file, stored[number * rows : (number + 1) * rows].astype(np.float16))
    return Vectors(files, place // rows, place % rows)


def unit_vectors(rows: int, width: int = 24) -> np.ndarray:
    """Random vectors of length 1 that float16 holds exactly."""
    vectors = np.random.default_rng(rows).standard_normal((rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def best(queries: np.ndarray, passages: np.ndarray, k: int) -> np.ndarray:
    """The slow obvious ranking."""
    scores = queries.astype(np.float64) @ passages.astype(np.float64).T
    ranking = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    gaps = -np.diff(np.take_along_axis(scores, ranking, axis=1))
    assert gaps.min() > 1e-7, "choose other vectors: float32 cannot tell two of them apart"
    return ranking


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_merging_blocks_is_exact_whatever_their_size(tmp_path, rows):
    passages, queries = unit_vectors(301), unit_vectors(13)
    stored = shards(tmp_path / "passages", passages, 50, np.random.default_rng(0).permutation(301))
    np.testing.assert_array_equal(stored.take(np.array([300, 0, 299])), passages[[300, 0, 299]])
    assert sorted(np.concatenate([ids for ids, _ in stored.blocks(rows)])) == list(range(301))
    np.testing.assert_array_equal(top_k(queries, stored.blocks(rows), 20), best(queries, passages, 20))


def test_equals_are_ordered_and_what_is_missing_is_minus_one():
    passages = np.eye(4, dtype=np.float32)[[0, 1, 0, 1, 0]]
    blocks = [(np.array([4, 1]), passages[[4, 1]]), (np.array([2, 3, 0]), passages[[2, 3, 0]])]
    found = top_k(np.eye(4, dtype=np.float32)[:1], blocks, 7)
    assert found.tolist() == [[0, 2, 4, 1, 3, -1, -1]]


def test_less_memory_gives_smaller_blocks_and_the_same_results(tmp_path, monkeypatch):
    passages, queries = shards(tmp_path / "p", unit_vectors(5000), 512), shards(tmp_path / "q", unit_vectors(13), 5)
    sizes, blocks = [], Vectors.blocks
    monkeypatch.setattr(Vectors, "blocks", lambda self, rows: sizes.append(rows) or blocks(self, rows))
    small = block_rows(65, width=24, queries=13, k=20)
    found = [DenseSearch(queries, passages, Retriever(), memory_mb=mb).search(np.arange(13), 20) for mb in (65, 500)]
    np.testing.assert_array_equal(*found)
    assert sizes[0] == small < 5000 < sizes[1]
    assert 64 * 2**20 + small * (10 * 24 + 16) <= 65 * 2**20
    with pytest.raises(RecipeError, match="memory_mb=64 is too little"):
        block_rows(64, width=24, queries=13, k=20)


def test_ivf_that_probes_all_lists_is_exact_and_one_list_is_not(tmp_path):
    passages, queries = unit_vectors(400), unit_vectors(13)
    stored, asked = shards(tmp_path / "p", passages, 100), shards(tmp_path / "q", queries, 13)
    expected = best(queries, passages, 10)
    for probes, exact in ((8, True), (1, False)):
        retriever = Retriever(name="ivf", index="ivf", lists=8, probes=probes)
        found = DenseSearch(asked, stored, retriever, memory_mb=100).search(np.arange(13), 10)
        assert (found == expected).all() == exact
        assert np.isin(found[:, 0], expected).any()
    with pytest.raises(RecipeError, match="lists=500, but there are 400 passages"):
        DenseSearch(asked, stored, Retriever(name="ivf", index="ivf", lists=500), memory_mb=100)


def test_bm25_finds_words_and_says_minus_one_where_there_are_none():
    passages = Texts.of(["a red fox sleeps", "the green river", "", "red red river"])
    search = BM25Search(Texts.of(["river", "fox red", "zebra", ""]), passages)
    found = search.search(np.arange(4), 6)
    assert found[:, :2].tolist() == [[1, 3], [0, 3], [-1, -1], [-1, -1]]
    assert (found[:, 2:] == -1).all()
    assert (BM25Search(Texts.of(["x"]), Texts.of(["", "."])).search(np.arange(1), 3) == -1).all()


class CountingModel:
    """An embedder's model whose encoded texts are counted, and that fails on demand."""

    def __init__(self, embedder: Embedder):
        self.encode_document_, self.texts, self.left = embedder.model.encode_document, [], None
        embedder.model.encode_document = self

    def __call__(self, texts, **options):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.texts += texts
        return self.encode_document_(texts, **options)


def test_a_text_is_embedded_once_for_a_model_and_length(models, tmp_path):
    texts = [pair["positive"] for pair in PAIRS[:30]]
    options = {"folder": tmp_path, "dtype": "float16", "shard_rows": 8}

    def embedded(model: str, texts: list[str], max_length: int = 32, kill_after: int | None = None):
        embedder = load_embedder(models[model], max_length=max_length, batch_size=4, device="cpu")
        counting = CountingModel(embedder)
        counting.left = kill_after
        try:
            return embed(embedder, Texts.of(texts), "document", **options), counting.texts
        except KeyboardInterrupt:
            return None, counting.texts

    assert embedded("first", texts, kill_after=2)[1] == texts[:16]
    vectors, rest = embedded("first", texts)
    assert rest == texts[16:]
    options["folder"] = tmp_path / "uninterrupted"
    whole, every = embedded("first", texts)
    assert every == texts
    np.testing.assert_array_equal(vectors.take(np.arange(30)), whole.take(np.arange(30)))
    np.testing.assert_allclose(np.linalg.norm(whole.take(np.arange(30)), axis=1), 1, atol=2e-3)
    # Another order, a subset and a new text: only the new one is embedded.
    mixed, new = embedded("first", [texts[20], "something new", texts[3]])
    assert new == ["something new"]
    np.testing.assert_array_equal(mixed.take(np.array([2, 0])), whole.take(np.array([3, 20])))
    assert len(embedded("first", texts, max_length=16)[1]) == 30
    other, every = embedded("second", texts)
    assert len(every) == 30
    assert not np.allclose(other.take(np.arange(30)), whole.take(np.arange(30)), atol=0.01)


def test_a_damaged_shard_is_named(tmp_path):
    store = VectorStore(tmp_path, {"role": "query"}, dtype="float32")
    store.add(text_hashes(["a", "b"]), np.ones((2, 3)))
    store.shards[0].write_bytes(store.shards[0].read_bytes()[:-4])
    with pytest.raises(RecipeError, match=r"000000.npy is damaged"):
        Vectors(store.shards, np.zeros(2, int), np.arange(2))


def theirs(model: str, pairs: list[dict], **settings) -> dict[tuple[str, str], list[str]]:
    rows = mine_hard_negatives(
        Dataset.from_list(pairs), SentenceTransformer(model, device="cpu"), output_format="n-tuple", verbose=False,
        **settings,
    )  # fmt: skip
    names = [name for name in rows.column_names if name.startswith("negative")]
    return {(row["query"], row["positive"]): [row[name] for name in names] for row in rows}


@pytest.mark.parametrize(
    ("ours", "settings"),
    [
        (["skip=2", "depth=12"], {"range_min": 2, "range_max": 12}),
        (["depth=79", "teacher.margin=0.02"], {"range_max": 79, "absolute_margin": 0.02}),
        (
            ["depth=79", "teacher.margin=null", "teacher.relative_margin=0.05"],
            {"range_max": 79, "relative_margin": 0.05},
        ),
    ],
    ids=["ranks", "margin", "relative-margin"],
)
def test_equals_sentence_transformers(models, tmp_path, recipe, ours, settings):
    pairs = [{"query": pair["query"], "positive": pair["positive"]} for pair in PAIRS[:80]]
    teacher = [f"teacher={{model: {models['first']}}}"]
    if "range_min" in settings:  # several positives of a query; their margin is held against the least of them
        pairs += [{"query": PAIRS[0]["query"], "positive": PAIRS[index]["positive"]} for index in (5, 6)]
        teacher = ["teacher=null"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ours = recipe(
        f"data_dir={tmp_path}", "sources=[{name: pairs, path: pairs.jsonl}]", "dtype=float32", "fill=drop",
        f"retrievers=[{{name: first, model: {models['first']}}}]", "num_negatives=5", *teacher, *ours,
    )  # fmt: skip
    report = mining.mine(ours)["sources"]["pairs"]
    found = {(row["query"], row["positive"]): row["negatives"] for row in mined(ours)["pairs"]}
    expected = theirs(models["first"], pairs, num_negatives=5, **settings)
    assert found == expected
    assert len(found) == report["complete"] >= 20
    assert ("TEACHER" in report["reasons"]) == ("range_min" not in settings)


def test_no_negative_is_a_known_positive_the_query_or_there_twice(recipe):
    ours = recipe("teacher=null", "corpus={name: corpus, path: corpus.jsonl, text: body}", "depth=60")
    report = mining.mine(ours)
    positives = {}
    for source in ("facts", "more"):
        for row in rows_of(source):
            if row["query"] and row["positive"]:
                positives.setdefault(normalised(row["query"]), set()).add(normalised(row["positive"]))
    first = positives[normalised(PAIRS[0]["query"])]
    assert len(first) == 3, "two sources, one of them in capitals, give the query its positives"
    rows = [row for found in mined(ours).values() for row in found]
    corpus = {normalised(pair["positive"]) for pair in PAIRS[90:110]}
    for row in rows:
        negatives = [normalised(text) for text in row["negatives"]]
        assert len(set(negatives)) == len(negatives) == 8
        assert not positives[normalised(row["query"])] & {*negatives}
        assert normalised(row["query"]) not in negatives
    assert any(corpus & set(map(normalised, row["negatives"])) for row in rows), "the corpus gives negatives, too"
    assert report["passages"] == len({passage for known in positives.values() for passage in known} | corpus) - 1
    facts, more = report["sources"]["facts"], report["sources"]["more"]
    assert {name: facts[name] for name in ("read", "empty", "identical", "repeated", "rows")} == {
        "read": 55, "empty": 2, "identical": 1, "repeated": 1, "rows": 51,
    }  # fmt: skip
    assert len(mined(ours)["facts"]) == 51
    assert len(mined(ours)["more"]) == more["rows"] == 42
    assert facts["reasons"]["QUERY"] > 0
    assert facts["reasons"]["REPEATED"] > 0
    for counts in (facts, more):
        assert sum(counts["reasons"].values()) == counts["retrieved"]
        assert counts["taken"]["bm25"] >= 2 * counts["rows"]
        assert counts["taken"]["first"] >= 4 * counts["rows"]


def test_the_margin_of_the_teacher_and_of_the_cross_encoder_holds_for_every_negative(recipe, models):
    ours = recipe(
        "teacher.margin=0.05",
        "fill=fewer",
        f"cross_encoder={{model: {models['cross']}, margin: 0.01, candidates: 12}}",
    )
    report = mining.mine(ours)["sources"]
    teacher = SentenceTransformer(models["second"], device="cpu")
    reader = CrossEncoder(models["cross"], device="cpu")
    rows = [row for found in mined(ours).values() for row in found if row["negatives"]]
    assert len(rows) > 10
    for row in rows[::5]:
        texts = [row["positive"], *row["negatives"]]
        vectors = teacher.encode([row["query"], *texts], normalize_embeddings=True)
        for scores, margin in (
            (vectors[1:] @ vectors[0], 0.05),
            (reader.predict([(row["query"], text) for text in texts]), 0.01),
        ):
            assert (scores[0] - scores[1:] > margin - 1e-3).all()
    for counts in report.values():
        assert counts["reasons"]["TEACHER"] > 0
        assert counts["reasons"]["CROSS_ENCODER"] > 0
        assert counts["examples"][0]["score"] > counts["examples"][0]["negatives"][0]["score"]


def test_rows_with_too_few_negatives_are_filled_left_short_or_dropped(recipe):
    # The two rankings overlap, so that many rows find fewer than 8.
    filled, short, dropped = (
        recipe("teacher=null", "depth=5", f"fill={fill}") for fill in ("random", "fewer", "drop")
    )
    reports = [mining.mine(ours)["sources"]["facts"] for ours in (filled, short, dropped)]
    rows = [
        {(row["query"], row["positive"]): row["negatives"] for row in mined(ours)["facts"]}
        for ours in (filled, short, dropped)
    ]
    complete = reports[0]["complete"]
    assert 0 < complete < 51
    assert all(report["complete"] == complete for report in reports)
    assert reports[0]["filled"] == 51 - complete
    assert reports[0]["random"] == sum(8 - len(negatives) for negatives in rows[1].values())
    assert all(len(negatives) == 8 == len(set(negatives)) for negatives in rows[0].values())
    assert reports[1]["short"] == sum(len(negatives) < 8 for negatives in rows[1].values()) == 51 - complete
    assert reports[2]["dropped"] == 51 - complete
    assert len(rows[2]) == complete
    for pair, negatives in rows[1].items():
        assert rows[0][pair][: len(negatives)] == negatives, "the mined ones come first"
    nothing = recipe("teacher.margin=1.9", "fill=drop")
    with pytest.raises(RecipeError, match="the filters left no row of any source"):
        mining.mine(nothing)
    assert (Path(nothing.output_dir) / "report.md").is_file()


def test_what_a_judge_removed_is_not_drawn_at_random(recipe):
    # Every passage is ranked and judged, so nothing that may be drawn is left.
    report = mining.mine(recipe("teacher.margin=0.08", "depth=200", "fill=random"))["sources"]["facts"]
    assert report["reasons"]["TEACHER"] > 0
    assert report["complete"] < report["rows"]
    assert report["random"] == report["filled"] == 0


def test_random_choice_depends_on_the_seed_alone_and_stays_in_the_window(recipe):
    options = ["teacher=null", "choose=random", "skip=1", "depth=20"]
    first, again, other = (recipe(*options, f"seed={seed}") for seed in (1, 1, 2))
    reports = [mining.mine(ours) for ours in (first, again, other)]
    assert mined(first) == mined(again) != mined(other)
    assert reports[0] == reports[1]
    top = recipe("teacher=null", "skip=1", "depth=20")
    assert mining.mine(top)["sources"]["facts"]["rank_sum"] < reports[0]["sources"]["facts"]["rank_sum"]
    counts = reports[0]["sources"]["facts"]
    assert counts["reasons"]["SKIPPED"] >= 51
    assert counts["reasons"]["DEEPER"] > 0


class Killed(BaseException):
    pass


def output(folder: str) -> dict[str, bytes]:
    """What a run leaves for its user."""
    root = Path(folder)
    files = [*(root / "mined").rglob("*"), root / "report.json", root / "report.md"]
    return {str(file.relative_to(root)): file.read_bytes() for file in files if file.is_file()}


def killed_at_every_write(recipe: MiningRecipe, monkeypatch) -> Counter:
    """Runs until it is through; the first time a file would get its name the run dies, and its partial file stays."""
    replace, seen = os.replace, Counter()

    def replace_or_die(source, target):
        seen[target] += 1
        if seen[target] == 1:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(mining_texts.os, "replace", replace_or_die)
    for _ in range(100):
        try:
            mining.mine(recipe)
            break
        except Killed:
            pass
    monkeypatch.undo()
    return Counter(Path(target).parent.name for target in seen)


def killed_by_the_system(recipe: MiningRecipe, path: Path):
    """Runs the command in a process of its own, until the sources are read."""
    command = [sys.executable, "-m", "training.mining", "--config", str(path), f"output_dir={recipe.output_dir}"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (Path(recipe.output_dir) / "work" / "texts").exists():
        time.sleep(0.02)
    with pytest.raises(RecipeError, match="another run is at work there"):
        mining.mine(recipe)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow  # some forty runs that load their models, and a process of its own
def test_killed_and_gone_on_the_output_is_the_same(recipe, tmp_path, monkeypatch):
    whole, often, once = recipe(f"embeddings_dir={tmp_path / 'v'}"), recipe("embeddings_dir=null"), recipe()
    mining.mine(whole)
    writes = killed_at_every_write(often, monkeypatch)
    assert output(often.output_dir) == output(whole.output_dir)
    assert writes["first"] == writes["bm25"] == 3, "blocks of queries"
    assert writes["facts"] == writes["more"] == 6, "files of rows, and their counts"
    assert sum(writes.values()) > 30
    killed_by_the_system(once, recipe.path)
    mining.mine(once)
    assert output(once.output_dir) == output(whole.output_dir)


@pytest.mark.parametrize("form", ["jsonl.zst", "parquet"])
def test_stage_three_reads_the_rows(recipe, form):
    ours = recipe(f"format={form}")
    mining.mine(ours)
    stage = load_recipe(
        ContrastiveRecipe,
        RECIPES / "tiny-hard-negatives.yaml",
        [f"data_dir={ours.output_dir}", f"sources=[{{name: facts, path: mined/facts/*.{form}}}]",
         "num_negatives=8", "fill_negatives=error"],
    )  # fmt: skip
    rows = load_sources(stage)["facts"]
    assert len(rows) == 51
    assert rows.column_names == ["anchor", "positive", *(f"negative_{i}" for i in range(1, 9))]
    assert [rows[0][f"negative_{i}"] for i in range(1, 9)] == mined(ours)["facts"][0]["negatives"]


def test_an_output_folder_keeps_to_its_recipe_and_files(recipe, data, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(data, copied)
    ours = recipe(f"data_dir={copied}", "teacher=null", "retrievers=[{name: words, model: bm25}]")
    mining.mine(ours)
    before = output(ours.output_dir)
    mining.mine(ours)
    assert output(ours.output_dir) == before
    ours.depth = 30
    with pytest.raises(RecipeError, match="there depth is 20, here 30"):
        mining.mine(ours)
    ours.depth = 20
    (copied / "more.jsonl.zst").write_bytes((copied / "facts.jsonl.zst").read_bytes())
    with pytest.raises(RecipeError, match=r"more.jsonl.zst has changed since"):
        mining.mine(ours)


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


def test_models_that_cannot_serve_are_named(models, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"model .*empty: cannot be loaded"):
        load_embedder(str(tmp_path / "empty"), max_length=None, batch_size=4)
    with pytest.raises(RecipeError, match="max_length=65, but it has 64 positions"):
        load_embedder(models["first"], max_length=65, batch_size=4)
    embedder = load_embedder(models["first"], max_length=8, batch_size=4, device="cpu")
    embedder.model.encode_document = lambda texts, **options: np.full((len(texts), 3), np.nan, np.float32)
    with pytest.raises(RecipeError, match="2 vectors are not finite; the first is of 'a'"):
        embedder.embed(["a", "b"], "document")


def test_quotas_come_first_and_the_rest_goes_by_rank():
    candidates = Candidates(np.arange(10)[None], widths=[5, 5])
    candidates.ranks[:] = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    candidates.reasons[0, [0, 6]] = 7
    assert chosen(candidates, 0, wanted=4, quotas=[0, 0]).tolist() == [5, 1, 2, 7]
    assert chosen(candidates, 0, wanted=4, quotas=[3, 1]).tolist() == [5, 1, 2, 3]
    assert chosen(candidates, 0, wanted=4, quotas=[0, 4]).tolist() == [5, 7, 8, 9]
    assert chosen(candidates, 0, wanted=20, quotas=[9, 9]).tolist() == [5, 1, 2, 7, 3, 8, 4, 9]
    remove_unread(candidates, 3)
    assert np.flatnonzero(candidates.left()[0]).tolist() == [1, 2, 5]


def test_what_one_retriever_skips_is_not_taken_from_another():
    candidates = Candidates(np.array([[3, 4, 5, 6, 4, 3], [9, 8, 7, 8, 6, -1]]), widths=[3, 3])
    remove_known(candidates, [np.array([4]), np.empty(0, np.int64)], np.array([-1, 7]))
    remove_by_rank(candidates, skip=1, depth=2)
    remove_repeated(candidates)
    names = [[Reason(reason).name for reason in row] for row in candidates.reasons]
    assert names[0] == ["SKIPPED", "POSITIVE", "LEFT", "SKIPPED", "POSITIVE", "SKIPPED"]
    assert names[1] == ["SKIPPED", "SKIPPED", "QUERY", "SKIPPED", "LEFT", "NOTHING"]
    assert candidates.ranks.tolist() == [[1, 0, 2, 1, 0, 2], [1, 2, 0, 1, 2, 0]]


def test_random_passages_avoid_what_is_excluded():
    generator, pool = np.random.default_rng(0), np.arange(10) * 3
    assert sorted(drawn(pool, {0, 3, 28}, 20, generator)) == [6, 9, 12, 15, 18, 21, 24, 27]
    counts = Counter(passage for _ in range(500) for passage in drawn(pool, {0}, 3, generator))
    assert set(counts) == set(pool.tolist()) - {0}
    assert min(counts.values()) > 100


def test_the_published_recipe_is_valid_and_names_its_sources():
    published = load_recipe(MiningRecipe, RECIPES / "tiny-mining.yaml")
    assert published.num_negatives == 15
    assert published.teacher.margin == 0.2
    assert sum(retriever.quota for retriever in published.retrievers) == 15
    assert all(source.url for source in published.sources)


def test_the_timing_searches_what_mining_searches_and_notices_an_inexact_one(tmp_path, monkeypatch, capsys):
    sizes = ["--passages", "3000", "--queries", "40", "--width", "16", "--k", "10", "--memory-mb", "70"]
    monkeypatch.setattr(sys, "argv", ["mining_timing", *sizes, "--output", str(tmp_path / "time.json")])
    mining_timing.main()
    result = json.loads((tmp_path / "time.json").read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert result["passages"] == 3000
    assert result["seconds"] >= 0
    assert result["passages_of_a_block"] > 1024
    monkeypatch.setattr(DenseSearch, "search", lambda self, queries, k: np.zeros((len(queries), k), np.int32))
    with pytest.raises(RuntimeError, match="other results than a product of all vectors"):
        mining_timing.main()
