"""The table of engines, and the client libraries in environments of their own.

Pins: what counts as agreeing, and that a control which passes does not; how far a text was read, told from its vector;
texts of exactly so many tokens; environments whole or made anew; what cannot be run is named with the reason. With the
marker `engines` every engine is installed and run for real, onnxruntime and OpenVINO beside llama.cpp,
transformers.js, fastembed, LangChain and LlamaIndex:

    ENGINES=FOLDER python -m pytest -m engines tests/test_engines.py   # installs 4.4 GB into FOLDER, once
"""

import json
import os
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from hub_repo.engines import comparison
from hub_repo.engines.clients import CLIENTS, client_rows
from hub_repo.engines.environments import FASTEMBED, Environment, prepared, python_of
from hub_repo.engines.measure import TOKENS_PER_CALL, Settings, Subject, speeds, timed_batch, timed_texts, torch_engine
from hub_repo.engines.node import node_rows
from hub_repo.engines.rows import (
    RUNGS,
    Check,
    Missing,
    check_texts,
    first_of_each,
    reach,
    row_of,
    rung_texts,
    table,
    tokenized,
    whole_words,
)
from hub_repo.formats.parity import Tolerance, check_batches, disturbed, torch_embeddings
from modeling_jina_bert import JinaBertModel

STRICT = Tolerance(1e-5, 0.999999)


@pytest.fixture(scope="module")
def model():
    return JinaBertModel.from_pretrained(GOLDEN / "A-small4h", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def subject(model):
    texts = rung_texts(whole_words(model), (16, 64))
    whole = [torch_embeddings(model, tokenized(model, [text])) for text in texts]
    return Subject(GOLDEN / "A-small4h", model, disturbed(model), texts, whole)


@pytest.fixture(scope="module")
def check(subject):
    return Check.of(subject.model, subject.twin, check_batches(subject.model.config.vocab_size, (7,)))


def test_an_engine_agrees_only_if_the_control_does_not(model, check):
    found = [torch_embeddings(model, batch) for batch in check.batches]
    row = check.row("torch", "1.0", 2_000_000, found, STRICT)
    assert row.agrees
    assert (row.megabytes, row.error) == (2.0, 0.0)
    assert row.control < 0.99
    assert not check.row("torch", "1.0", 1, found, Tolerance(2.0, -1.0)).agrees  # the control would pass, too
    assert not check.row("torch", "1.0", 1, [x + 1e-3 for x in found], STRICT).agrees
    assert not check.row("torch", "1.0", 1, check.control, STRICT).agrees
    assert not check.row("torch", "1.0", 1, [*found[:-1], found[-1] * np.nan], STRICT).agrees
    assert not check.row("torch", "1.0", 1, [x[:, :-1] for x in found], STRICT).agrees


def test_texts_have_exactly_so_many_tokens(model):
    """And each rung begins with the one before, so an engine that cuts gives the vector of a shorter one."""
    words = whole_words(model)
    texts = rung_texts(words)
    ids = [tokenized(model, [text])["input_ids"] for text in texts]
    assert [x.shape for x in ids] == [(1, rung) for rung in RUNGS]
    for shorter, longer in pairwise(ids):
        np.testing.assert_array_equal(shorter[0, :-1], longer[0, : shorter.shape[1] - 1])
    assert RUNGS[-1] > 8192
    batch = timed_texts(32, words)
    assert (
        tokenized(model, batch)["attention_mask"].sum() == TOKENS_PER_CALL == timed_batch(32, 1000)["input_ids"].size
    )
    mixed, *singles = check_texts(words)
    assert "" in mixed
    assert [tokenized(model, x)["input_ids"].shape for x in singles] == [(1, 7), (1, 129), (1, 2049)]


def test_how_far_a_text_was_read(subject):
    """The encoder cut at the rung before is told from the one that reads on, also through the noise of int8."""
    first, second = subject.whole
    assert np.abs(first - second).max() > 0.05  # or int8 could not be told from a cut
    assert reach([first, second], subject.whole, STRICT) == f"{RUNGS[1]:,} and more"
    assert reach([first, first], subject.whole, STRICT) == "512, cuts the rest"
    noisy = [x + np.float32(0.01) * np.sign(x) for x in (first, second)]
    assert reach(noisy, subject.whole, Tolerance(0.05, 0.99)) == f"{RUNGS[1]:,} and more"
    assert reach([first, noisy[1]], subject.whole, STRICT) == "512, then other vectors"
    assert reach([first, "RuntimeError: too long"], subject.whole, STRICT) == "512, then an error"
    assert reach([first * np.nan, second], subject.whole, STRICT) == "none, then other vectors"


def test_the_table_names_what_is_missing(check, model):
    row = check.row("torch, float32", "2", 1_000_000, [torch_embeddings(model, x) for x in check.batches], STRICT)
    row.control, row.reach, row.speed, row.relative = None, "10,240 and more", {128: 1234.5}, {128: 1.0}
    wrong = check.row("other, fp32", "3", 1_000_000, check.control, STRICT)
    lines = table([row, wrong], [Missing("LangChain", "no | such\npackage")], [128]).splitlines()
    assert len({line.count("|") for line in lines}) == 1  # every line has the same cells
    assert lines[2] == "| torch, float32 | 2 | 1.0 | - | - | - | 10,240 and more | 1,234 (1.00) |"
    assert "**no**" in lines[3]
    assert lines[4].startswith("| LangChain | not available: no / such package |")
    assert row_of(json.loads(json.dumps(asdict(row)))) == row
    assert first_of_each(["a, 1", "a, 2", "b, 1"]) == {"a, 1", "b, 1"}


def test_resuming_keeps_what_the_same_settings_measured(check, model, tmp_path):
    same = {"model": "m", "lengths": [16], "rounds": 1, "threads": 1}
    row = check.row("torch, float32", "2", 1, [torch_embeddings(model, x) for x in check.batches], STRICT)
    row.speed, row.relative = {16: 2.0}, {16: 1.0}
    comparison.Report("command", "machine", same, [row], [Missing("LangChain", "no network")]).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["engines.json"]
    again = comparison.Report("command", "machine", same)
    again.resume(tmp_path)
    assert (again.rows, again.missing) == ([row], [])  # what was missing is tried again
    assert "| torch, float32 |" in again.markdown()
    other = comparison.Report("command", "machine", same | {"lengths": [32]})
    other.resume(tmp_path)
    assert other.rows == []


def test_speeds_take_turns(subject):
    turns = []

    def engine(name):
        return lambda batch: turns.append(name) or torch_engine(subject)(batch)

    found = speeds({"a": engine("a"), "b": engine("b")}, timed_batch(64, 1000), 2)
    assert turns == ["a", "b"] * 3
    assert all(speed > 0 for speed in found.values())


def test_without_environments_every_engine_is_named(subject):
    rows = [*client_rows(subject, Settings()), *node_rows(subject, Settings())]
    assert {type(row) for row in rows} == {Missing}
    assert {row.engine.split(",")[0] for row in rows} == {
        "fastembed", "LangChain", "LlamaIndex", "llama.cpp", "transformers.js", "transformers.js pipeline"
    }  # fmt: skip
    assert all("--environments" in row.reason for row in rows)


def test_an_environment_that_fails_is_a_reason(subject, tmp_path, monkeypatch):
    """A folder without the packages, one without its interpreter, and an installer that is not there."""
    rows = list(node_rows(subject, Settings(node=tmp_path)))
    assert all("npm install" in row.reason for row in rows)
    (tmp_path / "fastembed").mkdir()
    (tmp_path / "fastembed" / "requirements.txt").write_text(FASTEMBED.stamp)
    monkeypatch.setattr("hub_repo.engines.clients.CLIENTS", CLIENTS[:1])
    (row,) = client_rows(subject, Settings(environments=tmp_path))
    assert "is not there: remove its folder" in row.reason
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is not installed"):
        prepared(Environment("new", ("x@1.0",), "npm"), tmp_path)
    assert not (tmp_path / "new" / "requirements.txt").exists()


@pytest.mark.slow
def test_environments_are_whole_or_made_anew(tmp_path, monkeypatch):
    import zipfile

    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = tmp_path / "speck-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: speck\nVersion: 1.0\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("speck.py", "x = 1\n")
        file.writestr("speck-1.0.dist-info/METADATA", metadata)
        file.writestr("speck-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("speck-1.0.dist-info/RECORD", "")
    environment = Environment("speck", (str(wheel),))
    folder = prepared(environment, tmp_path)
    assert list(folder.glob("lib/python*/site-packages/speck.py"))
    assert python_of(folder).is_file()
    (folder / "mine").touch()
    assert (prepared(environment, tmp_path) / "mine").exists()  # ready: not touched
    with pytest.raises(RuntimeError, match="no_such_package"):
        prepared(Environment("speck", ("no_such_package==1.0",)), tmp_path)
    assert not (folder / "mine").exists()
    assert not (folder / "requirements.txt").exists()  # so the next call begins anew
    assert list(prepared(environment, tmp_path).glob("lib/python*/site-packages/speck.py"))


def test_bad_arguments_are_one_line(tmp_path, capsys):
    arguments = ["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]
    assert comparison.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nowhere" in error
    with pytest.raises(SystemExit):
        comparison.main([*arguments, "--lengths", "1"])
    assert "lengths are at least 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.engines
@pytest.mark.parametrize("name", ["A-small4h", "B-8h"])
def test_every_engine_gives_the_vectors_of_torch(tmp_path, name):
    """On a random model of the official form in each layout, small, whose attention depends on its biases."""
    environments = os.environ.get("ENGINES")
    if not environments:
        pytest.skip("ENGINES names no folder to install the engines into")
    arguments = ["--model", GOLDEN / name, "--output", tmp_path, "--environments", environments]
    assert comparison.main([str(x) for x in (*arguments, "--lengths", 16, 129, "--rounds", 1)]) == 0
    report = json.loads((tmp_path / "engines.json").read_text())
    assert report["missing"] == []
    rows = {row["engine"]: row for row in report["rows"]}
    assert {name.split(",")[0] for name in rows} >= {
        "torch", "onnxruntime", "OpenVINO", "llama.cpp", "transformers.js", "fastembed", "LangChain", "LlamaIndex"
    }  # fmt: skip
    assert all(row["agrees"] for row in rows.values())
    for engine in ("fastembed, fp32", "LangChain, float32", "LlamaIndex, float32"):
        assert rows[engine]["error"] < 1e-5
        assert rows[engine]["control"] < 0.99
        assert rows[engine]["speed"]["16"] > 0
        assert rows[engine]["reach"] == "8,192, cuts the rest"
    assert rows["transformers.js pipeline, fp32"]["error"] < 1e-5
    assert rows["transformers.js pipeline, fp32"]["reach"] == "8,192, then other vectors"  # it cuts [SEP] off, too
    assert rows["llama.cpp, f16"]["reach"] == f"{RUNGS[-1]:,} and more"
    assert rows["onnxruntime, fp32"]["reach"] == f"{RUNGS[-1]:,} and more"
    assert Path(tmp_path / "engines.md").read_text().count("\n| ") == len(rows)
