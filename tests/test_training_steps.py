"""The benchmark of training steps: who takes part, what a row says, and a real step of each system."""

import json

import pytest
from conftest import REPOSITORY

from benchmarks import training_steps
from benchmarks.results import BenchmarkError
from benchmarks.training_steps import System, main, run, systems, table


def test_a_ratio_is_taken_within_a_round():
    speeds = {
        "ours": [100, 10, 50],
        "first": [50, 10, 20],
    }  # tokens a second; busy in the second round
    records = [
        {"system": name, "round": number, "stage": stage, "tokens": 1000, "seconds": [1000 / speed] * 3}
        for name, rounds in speeds.items()
        for number, speed in enumerate(rounds)
        for stage in ("I", "II")
    ]
    lines = table(records, "first").splitlines()
    assert lines[2] == "| ours | 50 | 2.00 (1.00 to 2.50) | 50 | 2.00 (1.00 to 2.50) |"
    assert lines[3] == "| first | 20 | 1.00 (1.00 to 1.00) | 20 | 1.00 (1.00 to 1.00) |"


def test_systems_are_checkouts(tmp_path):
    assert [system.precision for system in systems([])] == ["float32", "bfloat16"]
    assert systems([f"same={REPOSITORY}"])[-1] == System("same", REPOSITORY, "float32")
    for text in ("same", f"=={REPOSITORY}", f"other={tmp_path}"):
        with pytest.raises(BenchmarkError, match="NAME=FOLDER"):
            systems([text])


def test_steps_are_real_and_the_files_hold_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_steps, "STEPS", 1)
    monkeypatch.setattr("sys.argv", ["x", "--rounds", "1", "--threads", "1", "--output", str(tmp_path / "steps")])
    main()
    document = json.loads((tmp_path / "steps.json").read_text())
    assert [record["stage"] for record in document["records"]] == ["I", "II"] * 2
    exact, half = document["records"][1], document["records"][3]
    assert exact["loss"] != half["loss"]
    assert exact["loss"] == pytest.approx(half["loss"], rel=0.05)
    assert all(record["seconds"][0] > 0 for record in document["records"])
    assert (tmp_path / "steps.md").read_text().count("| ours") == 2
    assert "stage I" in capsys.readouterr().out


def test_a_process_that_fails_is_named(tmp_path):
    (tmp_path / "modeling_jina_bert").mkdir()
    (tmp_path / "modeling_jina_bert" / "__init__.py").write_text("raise ValueError('not this one')")
    with pytest.raises(BenchmarkError, match="broken: ValueError: not this one"):
        run(System("broken", tmp_path, "float32"), 1)
