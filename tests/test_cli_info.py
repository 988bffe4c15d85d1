"""`jina-bert info` of a Hub repository, over real HTTP: the same as of the folder, from headers alone.

Pins: a repository of either form, in safetensors, shards or .bin, is described as its folder is; no code file and no
tensor is fetched; what is missing, cut off or lies is said; what cannot be read is one line and status 2 without the
token; nothing is written where a listing or an index points out of the folder.
"""

import dataclasses
import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from cli_runs import in_a_folder, run  # noqa: F401  pytest finds the fixture by name
from conftest import GOLDEN, SHIPPED
from hub_login import OTHER, READ, WRITE, logged_in_hub  # noqa: F401  pytest finds the fixture by name
from hub_state import Blob, Fault, Repo
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hub_repo.hub import outline
from hub_repo.inspect_folder import inspect_folder, inspect_repository, main

WEIGHTS = "model.safetensors"
TRACE = "\nimport pathlib\npathlib.Path({!r}).write_text('it ran')\n"


@pytest.fixture
def folder(tmp_path):
    """The golden model of layout A in the official form, without the files of the test beside it."""
    names = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    (tmp_path / "model").mkdir()
    for name in names:
        shutil.copy(GOLDEN / "A-small4h" / name, tmp_path / "model" / name)
    return tmp_path / "model"


def publish(hub, folder, repo_id="me/model", **options):
    hub.repos.setdefault(repo_id, Repo(private=False))
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    blobs = {
        p.relative_to(folder).as_posix(): Blob(p.read_bytes(), p.suffix in (".safetensors", ".bin")) for p in paths
    }
    return hub.commit(repo_id, blobs, title="files", **options)


def info(*arguments):
    """Status, standard output and standard error; no token is in them."""
    result = run("info", *arguments)
    assert not any(token in part for token in (WRITE, READ, OTHER) for part in result[1:])
    return result


def refusal(*arguments) -> str:
    status, stdout, stderr = info(*arguments)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    return stderr


def as_official_bin(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def as_shards(folder, save=save_file, suffix=".safetensors", index="model.safetensors.index.json"):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    for number, names in enumerate(halves):
        save({name: tensors[name] for name in names}, folder / f"part-{number}{suffix}")
    weight_map = {name: f"part-{number}{suffix}" for number, names in enumerate(halves) for name in names}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


STORAGES = {
    "safetensors": lambda folder: None,
    "bin": as_official_bin,
    "shards": as_shards,
    "shards in bin": lambda f: as_shards(f, torch.save, ".bin", "pytorch_model.bin.index.json"),
}


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_an_official_repository_is_described_as_its_folder(hub, folder, storage):
    """To the last field; of the weights less than their header's neighbourhood is fetched."""
    storage(folder)
    commit = publish(hub, folder)
    found, expected = inspect_repository("me/model"), inspect_folder(folder)
    assert found == dataclasses.replace(expected, folder="me/model", commit=commit.oid)
    assert (found.kind, found.layout, found.loads, found.shape["heads"]) == ("official", "A", True, 4)
    weights = [path for path in commit.files if path.endswith((".safetensors", ".bin"))]
    assert set(hub.served) == {"config.json", *weights, *(path for path in commit.files if "index" in path)}
    for path in weights:
        assert hub.served[path] < len(commit.files[path].content) / 10


def test_our_repository_none_of_its_code_is_fetched(hub, tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "tiny", ignore=shutil.ignore_patterns("__pycache__"))
    mark = tmp_path / "it ran"
    for path in folder.glob("*.py"):
        path.write_text(path.read_text() + TRACE.format(str(mark)))
    commit = publish(hub, folder)
    status, stdout, _ = info("me/model", "--json")
    found = json.loads(stdout)
    assert status == 0
    assert (found["folder"], found["kind"], found["loads"], found["problems"]) == ("me/model", "ours", True, [])
    assert (found["commit"], found["pooling"], found["max_length"]) == (commit.oid, "mean_tokens, normalised", 8192)
    assert set(hub.served) == {
        "1_Pooling/config.json", "config.json", "modules.json", WEIGHTS, "sentence_bert_config.json",
    }  # fmt: skip
    assert hub.served[WEIGHTS] < 20_000 < len(commit.files[WEIGHTS].content)
    assert not mark.exists()
    lines = info("me/model")[1].splitlines()
    assert lines[:4] == [
        "me/model",
        f"  commit        {commit.oid}",
        "  kind          ours, layout A",
        "  loads         yes",
    ]


def test_what_is_missing_is_said(hub, tmp_path, folder):
    tiny = shutil.copytree(SHIPPED, tmp_path / "tiny", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tokenizer.json", "alibi.py", "1_Pooling/config.json"):
        (tiny / name).unlink()
    publish(hub, tiny, "me/tiny")
    found = inspect_repository("me/tiny")
    assert found.missing == ("tokenizer.json", "1_Pooling/config.json", "alibi.py")
    publish(hub, folder)
    assert inspect_repository("me/model").missing[:2] == ("modules.json", "1_Pooling/config.json")
    as_shards(folder)
    (folder / "part-1.safetensors").unlink()
    publish(hub, folder, "me/shards")
    index = "me/shards/model.safetensors.index.json"
    assert inspect_repository("me/shards").problems == (f"{index} names 'part-1.safetensors', which is missing.",)
    hub.commit("me/model", {WEIGHTS: None}, title="no weights")
    assert inspect_repository("me/model").problems[0].startswith("me/model has no weights: neither")
    hub.commit("me/model", {"config.json": None}, title="nor a configuration")
    assert inspect_repository("me/model").problems == ("me/model/config.json is missing.",)


def test_a_revision(hub, folder):
    first = publish(hub, folder)
    hub.repos["me/model"].refs["refs/tags/v1"] = first.oid
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    publish(hub, folder, ref="refs/pr/1", parent=first.oid)
    second = publish(hub, folder)
    found = {name: inspect_repository("me/model", name) for name in ("v1", "main", "refs/pr/1", first.oid)}
    assert found["v1"] == found[first.oid]
    assert (found["v1"].commit, found["main"].commit, found["v1"].loads) == (first.oid, second.oid, True)
    assert not found["main"].loads
    assert "no JinaBERT of its layout has" in found["refs/pr/1"].problems[0]
    assert f"has no revision v2 on {constants.ENDPOINT}" in refusal("me/model", "--revision", "v2")
    assert "is a folder: --revision is for a Hub repository" in refusal(folder, "--revision", "v1")


def cut(content: bytes) -> bytes:
    return content[:-1000]


def long_header(content: bytes) -> bytes:
    return struct.pack("<Q", 2**62) + content[8:]


def lying_shape(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["bert.embeddings.word_embeddings.weight"]["shape"][0] += 1
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def empty(content: bytes) -> bytes:
    return b""


def no_utf8_name(content: bytes) -> bytes:
    """In the directory of a .bin file, which says that its names are UTF-8."""
    place = content.rindex(b"/byteorder")
    return content[:place] + b"\xff" + content[place + 1 :]


DAMAGES = [(damage, False) for damage in (cut, long_header, lying_shape, empty)] + [
    (cut, True),
    (empty, True),
    (no_utf8_name, True),
]


@pytest.mark.parametrize(("damage", "in_bin"), DAMAGES)
def test_damaged_weights_are_a_problem(hub, folder, damage, in_bin):
    if in_bin:
        as_official_bin(folder)
    (weights,) = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    weights.write_bytes(damage(weights.read_bytes()))
    publish(hub, folder)
    status, stdout, stderr = info("me/model", "--json")
    found = json.loads(stdout)
    assert (status, stderr, found["loads"]) == (0, "", False)
    expected = "is no whole archive: cut off" if in_bin else "is not a whole safetensors file"
    assert expected in found["problems"][0]
    assert "/tmp" not in stdout


def test_nothing_leaves_the_folder(hub, folder, tmp_path):
    as_shards(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weight_map, "../../stolen")}))
    publish(hub, folder)
    evil = {path: Blob(b"{}", False) for path in ("../../config.json", "a/../../config.json", "..", "a\\config.json")}
    hub.commit("me/model", evil, title="paths")
    found = inspect_repository("me/model")
    assert [f"lists {path!r}, which is no path in a folder" for path in sorted(evil)] == list(found.problems[:4])
    assert "names '../../stolen', which is not a file name in this folder" in found.problems[4]
    assert set(hub.served) == {"config.json", "model.safetensors.index.json"}


def test_large_and_broken_json_is_said(hub, folder, monkeypatch):
    monkeypatch.setattr(outline, "JSON_BYTES", 3000)
    (folder / "modules.json").write_text("[" * 3001)
    publish(hub, folder)
    found = inspect_repository("me/model")
    assert found.loads
    assert "modules.json has 3,001 bytes, too many for a configuration; it was not read" in found.problems
    (folder / "config.json").write_bytes(b"\xff{}")
    publish(hub, folder)
    assert "me/model/config.json is not readable JSON" in inspect_repository("me/model").problems[1]


def test_what_cannot_be_read_is_one_line(hub, folder, monkeypatch, capfd):
    publish(hub, folder, "other/private")
    hub.repos["other/private"].private = True
    publish(hub, folder, "other/gated")
    hub.repos["other/gated"].gated = True
    publish(hub, folder)
    for name in ("me/nothing", "other/private"):
        assert f"{name} is neither a folder nor a repository on {constants.ENDPOINT}" in refusal(name)
    assert f"other/gated is gated: accept its conditions on {constants.ENDPOINT}/other/gated" in refusal("other/gated")
    for name in ("nowhere", "a/b/c", folder / "config.json", "me//x", "./nowhere", "a b/c"):
        assert "is neither a folder nor the name of a Hub repository" in refusal(name)
    hub.faults.append(Fault("GET", "/api/models/me/model", "echo"))
    assert "could not handle Bearer <token>" in refusal("me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert "the Hub does not accept the token" in refusal("me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "ü" * 34)
    assert "has characters that no token has" in refusal("me/model")
    monkeypatch.delenv("HF_TOKEN")
    assert "other/gated is gated" in refusal("other/gated")
    assert info("me/model")[0] == 0
    assert main(["me/model", "--json"]) == 0
    assert main(["me/nothing"]) == 2
    assert capfd.readouterr().err.startswith("error: me/nothing is neither")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "me/model is no folder, and the Hub cannot be asked: HF_HUB_OFFLINE is set" in refusal("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    assert "me/model cannot be read from http://127.0.0.1:9: " in refusal("me/model")


def test_a_dropped_connection_is_tried_again_and_one_that_lasts_is_said(hub, folder, monkeypatch):
    publish(hub, folder)
    expected = inspect_repository("me/model")
    hub.faults.append(Fault("GET", f"/resolve/.*{WEIGHTS}", "drop"))
    assert inspect_repository("me/model") == expected
    hub.faults.append(Fault("GET", "/resolve/.*config.json", "halve", times=math.inf))
    assert "me/model: config.json broke off" in refusal("me/model")


def test_nothing_stays_on_the_disk(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    publish(hub, folder)
    assert info("me/model")[0] == 0
    hub.faults.append(Fault("GET", f"/resolve/.*{WEIGHTS}", 403))
    refusal("me/model")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not list(Path(constants.HF_HUB_CACHE).glob("models--me--model*"))
