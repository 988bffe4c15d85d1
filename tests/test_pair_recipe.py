"""The recipe and the command of pair preparation: what is wrong is one line that names it."""

import json
import runpy
import signal
import sys
from pathlib import Path

import pytest
from conftest import SHIPPED
from pair_data import IDENTICAL, RECIPES, recipe, written_sets  # noqa: F401  pytest finds the fixtures by name

from training import pair_preparation
from training.corpus_recipe import Executor
from training.pair_recipe import Consistency, PairLanguage, PairRecipe
from training.recipe import RecipeError, Source, load_recipe

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
