"""Pair preparation: what every step removes, to the pair; the same result in whatever order, however often killed.

The sets are written here: short facts, copies of them in other case and spacing, pairs that are one text, empty ones,
other languages, positives of other queries. The teacher is the shipped model.
"""

import contextlib
import itertools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import faiss
import numpy as np
import pytest
import zstandard
from conftest import REPOSITORY, SHIPPED
from datasets import Dataset
from datatrove.data import Document

from training import pair_preparation
from training.consistency import compared, load_pool, load_teacher, smallest_hashes
from training.corpus_recipe import Executor
from training.pair_filters import (
    _SIGNATURE,
    PairLanguageFilter,
    copies,
    has_stop_words,
    likeliest_other,
    pair_document,
)
from training.pair_recipe import Consistency, PairLanguage, PairRecipe, check, step_names
from training.recipe import RecipeError, Source, load_recipe, save_recipe
from training.sources import open_source

RECIPES = REPOSITORY / "training" / "recipes"
AMONG = ["en", "de", "fr", "es"]  # all spoken languages take 13 s to load
FACTS = {
    "letters": [
        ("What is a volcano?", "A volcano is a mountain from which lava and ash erupt."),
        ("What does a bakery sell?", "A bakery sells bread, rolls and cakes that it bakes in the night."),
        ("How do whales breathe?", "Whales breathe air through a blowhole on the top of the head."),
        ("What is a violin?", "A violin is an instrument with four strings and is played with a bow."),
        ("When did the railway reach the town?", "The railway reached the town in 1862, with a station by the river."),
        ("What is photosynthesis?", "Photosynthesis is how plants make sugar from light, water and carbon dioxide."),
        ("How is cheese made?", "Cheese is made from milk that is curdled with rennet and left to ripen."),
        ("What is a telescope for?", "A telescope is for the observation of distant stars and planets."),
        ("Who repairs shoes?", "A cobbler is a person who repairs shoes and boots."),
    ],
    "notes": [
        ("What is a glacier?", "A glacier is a slow river of ice in the high mountains."),
        ("What is a compiler?", "A compiler is a program that translates source code to machine code."),
        ("How do bees make honey?", "Bees make honey from the nectar of flowers, and store it in the hive."),
        ("What is insulin?", "Insulin is a hormone of the pancreas that lowers the sugar in the blood."),
        ("What is an earthquake?", "An earthquake is a shaking of the ground, and is caused by faults."),
        ("What is a sonnet?", "A sonnet is a poem of fourteen lines with a fixed rhyme."),
        ("How does a magnet work?", "A magnet attracts iron by the field that its poles make."),
    ],
}
COPIES = {  # of pairs of either source; the first is a copy as it stands
    "letters": [FACTS["letters"][0], ("what is a  VIOLIN?", FACTS["letters"][3][1].upper())],
    "notes": [FACTS["letters"][1], (" What is\ta glacier?\n", FACTS["notes"][0][1].replace(" ", "\n", 2))],
}
IDENTICAL = {
    "letters": [("The same text.", "the  SAME text. ")],
    "notes": [("One", "One"), ("Two words", "two words")],
}
EMPTY = {"letters": [("", "No query."), (None, "Null.")], "notes": [("No positive?", " \n"), (None, None)]}
FOREIGN = {
    "letters": [("Was ist ein Gletscher?", "Ein Gletscher ist ein langsamer Strom aus Eis im hohen Gebirge.")],
    "notes": [("Qu'est-ce qu'un sonnet ?", "Un sonnet est un poème de quatorze vers avec des rimes fixes.")],
}
_TEXTS = [pair for pairs in FACTS.values() for pair in pairs]
SWAPPED = {  # a query and the answer to another one
    "letters": [(_TEXTS[0][0], _TEXTS[11][1]), (_TEXTS[6][0], _TEXTS[10][1])],
    "notes": [(_TEXTS[12][0], _TEXTS[4][1]), (_TEXTS[9][0], _TEXTS[8][1]), (_TEXTS[11][0], _TEXTS[7][1])],
}
GROUPS = (FACTS, COPIES, IDENTICAL, EMPTY, FOREIGN, SWAPPED)
ROWS = {name: [pair for group in GROUPS for pair in group[name]] for name in ("letters", "notes")}


def write(root: Path, rows: dict[str, list], *, parts: int = 2, seed: int = 1) -> Path:
    """letters.jsonl.zst, columns question and answer; notes/*.parquet, columns query and positive."""
    root.mkdir(exist_ok=True)
    rows = {name: random.Random(seed).sample(pairs, len(pairs)) for name, pairs in rows.items()}
    lines = "".join(json.dumps({"answer": p, "question": q, "id": 1}) + "\n" for q, p in rows["letters"])
    (root / "letters.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (root / "notes").mkdir()
    for part in range(parts):
        queries, positives = zip(*rows["notes"][part::parts], strict=True)
        table = Dataset.from_dict({"query": list(queries), "positive": list(positives)})
        table.to_parquet(str(root / "notes" / f"{part}.parquet"))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "sets", ROWS)


def recipe(data: Path, output: Path, **changes) -> PairRecipe:
    return PairRecipe(
        **{
            "output_dir": str(output),
            "data_dir": str(data),
            "sources": [
                Source(name="letters", path="letters.jsonl.zst", anchor="question", positive="answer"),
                Source(name="notes", path="notes/*.parquet"),
            ],
            "buckets": 2,
            "language": PairLanguage(among=AMONG),
            "consistency": Consistency(teacher=str(SHIPPED), pool=1000),
            "executor": Executor(tasks=3),
            **changes,
        }
    )


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
        ours = compared(queries.astype(np.float32), positives, load_pool(finished / "work" / "pool"), top)
        assert {pair for pair, (own, rival) in zip(pairs, ours, strict=True) if own >= rival - 1e-5} == expected


def test_a_place_in_the_pool_is_by_hand():
    pool = faiss.IndexFlatIP(2)
    pool.add(np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1]], np.float32))
    query, own = np.array([[1, 0]], np.float32), np.array([[0.6, 0.8]], np.float32)
    assert compared(query, own, pool, 1).tolist() == pytest.approx(np.array([[0.6, 1.0]]))
    assert compared(query, own, pool, 2)[0].tolist() == pytest.approx([0.6, 1.0])
    assert compared(query, own, pool, 3)[0].tolist() == pytest.approx([0.6, 0.6])  # its own copy takes no place
    assert compared(query, own, pool, 5)[0].tolist() == pytest.approx([0.6, -1.0])


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


def test_copies_are_all_but_the_first_of_source_and_text():
    draw = np.random.default_rng(3)
    signatures = np.empty(500, _SIGNATURE)
    for name, high in (("key", 60), ("source", 3), ("text", 4)):
        signatures[name] = draw.integers(high, size=500)
    signatures["row"], task = draw.permutation(500), draw.integers(5, size=500)
    first = {}
    for index, (key, source, text, row) in enumerate(signatures.tolist()):
        place = (source, text, task[index], row)
        first[key] = min(first.get(key, (place, index)), (place, index))
    assert set(np.flatnonzero(~copies(signatures, task))) == {index for _, index in first.values()}
    assert not copies(signatures[:0], task[:0]).any()


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
        assert load_pool(output / "work" / "pool").ntotal == 7
        assert "At most 6 pairs of each source were judged" in (output / "report.md").read_text()
    for part, numbers in enumerate(([9, 3, 5], [3, 1], [])):
        np.save(tmp_path / f"{part}.npy", np.array(numbers, np.uint64))
    assert smallest_hashes(sorted(tmp_path.glob("?.npy")), 3).tolist() == [1, 3, 5]


def document(query: str, positive: str) -> Document:
    return pair_document("mine", "0", query, positive)


SHORT = [
    ("banteng", "wild ox of the Malay Archipelago"),
    ("vicar apostolic", "a titular Roman Catholic bishop in a non-Catholic area"),
    ("libsqlite3-dev", "SQLite 3 development files"),
    ("homer", "hit a home run"),
    ("GDP of Chile", "2024: $8,500; 2023: $8,200"),
    ("3 + 4", "7"),
]
FOREIGN_SHORT = [
    ("Datei nicht gefunden", "Die Datei konnte nicht geöffnet werden"),
    ("Fehler beim Lesen", "ungültiges Argument für die Option"),
    ("fichier introuvable", "le fichier ne peut pas être ouvert"),
    ("archivo no encontrado", "no se puede abrir el archivo"),
]


def test_short_english_stays_and_short_german_goes():
    rule = PairLanguageFilter(PairLanguage(among=AMONG))
    assert [rule.filter(document(*pair)) for pair in SHORT] == [True] * len(SHORT)
    removed = [rule.filter(document(*pair)) for pair in FOREIGN_SHORT]
    assert removed == [(False, "de"), (False, "de"), (False, "fr"), (False, "es")]
    german, english = FOREIGN["letters"][0][1], FACTS["notes"][0][1]
    assert rule.filter(document(english[:20], german * 20)) == (False, "de")  # an English title does not save it
    both = PairLanguage(keep=["en", "de"], among=AMONG)
    assert PairLanguageFilter(both).filter(document(*FOREIGN_SHORT[0])) is True


def test_what_stop_words_let_pass_lingua_would_keep():
    language = PairLanguage(among=AMONG)
    texts = [f"{q}\n{p}" for pairs in FACTS.values() for q, p in pairs]
    passed = [text for text in texts if has_stop_words(text)]
    assert 4 <= len(passed) < len(texts)  # both ways are taken
    assert all(likeliest_other(text, language)[1] < language.sure for text in texts)
    assert not any(has_stop_words(f"{q}\n{p}") for q, p in [*FOREIGN_SHORT, *FOREIGN["letters"], *FOREIGN["notes"]])


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


WRONG = [
    ({"sources": [Source(name="a", path="nowhere.jsonl")]}, "source a: no file matches"),
    ({"sources": [Source(name="a", path="none.jsonl")]}, "source a: .* is empty"),
    (
        {"sources": [Source(name="a", path="letters.jsonl.zst")]},
        "source a: no column 'query'; it has answer, question",
    ),
    (
        {"sources": [Source(name="a", path="numbers.jsonl")]},
        r"source a: column 'positive' holds int, not text \(row 0",
    ),
    ({"sources": [Source(name="a", path="broken.jsonl.zst")]}, "source a: cannot be read: "),
    ({"sources": [Source(name="a/b", path="notes/*.parquet")]}, "'a/b' cannot name a folder"),
    ({"sources": [Source(name="a", path="notes/*.parquet")] * 2}, "two are named 'a'"),
    ({"sources": [Source(name="a", path="notes/*.parquet", tokens="ids")]}, "source a: tokens and heldout_share are"),
    ({"language": PairLanguage(keep=["xx"])}, "language.keep: 'xx'"),
    ({"language": PairLanguage(among=["de", "fr"])}, r"language.among=\['de', 'fr'\] has to hold all of keep"),
    ({"language": PairLanguage(sure=0.0)}, "language.sure=0.0 must be above 0"),
    ({"consistency": Consistency(teacher="no/such")}, "model no/such: cannot be loaded"),
    ({"consistency": Consistency(pairs_per_source=0)}, "consistency.pairs_per_source=0 must be at least 1"),
    ({"buckets": 0}, "buckets=0 must be at least 1"),
    ({"executor": Executor(kind="dask")}, "executor.kind='dask' is none of local, slurm, ray"),
    ({"executor": Executor(kind="slurm")}, "missing 2 required positional arguments: 'time' and 'partition'"),
    ({"executor": Executor(options={"partition": "cpu"})}, "partition is not an option of datatrove's Local"),
    ({"executor": Executor(stages={"dedup": {}})}, "executor.stages: 'dedup' is none of read, duplicates, clean"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_bad_input_is_named_before_any_work(data, tmp_path, changes, message):
    (data / "none.jsonl").touch()
    (data / "numbers.jsonl").write_text('{"query": "five", "positive": 5}\n')
    (data / "broken.jsonl.zst").write_bytes((data / "letters.jsonl.zst").read_bytes()[:100])
    with pytest.raises(RecipeError, match=message) as error:
        pair_preparation.prepare(recipe(data, tmp_path / "out", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_far_down_is_named_when_it_is_met(data, tmp_path):
    rows = [json.dumps({"query": f"What is {i}?", "positive": "A number."}) + "\n" for i in range(1200)]
    changes = {"sources": [Source(name="many", path="many-*.jsonl")], "executor": Executor(), "consistency": None}
    for row, reason in (('{"query": "Which?", "positive": ["A list."]}\n', "cast"), ('{"query": "Whi', "JSON")):
        (data / "many-0.jsonl").write_text("".join(rows))
        (data / "many-1.jsonl").write_text(row)
        with pytest.raises(RecipeError, match=rf"source many: cannot be read: .*{reason}") as error:
            pair_preparation.prepare(recipe(data, tmp_path / reason, **changes))
        assert "\n" not in str(error.value)
        assert not (tmp_path / reason / "pairs").exists()


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


def test_filters_that_leave_nothing_say_so(data, tmp_path):
    rows = "".join(json.dumps({"query": q, "positive": p}) + "\n" for q, p in IDENTICAL["notes"])
    (data / "identical.jsonl").write_text(rows)
    only = {"sources": [Source(name="a", path="identical.jsonl")], "language": None}
    with pytest.raises(RecipeError, match="no pair of any source is left"):
        pair_preparation.prepare(recipe(data, tmp_path / "out", **only))


def command(data: Path, output: Path, *more: str) -> list[str]:
    config = str(RECIPES / "pairs-preparation.yaml")
    return ["training.pair_preparation", "--config", config, f"output_dir={output}", f"data_dir={data}", *more]


def test_the_command_says_it_in_one_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(data, tmp_path / "out"))
    monkeypatch.delitem(sys.modules, "training.pair_preparation")  # it runs as __main__
    with pytest.raises(SystemExit) as end:
        runpy.run_module("training.pair_preparation", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: source arxiv: no file matches")


def test_a_dry_run_shows_the_stages_and_leaves_nothing(data, tmp_path, monkeypatch, capsys):
    more = ["sources=[{name: notes, path: notes/*.parquet}]", f"consistency.teacher={SHIPPED}", "--dry-run"]
    monkeypatch.setattr(sys, "argv", command(data, tmp_path / "out", *more))
    pair_preparation.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "read", "duplicates", "clean", "choose", "pool", "consistency", "report",
    ]  # fmt: skip
    assert "stored pairs | clean | sample | sample | consistency | consistency | pairs" in lines[5]
    assert not (tmp_path / "out").exists()


def test_a_cluster_gets_the_same_pipelines_in_order(data, tmp_path):
    ours = load_recipe(PairRecipe, RECIPES / "pairs-preparation.yaml", [f"output_dir={tmp_path}"])
    assert all(source.url for source in ours.sources)
    local = pair_preparation.executors(ours, pair_preparation.stages(ours), job="pairs")
    ours.executor = Executor(kind="slurm", tasks=ours.executor.tasks, options={"partition": "cpu", "time": "1:00:00"})
    handler = signal.getsignal(signal.SIGUSR1)
    chain = pair_preparation.executors(ours, pair_preparation.stages(ours), job="pairs")
    signal.signal(signal.SIGUSR1, handler)
    assert list(chain) == list(local)
    for name, executor in chain.items():
        assert [str(step) for step in executor.pipeline] == [str(step) for step in local[name].pipeline[1:]]
        assert executor.job_name == f"pairs-{name}"
        assert executor.tasks == local[name].tasks
    assert [executor.depends for executor in chain.values()] == [None, *list(chain.values())[:-1]]
