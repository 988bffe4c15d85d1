"""Curves of training logs: one curve of a resumed run, each stage's accuracy, what is no log is named."""

import json
import sys

import pytest
from conftest import REPOSITORY

from training import curves
from training.curves import plot, read_log

LOGS = REPOSITORY / "hub_repo" / "logs"


def write(path, *entries):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def step(number, seconds, loss):
    return {"step": number, "seconds": seconds, "loss": loss, "tokens": 100 * number}


def test_a_run_that_was_killed_and_resumed_is_one_curve(tmp_path):
    """Killed after step 3; it went on from the checkpoint of step 1 in a process that began its clock anew."""
    first = [
        step(1, 3600, 9.0),
        step(2, 7200, 8.5),
        {"step": 2, "seconds": 7300, "eval_accuracy": 0.1},
        step(3, 10800, 8.0),
    ]
    second = [step(2, 1800, 8.4), {"step": 2, "seconds": 1900, "eval_accuracy": 0.2}, step(3, 3600, 7.9)]
    end = {"step": 3, "seconds": 3700, "train_loss": 8.4}
    run = read_log(write(tmp_path / "mine" / "log.jsonl", *first, *second, end))
    assert run.name == "mine"
    assert run.loss == [(100, 9.0), (200, 8.4), (300, 7.9)]
    assert run.accuracy == [(200, 0.2)]
    assert run.tokens == [(1.0, 100), (3.5, 200), (4.0, 300)]


def test_the_accuracy_of_stage_two_is_the_mean_over_the_sources(tmp_path):
    found = {"eval_a_cosine_accuracy@1": 0.2, "eval_b_cosine_accuracy@1": 0.4, "eval_a_cosine_ndcg@10": 0.9}
    run = read_log(write(tmp_path / "pairs.jsonl", step(1, 5, 2.0), {"step": 1, "seconds": 9, **found}))
    assert (run.name, run.accuracy) == ("pairs", [(100, pytest.approx(0.3))])


def test_the_logs_of_the_shipped_model_are_drawn(tmp_path, monkeypatch, capsys):
    logs = [str(LOGS / f"tiny-{stage}.jsonl") for stage in ("mlm", "pairs", "hard-negatives")]
    file = tmp_path / "curves.svg"
    monkeypatch.setattr(sys, "argv", ["curves", *logs, "--plot", str(file)])
    curves.main()
    assert capsys.readouterr().out.strip() == str(file)
    drawn = file.read_text()
    assert drawn.count('id="axes_') == 2  # one accuracy, at the end, is no curve
    for name in ("tiny-mlm", "tiny-pairs", "tiny-hard-negatives"):
        assert name in drawn


def test_accuracies_have_a_panel(tmp_path):
    evaluated = [{"step": n, "seconds": n, "eval_accuracy": 0.1 * n} for n in (1, 2)]
    log = write(tmp_path / "mine" / "log.jsonl", step(1, 1, 9.0), evaluated[0], step(2, 2, 8.0), evaluated[1])
    plot([read_log(log)], tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.count('id="axes_') == 3
    assert "held-out accuracy" in drawn


WRONG = {
    "missing.jsonl": (None, "No such file"),
    "text.jsonl": ("step 1: loss 9\n", "text.jsonl: line 1 is no entry"),
    "list.jsonl": ('{"step": 1, "seconds": 2}\n[1]\n', "list.jsonl: line 2 is no entry"),
    "evaluation.jsonl": ('{"step": 1, "seconds": 2, "eval_accuracy": 0.5}\n', "evaluation.jsonl: no entry has both"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_log_is_named(tmp_path, monkeypatch, capsys, name):
    content, message = WRONG[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path / name), "--plot", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as ended:
        curves.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_format_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Format 'doc' is not supported"):
        plot([read_log(LOGS / "tiny-pairs.jsonl")], tmp_path / "x.doc")
