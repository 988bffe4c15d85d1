"""The recipe and the command of corpus preparation: what is wrong is one line, said before any work.

Also pins: a Hub data set is read in worker processes; Ray is asked for only where it is wanted.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPOSITORY, SHIPPED
from corpus_data import GOOD, GROUPS, RECIPES, recipe, written_corpus  # noqa: F401  pytest finds the fixtures by name
from hub_server import serve

from training import corpus, executors
from training.corpus_recipe import CorpusRecipe, Executor, Language, Minhash, Quality
from training.recipe import RecipeError, Source, load_recipe

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


def test_c4_goes_to_ray_as_its_recipe_says(tmp_path, monkeypatch):
    """The command of its comment; null takes back an option that Slurm alone has."""
    monkeypatch.setattr(executors, "find_spec", lambda name: True)
    (said,) = re.findall(r"^# A Ray cluster: (.*), with", (RECIPES / "corpus-c4.yaml").read_text(), re.MULTILINE)
    changes = shlex.split(said)
    assert len(changes) == 3
    ours = load_recipe(CorpusRecipe, RECIPES / "corpus-c4.yaml", [f"output_dir={tmp_path}", *changes])
    chain = executors.executors(ours, corpus.stages(ours), job="corpus")
    assert {type(executor).__name__ for executor in chain.values()} == {"RayPipelineExecutor"}
    assert chain["filter"].mem_per_cpu_gb == 4
