"""Corpus preparation: what every step removes, to the document; nothing lost or doubled, however often it is killed.

The corpus is written here: documents of random English words, copies of them, other languages, junk, empty rows.
"""

import contextlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import dill
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import REPOSITORY, SHIPPED
from datasets import Dataset, load_dataset
from datatrove.data import Document
from hub_server import serve
from tokenizers import Tokenizer

from training import corpus, executors
from training.corpus_recipe import CorpusRecipe, Executor, Language, Minhash, Quality, check
from training.corpus_steps import (
    LinguaFilter,
    QualityFilter,
    ShardFiles,
    TokenShards,
    hold,
    in_heldout_share,
    share,
    windows,
)
from training.recipe import RecipeError, Source, load_recipe
from training.sources import open_source

RECIPES = REPOSITORY / "training" / "recipes"
WORDS = (
    "the of and to that with have be river mountain house garden people water light paper morning evening winter "
    "summer teacher student question answer village market bridge window table kitchen forest island engine machine "
    "letter story history music colour number science measure travel carry build open close follow remember believe "
    "small large early quiet heavy simple bright narrow ancient modern careful between under across before after "
    "during without however because although several another every"
).split()
GERMAN = (
    "Der Fluss trat nach dem langen Regen über die Ufer, und die Bewohner des Dorfes mussten ihre Häuser verlassen. "
    "Am nächsten Morgen kamen die Helfer mit Booten und brachten Brot, Decken und sauberes Wasser. Niemand wurde "
    "verletzt, aber viele Felder waren zerstört, und die Ernte des Jahres war verloren. "
)
FRENCH = (
    "La rivière est sortie de son lit après de longues pluies, et les habitants du village ont dû quitter leurs "
    "maisons. Le lendemain matin, les secours sont arrivés avec des bateaux et ont apporté du pain et de l'eau. "
)


def english(seed: int, words: int = 120) -> str:
    """Random sentences that share no five words in a row with those of another seed."""
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS, k=12)).capitalize() + "." for _ in range(words // 12)]
    return "\n".join(sentences)


GOOD = {"letters": [english(seed) for seed in range(14)], "notes": [english(seed) for seed in range(100, 110)]}
NEAR = GOOD["letters"][3].replace("\n", " ").replace(".", ",", 1)  # MinHash sees neither line ends nor punctuation
WIDE = GOOD["notes"][2].replace(" ", "  ")
COPIES = {"letters": [GOOD["letters"][0]] * 2, "notes": [GOOD["letters"][1], NEAR, WIDE]}
FOREIGN = {"letters": [GERMAN * 3], "notes": [GERMAN * 2, FRENCH * 3]}
REPEATED = {"letters": ["\n".join([english(500)] * 4)], "notes": []}
JUNK = {"letters": [english(502, words=36)], "notes": [" # ".join(english(501).split())]}
EMPTY = {"letters": ["", None, " \n\t"], "notes": [None]}
GROUPS = (GOOD, COPIES, FOREIGN, REPEATED, JUNK, EMPTY)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """letters.jsonl.zst, one file; notes/0.parquet and notes/1.parquet."""
    root = tmp_path_factory.mktemp("data")
    rows = {name: [text for group in GROUPS for text in group[name]] for name in ("letters", "notes")}
    for texts in rows.values():
        random.Random(1).shuffle(texts)
    lines = "".join(json.dumps({"body": text, "source": "x"}) + "\n" for text in rows["letters"])
    (root / "letters.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (root / "notes").mkdir()
    for part in range(2):
        Dataset.from_dict({"text": rows["notes"][part::2]}).to_parquet(str(root / "notes" / f"{part}.parquet"))
    return root


def recipe(data: Path, output: Path, **changes) -> CorpusRecipe:
    return CorpusRecipe(
        **{
            "output_dir": str(output),
            "tokenizer": str(SHIPPED),
            "data_dir": str(data),
            "sources": [
                Source(name="letters", path="letters.jsonl.zst", text="body"),
                Source(name="notes", path="notes/*.parquet"),
            ],
            "language": Language(),
            "quality": [Quality("gopher_repetition"), Quality("gopher_quality")],
            "minhash": Minhash(),
            "heldout_share": 0.3,
            "executor": Executor(tasks=3),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """The output folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("finished") / "corpus"
    corpus.prepare(recipe(data, output))
    return output


def rows(output: Path, split: str) -> Counter:
    """The documents of a split, as tuples of ids, by source."""
    found = Counter()
    for name in ("letters", "notes"):
        files = [str(file) for file in (output / "tokens" / split / name).glob("*.parquet")]
        if files:
            stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
            found.update((name, tuple(row["input_ids"])) for row in stream)
    return found


def test_every_step_removes_what_it_is_for(finished):
    report = json.loads((finished / "report.json").read_text())
    removed = {
        step["step"]: [step["removed"][name]["documents"] for name in ("letters", "notes", "all")]
        for step in report["steps"]
    }
    expected = {"empty": EMPTY, "language": FOREIGN, "gopher_repetition": REPEATED, "gopher_quality": JUNK}
    for step, group in expected.items():
        letters, notes = len(group["letters"]), len(group["notes"])
        assert removed[step] == [letters, notes, letters + notes], step
    assert removed["minhash"][2] == 5  # which of the copies stays is not promised
    reasons = {step["step"]: step["reasons"] for step in report["steps"]}
    assert reasons == {
        "empty": {"no_text": 4},
        "language": {"de": 2, "fr": 1},
        "gopher_repetition": {"dup_line_frac": 1},
        "gopher_quality": {"gopher_short_doc": 1, "gopher_too_many_hashes": 1},
        "minhash": {"near_duplicate": 5},
    }
    first, last = report["steps"][0], report["steps"][-1]
    texts = [text or "" for group in GROUPS for texts in group.values() for text in texts]
    assert first["before"]["all"] == {
        "documents": len(texts),
        "words": sum(len(text.split()) for text in texts),
        "characters": sum(map(len, texts)),
    }
    assert last["kept"]["all"]["documents"] == 24
    assert last["kept"]["all"]["words"] == 24 * 120
    for earlier, later in zip(report["steps"], report["steps"][1:], strict=False):
        assert earlier["kept"] == later["before"]


def test_the_report_shows_what_was_removed(finished):
    report = json.loads((finished / "report.json").read_text())
    shown = {step["step"]: step["examples"] for step in report["steps"]}
    assert {row["source"] for row in shown["language"]["de"]} == {"letters", "notes"}
    assert shown["language"]["fr"][0]["text"].startswith("La rivière est sortie")
    assert len(shown["minhash"]["near_duplicate"]) == 3
    page = (finished / "report.md").read_text()
    assert "| language | all | 35 | 3 | 8.57% |" in page
    assert "- **fr**: 1 documents" in page
    assert "La rivière est sortie" in page


def test_the_shards_hold_each_document_once(finished, tokenizer):
    found = (rows(finished, "train") + rows(finished, "heldout")).elements()
    # Copies differ in whitespace and a comma at most: compared without punctuation.
    words = Counter(tuple(id for id in ids if id not in (1010, 1012)) for _, ids in found)
    texts = [text.replace(".", "") for texts in GOOD.values() for text in texts]
    assert words == Counter(map(tuple, tokenizer(texts, add_special_tokens=False)["input_ids"]))


def test_heldout_documents_are_chosen_by_their_text_and_never_trained_on(finished, tokenizer):
    heldout, train = rows(finished, "heldout"), rows(finished, "train")
    texts = [text for group in (GOOD, COPIES) for texts in group.values() for text in texts]
    chosen = {text: in_heldout_share(text, 0.3) for text in texts}
    ids = {text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    assert heldout
    assert train
    assert {row for _, row in heldout} <= {ids[text] for text in texts if chosen[text]}
    assert {row for _, row in train} <= {ids[text] for text in texts if not chosen[text]}
    assert [in_heldout_share(f"A  Text\n{i}", 0.5) for i in range(9)] == [
        in_heldout_share(f"a text {i}", 0.5) for i in range(9)
    ]
    assert 0.007 < sum(in_heldout_share(f"text {i}", 0.01) for i in range(20_000)) / 20_000 < 0.013


def test_shards_say_what_they_are(finished, tokenizer):
    described = json.loads((finished / "tokens" / "corpus.json").read_text())
    assert described["column"] == "input_ids"
    assert described["vocab_size"] == len(tokenizer)
    assert described["documents"] == 24
    lengths = [len(ids) for split in ("train", "heldout") for _, ids in rows(finished, split).elements()]
    assert described["tokens"] == sum(lengths)
    for split in ("train", "heldout"):
        for name in ("letters", "notes"):
            files = sorted((finished / "tokens" / split / name).glob("*.parquet"))
            metadata = [pq.read_metadata(file).metadata for file in files]
            counts = described["splits"][split][name]
            assert counts["shards"] == len(files)
            assert counts["tokens"] == sum(int(entry[b"tokens"]) for entry in metadata)
            assert counts["documents"] == sum(pq.read_metadata(file).num_rows for file in files)
            assert {entry[b"tokenizer_sha256"].decode() for entry in metadata} <= {described["tokenizer_sha256"]}


KILLED = """
import os, signal, sys
from training import corpus, corpus_steps
from training.corpus_recipe import CorpusRecipe
from training.recipe import load_recipe

recipe = load_recipe(CorpusRecipe, sys.argv[1])
corpus.check(recipe)  # what it imports the children have

def killing(function, call):
    calls = []
    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted

def filtering():  # the second task has written some of its documents
    corpus_steps.tally = killing(corpus_steps.tally, 90)

def writing():
    corpus_steps.ShardFiles.write = killing(corpus_steps.ShardFiles.write, 6)

def publishing():  # between two files of one task
    corpus_steps.os.replace = killing(corpus_steps.os.replace, 6)

for point in (filtering, writing, publishing):
    if os.fork() == 0:
        point()
        corpus.prepare(recipe)
        os._exit(0)
    _, status = os.wait()
    tokens = recipe.output_dir + "/tokens"
    stages = sorted(os.listdir(recipe.output_dir + "/logs"))
    print(point.__name__, os.WTERMSIG(status), ",".join(stages), os.path.exists(tokens + "/corpus.json"), flush=True)
"""


def test_killed_and_resumed_equals_uninterrupted(data, finished, tmp_path):
    from training.recipe import save_recipe

    output = tmp_path / "corpus"
    save_recipe(recipe(data, output), tmp_path / "recipe")
    program = [sys.executable, "-c", KILLED, str(tmp_path / "recipe" / "recipe.yaml")]
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(program, stdout=out, stderr=err, cwd=REPOSITORY, start_new_session=True)
        assert process.wait() == 0, (tmp_path / "err").read_text()[-3000:]
    with contextlib.suppress(ProcessLookupError):  # the managers of killed executors
        os.killpg(process.pid, signal.SIGKILL)
    before_tokens = "buckets,clusters,filter,signatures"
    assert (tmp_path / "out").read_text().splitlines() == [
        "filtering 9 filter False",
        f"writing 9 {before_tokens},tokens False",
        f"publishing 9 {before_tokens},tokens False",
    ]
    done = {file: file.stat().st_mtime_ns for file in output.glob("logs/*/completions/*")}
    assert 17 < len(done) < 24  # some tasks of the last stages are left
    corpus.prepare(recipe(data, output))
    assert {file: file.stat().st_mtime_ns for file in done} == done  # what had finished did not run again
    for split in ("train", "heldout"):
        assert rows(output, split) == rows(finished, split)
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (output, finished))
    assert ours["corpus"] == theirs["corpus"]
    assert ours["steps"] == theirs["steps"]
    assert not (output / "tokens" / ".incomplete").exists() or not any((output / "tokens" / ".incomplete").iterdir())


def test_an_unfinished_task_has_no_shards(tmp_path):
    identity = {"tokenizer": "t", "vocab_size": "9", "tokenizer_sha256": "0"}

    def attempt(last: list):
        with ShardFiles(tmp_path, 0, 5, identity) as files:
            files.write("train/a", [[1, 2, 3], [4, 5, 6]])
            files.write("train/a", last)

    with pytest.raises(TypeError):
        attempt([None, 7])
    assert not list(tmp_path.glob("train/*/*"))
    attempt([[7]])
    attempt([[7]])  # replaces the first
    shards = sorted(tmp_path.glob("train/a/*.parquet"))
    assert [shard.name for shard in shards] == ["00000-000.parquet", "00000-001.parquet"]
    assert [pq.read_table(shard)["input_ids"].to_pylist() for shard in shards] == [[[1, 2, 3], [4, 5, 6]], [[7]]]


def test_documents_are_written_uncut_whatever_the_tokenizer_truncates_at(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    baked = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    baked.enable_truncation(8)
    baked.enable_padding(length=300)
    baked.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    texts = ["Naïve CAFÉ prices: 3,5 €! " * 20, "[CLS] is a token. [MASK] too [SEP]", "\u200b\u0007"]
    step = TokenShards(str(tmp_path / "tokens"), str(tmp_path / "tokenizer"), 0.0, 1000)
    step.run([document(text) for text in texts])
    (shard,) = tmp_path.glob("tokens/train/mine/*.parquet")
    written = pq.read_table(shard)["input_ids"].to_pylist()
    assert written[0] == tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert len(written[0]) > 100
    assert tokenizer.convert_ids_to_tokens(written[1]) == "[ cl ##s ] is a token . [ mask ] too [ sep ]".split()
    assert step.stats["mine|without_tokens"].total == 1


def test_two_runs_in_one_folder_are_refused(tmp_path):
    lock = tmp_path / ".lock"
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'w+'); fcntl.lockf(file, fcntl.LOCK_SH); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match="another run are still at work"):
            hold(str(lock), alone=True)
    finally:
        other.communicate("")
    hold(str(lock), alone=True)


@pytest.mark.parametrize(("files", "tasks"), [(1, 4), (3, 7), (4, 4), (5, 2)])
def test_the_tasks_share_out_all_rows(tmp_path, files, tasks):
    for file in range(files):
        lines = "".join(json.dumps({"text": f"{file} {row}"}) + "\n" for row in range(10))
        (tmp_path / f"{file}.jsonl").write_text(lines)
    source = Source(name="mine", path="*.jsonl")
    shares = [
        [row["text"] for _, row in share(open_source(source, str(tmp_path), streaming=True), rank, tasks)]
        for rank in range(tasks)
    ]
    assert all(shares)
    expected = [f"{file} {row}" for file in range(files) for row in range(10)]
    assert sorted(text for texts in shares for text in texts) == expected


def document(text: str, source: str = "mine") -> Document:
    return Document(text=text, id="0", metadata={"source": source})


def test_the_language_of_the_whole_text_counts():
    language = LinguaFilter(["en"], 0.65, 1200)
    header = "This book is for the use of anyone anywhere at no cost and with almost no restrictions. " * 8
    assert len(header) > 600
    assert language.filter(document(header)) is True
    assert language.filter(document(header + GERMAN * 20)) == (False, "de")
    assert language.filter(document("12 + 34 = 46")) == (False, "unsure")
    assert LinguaFilter(["en", "de"], 0.65, 1200).filter(document(GERMAN)) is True
    assert len(windows("x" * 5000, 1200)) == 1202


SENTENCES = "The river rose at night. It fell before noon. Nobody was hurt. The fields were lost. Bread came by boat."


@pytest.mark.parametrize(
    ("quality", "text", "verdict", "left"),
    [
        (Quality("c4_quality"), f"{SENTENCES}\nHome | About | Menu", True, SENTENCES),
        (Quality("c4_quality"), "One sentence is too few.", (False, "too_few_sentences"), None),
        (Quality("c4_quality", arguments={"min_num_sentences": -1}), "menu\nhome", (False, "nothing_left"), None),
        (Quality("gopher_quality"), english(1, words=36), (False, "gopher_short_doc"), None),
        (Quality("gopher_quality", arguments={"min_doc_words": 20}), english(1, words=36), True, None),
        (Quality("gopher_repetition", skip=["mine"]), "\n".join(["The same line."] * 9), True, None),
        (Quality("fineweb_quality"), "a menu\nanother entry\n" * 20, (False, "line_punct_ratio"), None),
    ],
    ids=lambda value: value.filter if isinstance(value, Quality) else None,
)
def test_quality_filters_need_no_download(quality, text, verdict, left):
    doc = document(text)
    step = QualityFilter("x", corpus.quality_filter(quality), quality.skip)
    assert step.filter(doc) == verdict
    assert left is None or doc.text == left


WRONG = [
    ({"sources": [Source(name="a", path="nowhere.jsonl")]}, "source a: no file matches"),
    ({"sources": [Source(name="a", path="none.jsonl")]}, "source a: .* is empty"),
    ({"sources": [Source(name="a", path="letters.jsonl.zst")]}, "source a: no column 'text'; it has body, source"),
    ({"sources": [Source(name="a", path="numbers.jsonl")]}, "source a: column 'text' holds int, not text"),
    ({"sources": [Source(name="a/b", path="letters.jsonl.zst", text="body")]}, "'a/b' cannot name a folder"),
    ({"sources": [Source(name="a", path="letters.jsonl.zst", text="body")] * 2}, "two are named 'a'"),
    ({"sources": [Source(name="a", path="notes/*.parquet", tokens="ids")]}, "source a: tokens and heldout_share are"),
    ({"tokenizer": "no/such"}, "tokenizer='no/such' cannot be loaded"),
    ({"language": Language(keep=["xx"])}, "language.keep: 'xx'"),
    ({"quality": [Quality("gopher")]}, "filter='gopher' is none of c4_quality"),
    ({"quality": [Quality("gopher_quality", arguments={"words": 3})]}, "gopher_quality has no argument words"),
    ({"quality": [Quality("gopher_quality"), Quality("gopher_quality")]}, "two are named 'gopher_quality'"),
    ({"quality": [Quality("gopher_quality", skip=["books"])]}, "skips 'books', but no source"),
    ({"minhash": Minhash(num_buckets=0)}, "minhash.num_buckets=0 must be at least 1"),
    ({"heldout_share": 1.0}, "heldout_share=1.0"),
    ({"executor": Executor(kind="dask")}, "executor.kind='dask' is none of local, slurm, ray"),
    ({"executor": Executor(kind="slurm")}, "missing 2 required positional arguments: 'time' and 'partition'"),
    ({"executor": Executor(options={"partition": "cpu"})}, "partition is not an option of datatrove's Local"),
    ({"executor": Executor(kind="slurm", options={"tasks_per_job": 2})}, "tasks_per_job is not an option"),
    ({"executor": Executor(stages={"dedup": {}})}, "executor.stages: 'dedup' is none of filter, signatures"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_bad_input_is_named_before_any_work(data, tmp_path, changes, message):
    (data / "none.jsonl").touch()
    (data / "numbers.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(RecipeError, match=message) as error:
        corpus.prepare(recipe(data, tmp_path / "out", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_results_of_another_recipe_are_not_touched(data, finished, tmp_path):
    check(recipe(data, finished, executor=Executor(tasks=3, workers=2)))  # other workers: the same results
    for changes, message in (
        ({"minhash": Minhash(n_grams=4)}, r"there minhash.n_grams is 5, here 4"),
        ({"executor": Executor(tasks=4)}, r"there executor.tasks is 3, here 4"),
        ({"quality": [Quality("gopher_repetition")]}, r"there quality.1 is .*, here None"),
    ):
        with pytest.raises(RecipeError, match=message):
            corpus.prepare(recipe(data, finished, **changes))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RecipeError, match="holds no corpus preparation"):
        corpus.prepare(recipe(data, tmp_path))


def test_filters_that_leave_nothing_say_so(data, tmp_path):
    with pytest.raises(RecipeError, match="the filters left no document of any source"):
        corpus.prepare(recipe(data, tmp_path / "out", language=Language(keep=["fi"])))


def command(data: Path, output: Path, *more: str) -> list[str]:
    overrides = [f"output_dir={output}", f"data_dir={data}", f"tokenizer={SHIPPED}", *more]
    return ["training.corpus", "--config", str(RECIPES / "corpus-local.yaml"), *overrides]


def test_the_command_says_it_in_one_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(data, tmp_path / "out"))
    monkeypatch.delitem(sys.modules, "training.corpus")  # it runs as __main__
    with pytest.raises(SystemExit) as end:
        runpy.run_module("training.corpus", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: source books: no file matches")


@pytest.mark.slow
def test_a_hub_data_set_in_worker_processes(data, tmp_path):
    texts = [text or "" for group in GROUPS for text in group["letters"]]
    parts = ["".join(json.dumps({"text": text}) + "\n" for text in texts[part::2]).encode() for part in range(2)]
    files = {f"en/c4-train.{part}.json": lines for part, lines in enumerate(parts)}
    card = b"---\nconfigs:\n- config_name: en\n  data_files: [{split: train, path: en/c4-train.*}]\n---\n"
    with serve({"me/c4": {"README.md": card, **files}}) as (endpoint, _):
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        more = ["sources=[{name: c4, hub: me/c4, hub_config: en}]", "executor.tasks=4", "executor.workers=2"]
        process = subprocess.run(
            [sys.executable, "-m", *command(data, tmp_path / "out", *more)],
            capture_output=True, text=True, cwd=REPOSITORY, env=environment,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] == f"corpus finished: {tmp_path / 'out' / 'tokens'}"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    removed = [step["removed"]["c4"]["documents"] for step in report["steps"]]
    assert removed == [3, 1, 1, 1, 2]
    assert report["corpus"]["documents"] == len(GOOD["letters"])


def test_a_dry_run_shows_the_stages_and_leaves_nothing(data, tmp_path, monkeypatch, capsys):
    sources = "sources=[{name: letters, path: letters.jsonl.zst, text: body}]"
    monkeypatch.setattr(sys, "argv", command(data, tmp_path / "out", sources, "--dry-run"))
    corpus.main()
    lines = capsys.readouterr().out.splitlines()
    stages = ["filter", "signatures", "buckets", "clusters", "tokens", "report"]
    assert [line.split(" (")[0] for line in lines] == stages
    assert lines[2].startswith("buckets (14 tasks): ")
    assert "letters | empty | language | language | gopher_repetition" in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["corpus-local", "corpus-c4"])
def test_the_published_recipes_are_valid(name, tmp_path):
    ours = load_recipe(CorpusRecipe, RECIPES / f"{name}.yaml", [f"output_dir={tmp_path}"])
    assert all(source.url for source in ours.sources)
    assert ours.heldout_share == 0.01
    chain = executors.executors(ours, corpus.stages(ours), job="corpus")
    assert chain["filter"].world_size == ours.executor.tasks
    assert chain["clusters"].world_size == 1


STAND_IN = """#!{python}
import os, sys
folder = os.path.dirname(os.path.abspath(__file__))
number = len([name for name in os.listdir(folder) if name.startswith("job-")])
with open(os.path.join(folder, f"job-{{number}}"), "w") as file:
    file.write(" ".join(sys.argv[1:-1]) + "\\n" + open(sys.argv[-1]).read())
print("Submitted batch job", number)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """Stand-ins for sbatch, which keeps what it is given, and scontrol; there is no Slurm where tests run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", STAND_IN.format(python=sys.executable)), ("scontrol", "#!/bin/sh\necho node-1\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    handler = signal.getsignal(signal.SIGUSR1)
    yield folder
    signal.signal(signal.SIGUSR1, handler)


def test_slurm_gets_the_same_pipelines_as_jobs_in_order(data, finished, cluster, tmp_path, monkeypatch):
    output = tmp_path / "corpus"
    executor = Executor(
        kind="slurm",
        tasks=3,
        workers=2,
        options={"partition": "cpu", "time": "1:00:00", "venv_path": "env/bin/activate"},
        stages={"clusters": {"mem_per_cpu_gb": 64}},
    )
    corpus.prepare(recipe(data, output, executor=executor))
    jobs = [(cluster / f"job-{number}").read_text() for number in range(len(list(cluster.glob("job-*"))))]
    stages = ("filter", "signatures", "buckets", "clusters", "tokens", "report")
    assert len(jobs) == 2 * len(stages)  # after each stage a job sums its statistics
    for number, (stage, tasks) in enumerate(zip(stages, (3, 3, 14, 1, 3, 1), strict=True)):
        arguments, script = jobs[2 * number].split("\n", 1)
        assert ("--dependency=afterok:" in arguments) == (number > 0)
        assert number == 0 or f"--dependency=afterok:{2 * number - 2}" in arguments.split()
        assert script.startswith("#!/bin/bash\n#SBATCH ")
        for line in (f"--array=0-{tasks - 1}%{min(2, tasks)}", f"--job-name=corpus-{stage}", "--partition=cpu"):
            assert f"#SBATCH {line}\n" in script
        assert f"#SBATCH --mem-per-cpu={64 if stage == 'clusters' else 2}G\n" in script
        assert "source env/bin/activate\n" in script
        assert f"launch_pickled_pipeline {output}/logs/{stage}/executor.pik" in script
        pickle = (output / "logs" / stage / "executor.pik").read_bytes()
        ours = recipe(data, output)
        local = executors.executors(ours, corpus.stages(ours), job="corpus")[stage]
        assert [str(step) for step in dill.loads(pickle).pipeline] == [str(step) for step in local.pipeline[1:]]
        monkeypatch.setenv("SLURM_NODELIST", "node-1")
        for task in range(tasks):  # what the script starts on a node
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            dill.loads(pickle).run()
    for split in ("train", "heldout"):
        assert rows(output, split) == rows(finished, split)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    corpus.prepare(recipe(data, output, executor=executor))
    assert len(list(cluster.glob("job-*"))) == len(jobs)  # nothing is left to submit


def test_ray_is_asked_for_only_where_it_is_wanted(data, tmp_path, monkeypatch):
    wanted = recipe(data, tmp_path, executor=Executor(kind="ray", tasks=3, options={"mem_per_cpu_gb": 4}))
    if find_spec("ray") is None:
        with pytest.raises(RecipeError, match=r'needs Ray: pip install "ray\[default\]"'):
            executors.executors(wanted, corpus.stages(wanted), job="corpus")
    monkeypatch.setattr(executors, "find_spec", lambda name: True)
    chain = executors.executors(wanted, corpus.stages(wanted), job="corpus")
    assert {type(executor).__name__ for executor in chain.values()} == {"RayPipelineExecutor"}
    assert chain["tokens"].world_size == 3
    assert chain["tokens"].mem_per_cpu_gb == 4
