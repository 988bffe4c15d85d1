"""Pair preparation: what every step removes, to the pair; the same result in whatever order, however often killed.

The sets are those of `pair_data`.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import REPOSITORY, SHIPPED
from pair_data import (  # noqa: F401  pytest finds the fixtures by name
    FACTS,
    ROWS,
    SWAPPED,
    recipe,
    write,
    written_sets,
)

from training import pair_preparation
from training.consistency import Pool, compared, load_pool, load_teacher, smallest_hashes
from training.corpus_recipe import Executor
from training.pair_recipe import Consistency, check, step_names
from training.recipe import RecipeError, Source, save_recipe
from training.source_files import open_source


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """The output folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("finished") / "prepared"
    pair_preparation.prepare(recipe(data, output))
    return output


def kept(output: Path, folder: str = "pairs") -> Counter:
    """(source, query, positive) of all files, read as stage II reads a source."""
    found = Counter()
    for name in ("letters", "notes"):
        if any((output / folder / name).glob("*.parquet")):
            rows = open_source(Source(name=name, path=f"{name}/*.parquet"), str(output / folder), streaming=True)
            found.update((name, row["query"], row["positive"]) for row in rows)
    return found


def steps(output: Path) -> dict[str, dict]:
    return {step["step"]: step for step in json.loads((output / "report.json").read_text())["steps"]}


def plain(text: str) -> str:
    return " ".join(text.split()).lower()


def test_every_step_removes_what_it_is_for(finished):
    counts = {
        step: [row["removed"][name] for name in ("letters", "notes", "all")] for step, row in steps(finished).items()
    }
    assert counts == {
        "empty": [2, 2, 4],
        "identical": [1, 2, 3],
        "duplicate": [2, 2, 4],  # a copy in both sources stays in the first
        "language": [1, 1, 2],
        "consistency": [2, 3, 5],
    }
    assert steps(finished)["language"]["reasons"] == {"de": 1, "fr": 1}
    facts = Counter((name, plain(q), plain(p)) for name, pairs in FACTS.items() for q, p in pairs)
    assert Counter((name, plain(q), plain(p)) for name, q, p in kept(finished).elements()) == facts


def test_the_report_adds_up_and_shows_what_went(finished):
    report = json.loads((finished / "report.json").read_text())
    for name, pairs in ROWS.items():
        assert report["steps"][0]["before"][name] == len(pairs)
        assert report["steps"][-1]["kept"][name] == len(FACTS[name]) == report["files"][name]["pairs"]
    for step in report["steps"]:
        for key in ("before", "removed", "kept"):
            assert step[key]["all"] == step[key]["letters"] + step[key]["notes"]
        for name in ("letters", "notes", "all"):
            assert step["removed"][name] == step["before"][name] - step["kept"][name]
            assert step["share"][name] == pytest.approx(step["removed"][name] / step["before"][name], abs=1e-6)
            assert name == "all" or len(step["examples"][name]) == min(step["removed"][name], 3)
    for earlier, later in itertools.pairwise(report["steps"]):
        assert earlier["kept"] == later["before"]
    shown = report["steps"][-1]["examples"]["notes"]
    assert {(row["query"], row["positive"]) for row in shown} == set(SWAPPED["notes"])
    assert all(row["cosine"] < row["rival"] for row in shown)
    passages = {plain(p) for group in (FACTS, SWAPPED) for pairs in group.values() for _, p in pairs}
    assert report["consistency"]["pool"] == len(passages)
    assert not {"output_dir", "data_dir"} & set(report["recipe"])
    page = (finished / "report.md").read_text()
    assert "| duplicate | 27 | 4 | 14.81% | 23 |" in page
    assert "By language: de 1, fr 1." in page
    assert "`Was ist ein Gletscher?`" in page


def test_the_consistency_filter_agrees_with_ranking_every_passage(finished):
    teacher = load_teacher(Consistency(teacher=str(SHIPPED)))
    pairs = sorted(kept(finished, "clean"))
    assert len(pairs) == 21
    passages = sorted({plain(p): p for _, _, p in pairs}.values())
    queries = teacher.embed([q for _, q, _ in pairs], "query").astype(np.float64)
    cosines = queries @ teacher.embed(passages, "document").astype(np.float64).T
    nearest = np.argsort(-cosines, axis=1)
    for top in (1, 2):
        expected = {
            pair
            for pair, row in zip(pairs, nearest, strict=True)
            if plain(pair[2]) in {plain(passages[i]) for i in row[:top]}
        }
        if top == 2:
            assert set(kept(finished)) == expected
        positives = teacher.embed([p for _, _, p in pairs], "document")
        ours = compared(queries.astype(np.float32), positives, load_pool(finished / "work" / "pool").index, top)
        assert {pair for pair, (own, rival) in zip(pairs, ours, strict=True) if own >= rival - 1e-5} == expected


def test_a_place_in_the_pool_is_by_hand():
    pool = faiss.IndexFlatIP(2)
    pool.add(np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1]], np.float32))
    query, own = np.array([[1, 0]], np.float32), np.array([[0.6, 0.8]], np.float32)
    assert compared(query, own, pool, 1).tolist() == pytest.approx(np.array([[0.6, 1.0]]))
    assert compared(query, own, pool, 2)[0].tolist() == pytest.approx([0.6, 1.0])
    assert compared(query, own, pool, 3)[0].tolist() == pytest.approx([0.6, 0.6])  # its own copy takes no place
    assert compared(query, own, pool, 5)[0].tolist() == pytest.approx([0.6, -1.0])


def test_a_positive_of_the_pool_has_the_vector_of_the_pool():
    """Its own copy, rounded otherwise in another batch, would push it out of its place."""
    index = faiss.IndexFlatIP(2)
    index.add(np.array([[1, 0], [0.6, 0.8]], np.float32))
    pool = Pool(index, np.array([9, 5], np.uint64))
    rounded = np.array([[0.6, 0.79], [0, 1], [0.5, 0.5]], np.float32)
    own = pool.with_its_own(np.array([5, 7, 2**63 + 9], np.uint64), rounded)
    np.testing.assert_array_equal(own, np.array([[0.6, 0.8], [0, 1], [0.5, 0.5]], np.float32))
    query = np.array([[0.6, 0.8]], np.float32)
    assert compared(query, rounded[:1], index, 1)[0, 0] < compared(query, rounded[:1], index, 1)[0, 1]
    assert compared(query, own[:1], index, 1)[0].tolist() == pytest.approx([1, 1])


def test_the_pairs_that_stay_do_not_depend_on_order_files_or_tasks(data, tmp_path):
    alone = {"language": None, "consistency": None}
    pair_preparation.prepare(recipe(data, tmp_path / "first", **alone))
    first = kept(tmp_path / "first")
    for seed, parts, tasks, buckets in ((5, 1, 1, 1), (6, 3, 4, 5)):
        other, output = write(tmp_path / f"data-{seed}", ROWS, parts=parts, seed=seed), tmp_path / f"out-{seed}"
        pair_preparation.prepare(recipe(other, output, buckets=buckets, executor=Executor(tasks=tasks), **alone))
        assert kept(output) == first  # to the letter: of each pair the same copy stays
    groups = {(plain(q or ""), plain(p or "")) for pairs in ROWS.values() for q, p in pairs}
    assert len(first) == len({(q, p) for q, p in groups if q and p and q != p})
    assert step_names(recipe(data, tmp_path, **alone)) == ["empty", "identical", "duplicate"]


def test_pool_and_sample_are_of_the_size_asked_for_and_do_not_depend_on_tasks(data, tmp_path):
    consistency = Consistency(teacher=str(SHIPPED), pool=7, pairs_per_source=6)
    for tasks in (1, 3):
        changes = {"language": None, "consistency": consistency, "executor": Executor(tasks=tasks)}
        pair_preparation.prepare(recipe(data, tmp_path / str(tasks), **changes))
    assert kept(tmp_path / "1") == kept(tmp_path / "3")
    for output in (tmp_path / "1", tmp_path / "3"):
        assert {name: steps(output)["sample"]["kept"][name] for name in ("letters", "notes")} == {
            "letters": 6,
            "notes": 6,
        }
        assert load_pool(output / "work" / "pool").index.ntotal == 7
        assert "At most 6 pairs of each source were judged" in (output / "report.md").read_text()
    for part, numbers in enumerate(([9, 3, 5], [3, 1], [])):
        np.save(tmp_path / f"{part}.npy", np.array(numbers, np.uint64))
    assert smallest_hashes(sorted(tmp_path.glob("?.npy")), 3).tolist() == [1, 3, 5]


def test_the_teacher_reads_what_it_has_not_kept(data, finished, tmp_path, caplog):
    """With `cache_dir` the same pairs stay, and another preparation finds the vectors."""
    caplog.set_level("INFO", logger="training.embedding_shards")
    consistency = Consistency(teacher=str(SHIPPED), pool=1000, cache_dir=str(tmp_path / "vectors"))
    read = []
    for name in ("first", "second"):
        caplog.clear()
        pair_preparation.prepare(recipe(data, tmp_path / name, consistency=consistency, executor=Executor(tasks=1)))
        read.append([int(record.args[1]) for record in caplog.records if "to embed" in record.msg])
    assert kept(tmp_path / "first") == kept(tmp_path / "second") == kept(finished)
    assert sum(read[0]) > 0
    assert sum(read[1]) == 0


KILLED = """
import os, signal, sys
from training import consistency, pair_filters, pair_preparation
from training.pair_recipe import PairRecipe
from training.recipe import load_recipe

recipe = load_recipe(PairRecipe, sys.argv[1])
pair_preparation.check(recipe)  # what it imports the children have

def killing(owner, name, call):
    function, calls = getattr(owner, name), []
    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name, counted)

points = {
    "reading": (pair_filters, "tally", 20),  # the second task
    "publishing": (pair_filters.os, "replace", 2),  # between the two files of a task
    "embedding": (consistency.np, "savez", 2),
    "judging": (consistency, "compared", 2),
}
for name, point in points.items():
    if os.fork() == 0:
        killing(*point)
        pair_preparation.prepare(recipe)
        os._exit(0)
    _, status = os.wait()
    print(name, os.WTERMSIG(status), ",".join(sorted(os.listdir(recipe.output_dir + "/logs"))), flush=True)
"""


def test_killed_and_resumed_equals_uninterrupted(data, finished, tmp_path):
    output = tmp_path / "prepared"
    save_recipe(recipe(data, output), tmp_path / "recipe")
    program = [sys.executable, "-c", KILLED, str(tmp_path / "recipe" / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a forked child has none of its parent's threads
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(
            program, stdout=out, stderr=err, cwd=REPOSITORY, env=environment, start_new_session=True
        )
        assert process.wait() == 0, (tmp_path / "err").read_text()[-3000:]
    with contextlib.suppress(ProcessLookupError):  # the managers of killed executors
        os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "out").read_text().splitlines() == [
        "reading 9 read",
        "publishing 9 read",
        "embedding 9 choose,clean,duplicates,pool,read",
        "judging 9 choose,clean,consistency,duplicates,pool,read",
    ]
    done = {file: file.stat().st_mtime_ns for file in output.glob("logs/*/completions/*")}
    assert 12 <= len(done) < 16  # of 16 tasks some of the last stages are left
    pair_preparation.prepare(recipe(data, output))
    assert {file: file.stat().st_mtime_ns for file in done} == done  # what had finished did not run again
    for folder in ("clean", "pairs"):
        assert kept(output, folder) == kept(finished, folder)
        assert not any((output / folder / ".incomplete").glob("*"))
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (output, finished))
    assert {**ours, "seconds": None} == {**theirs, "seconds": None}


def test_results_of_another_recipe_are_not_touched(data, finished, tmp_path):
    check(recipe(data, finished, executor=Executor(tasks=3, workers=2)))  # other workers: the same results
    for changes, message in (
        ({"seed": 1}, "there seed is 42, here 1"),
        ({"executor": Executor(tasks=4)}, "there executor.tasks is 3, here 4"),
        ({"consistency": None}, "there consistency is .*, here None"),
    ):
        with pytest.raises(RecipeError, match=message):
            pair_preparation.prepare(recipe(data, finished, **changes))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RecipeError, match="holds no pair preparation"):
        pair_preparation.prepare(recipe(data, tmp_path))
