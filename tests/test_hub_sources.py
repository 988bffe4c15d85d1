"""`convert`, `encode` and `export` of a repository by its name, over real HTTP: as of its folder, or one line.

Pins: every storage, a private repository, a revision; what cannot be read is one line and status 2, without the token
though the server sends it back, and nothing is written.
"""

import json
import math

import numpy as np
import pytest
import torch
from cli_runs import in_a_folder, rows_of, run  # noqa: F401  pytest finds the fixture by name
from conftest import GOLDEN
from hub_login import OTHER, READ, WRITE, logged_in_hub  # noqa: F401  pytest finds the fixture by name
from hub_state import Blob, Fault
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_cli_info import STORAGES, folder, publish  # noqa: F401  pytest finds the fixture by name

from hub_repo import export as export_module
from modeling_jina_bert import JinaBertModel

WEIGHTS, INDEX = "model.safetensors", "pytorch_model.bin.index.json"
VERBS = {
    "convert": lambda name: ("convert", name, "out"),
    "encode": lambda name: ("encode", "--model", name, "--text", "hello"),
    "export": lambda name: ("export", name, "out", "--dtype", "float32"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What an earlier test has fetched would be found here without the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))


def command(verb, name, *options):
    """Status, standard output and standard error; no token is in them."""
    result = run(*VERBS[verb](name), *options)
    assert not any(token in part for token in (WRITE, READ, OTHER) for part in result[1:])
    return result


def refusal(verb, name, *options) -> str:
    status, stdout, stderr = command(verb, name, *options)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    return stderr


def without_process(monkeypatch):
    """The fresh process of `export`, which takes its time, is in other tests."""
    monkeypatch.setattr(export_module, "_verify", lambda *_: None)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_a_repository_is_taken_as_its_folder(hub, folder, tmp_path, monkeypatch, storage):  # noqa: F811
    storage(folder)
    publish(hub, folder, "me/model")
    hub.repos["me/model"].private = True
    expected = {name.removeprefix("bert."): x for name, x in load_file(GOLDEN / "A-small4h" / WEIGHTS).items()}
    encoder = {name: x for name, x in expected.items() if not name.startswith("cls.")}
    without_process(monkeypatch)
    for verb in ("convert", "export"):
        status, _, stderr = command(verb, "me/model")
        assert status == 0, stderr
        written = load_file(tmp_path / "out" / WEIGHTS)
        assert written.keys() == encoder.keys()
        assert all(torch.equal(tensor, encoder[name]) for name, tensor in written.items())
        (tmp_path / "out").rename(tmp_path / verb)
    status, stdout, stderr = command("encode", "me/model")
    assert status == 0, stderr
    vector = JinaBertModel.from_pretrained(GOLDEN / "A-small4h").encode("hello", normalize_embeddings=True)
    np.testing.assert_allclose(rows_of(stdout)[0]["embedding"], vector, atol=1e-6)
    assert not any(path.endswith("golden.safetensors") for path in hub.served)


def test_a_revision_is_converted(hub, folder, tmp_path):  # noqa: F811
    first = publish(hub, folder)
    hub.repos["me/model"].refs["refs/tags/v1"] = first.oid
    tensors = load_file(folder / WEIGHTS)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    publish(hub, folder)
    name = "embeddings.word_embeddings.weight"
    for revision, factor in (("v1", 1), ("main", 2), (first.oid, 1)):
        status, _, stderr = run("convert", "me/model", revision, "--revision", revision)
        assert status == 0, stderr
        written = load_file(tmp_path / revision / WEIGHTS)[name]
        assert torch.equal(written, factor * tensors[f"bert.{name}"])
    said = refusal("convert", "me/model", "--revision", "v2")
    assert f"me/model has no revision v2 on {constants.ENDPOINT}" in said


@pytest.mark.parametrize("verb", VERBS)
def test_a_repository_that_lacks_files_is_one_line(hub, folder, tmp_path, verb):  # noqa: F811
    STORAGES["shards in bin"](folder)
    publish(hub, folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../part-0.bin")
    changes = [
        ({"part-1.bin": None}, "index.json names 'part-1.bin', which is missing"),
        ({INDEX: Blob(json.dumps(index).encode(), False)}, "names '../part-0.bin', which is not a file name in this"),
        ({INDEX: Blob(b"[]", False)}, "index.json lacks weight_map or metadata"),
        ({INDEX: None}, "has no weights"),
    ]
    for change, message in changes:
        hub.commit("me/model", change, title="damage")
        assert message in refusal(verb, "me/model")
    publish(hub, GOLDEN / "A-small4h")
    hub.commit("me/model", {"tokenizer.json": None, "vocab.txt": None}, title="no tokenizer")
    assert "has no tokenizer: neither tokenizer.json nor vocab.txt" in refusal(verb, "me/model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_what_cannot_be_read_is_one_line(hub, folder, tmp_path, monkeypatch, verb):  # noqa: F811
    publish(hub, folder, "other/private")
    hub.repos["other/private"].private = True
    publish(hub, folder, "other/gated")
    hub.repos["other/gated"].gated = True
    publish(hub, folder)
    for name in ("me/nothing", "other/private"):
        assert f"{name} is neither a folder nor a repository on {constants.ENDPOINT}" in refusal(verb, name)
    said = refusal(verb, "other/gated")
    assert f"other/gated is gated: accept its conditions on {constants.ENDPOINT}/other/gated" in said
    for name in ("nowhere", "a/b/c", "a b/c"):
        assert f"{name} is neither a folder nor the name of a Hub repository" in refusal(verb, name)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert "the Hub does not accept the token" in refusal(verb, "me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "ü" * 34)
    assert "has characters that no token has" in refusal(verb, "me/model")
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "me/model is no folder, and the Hub cannot be asked: HF_HUB_OFFLINE is set" in refusal(verb, "me/model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("page", ["/api/models/me/model", "/resolve/.*config.json", f"/resolve/.*{WEIGHTS}"])
def test_a_server_that_sends_the_token_back(hub, folder, tmp_path, monkeypatch, verb, page):  # noqa: F811
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts
    publish(hub, folder)
    hub.faults += [Fault(method, page, "echo", times=math.inf) for method in ("GET", "HEAD")]
    said = refusal(verb, "me/model")
    assert f"me/model cannot be read from {constants.ENDPOINT}: " in said
    assert "Bearer <token>" in said
    assert not (tmp_path / "out").exists()
