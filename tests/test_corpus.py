"""Corpus preparation: what every step removes, to the document; nothing lost or doubled, however often it is killed.

Slurm gets the same pipelines. The corpus is that of `corpus_data`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import dill
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from corpus_data import (  # noqa: F401  pytest finds the fixtures by name
    COPIES,
    EMPTY,
    FOREIGN,
    GOOD,
    GROUPS,
    JUNK,
    REPEATED,
    recipe,
    written_corpus,
)
from datasets import load_dataset

from training import corpus, executors
from training.corpus_recipe import Executor, Language, Minhash, Quality, check
from training.corpus_steps import in_heldout_share
from training.recipe import RecipeError


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
