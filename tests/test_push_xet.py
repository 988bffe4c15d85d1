"""Publishing to a Hub with Xet, as huggingface.co is: the real hf_xet, whose chunks go to a folder.

Pins: one commit, of the files as they are, through Xet alone; whatever fails leaves every ref as it was, with
one line and without the token; a stranger loads what was published.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import STRANGER_PROLOGUE
from hub_login import WRITE, logged_in_hub  # noqa: F401  pytest finds the fixture by name
from hub_state import Fault
from huggingface_hub import constants
from huggingface_hub.utils._xet import abort_xet_session
from push_runs import (  # noqa: F401  pytest finds the fixtures by name
    contents,
    copy_of_it,
    exported_folder,
    publish,
    refusal,
    scale_weights,
)

from modeling_jina_bert import JinaBertModel

hf_xet = pytest.importorskip("hf_xet")  # huggingface_hub brings it along on x86-64 and arm64

LOAD = """
import sys
from transformers import AutoModel
print(AutoModel.from_pretrained("me/small", trust_remote_code=True).encode("What is ALiBi?")[:4].tolist())
"""


@pytest.fixture(name="xet")
def hub_with_xet(hub, monkeypatch, tmp_path):
    """Of hf_xet's settings the caches are of the test, and it does not try for minutes."""
    hub.xet_store = str(tmp_path / "chunks")
    Path(hub.xet_store).mkdir()
    settings = {"CACHE": str(tmp_path / "xet"), "CLIENT_RETRY_MAX_ATTEMPTS": "1", "CLIENT_RETRY_BASE_DELAY": "10ms"}
    for name, value in settings.items():
        monkeypatch.setenv(f"HF_XET_{name}", value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    abort_xet_session()  # another test's
    yield hub
    abort_xet_session()


def registered(hub, folder: Path):
    """The Hub knows a file's Xet hash from the shards of its upload, which go past this one."""
    weights = folder / "model.safetensors"
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()
    hub.xet_hashes[sha] = hf_xet.hash_files([str(weights)])[0].hash


def published(hub, folder: Path, **options):
    registered(hub, folder)
    return publish(folder, **options)


def refused(hub, folder: Path) -> str:
    registered(hub, folder)
    return refusal(folder)


def stored(hub) -> int:
    return sum(
        path.stat().st_size for path in Path(hub.xet_store).rglob("*") if "xorbs" in path.parts and path.is_file()
    )


def test_weights_go_through_xet_in_one_commit_and_come_back(xet, folder, tmp_path):
    first = published(xet, folder, tag="v1")
    repo = xet.repos["me/small"]
    assert first.oid == repo.resolve("main").oid == repo.refs["refs/tags/v1"]
    assert len(repo.history()) == 2
    found = {path: blob.content for path, blob in repo.resolve("main").files.items() if path != ".gitattributes"}
    assert found == contents(folder)
    assert xet.seen("GET", "xet-write-token") >= 1
    assert xet.seen("PUT", "/lfs") == xet.seen("POST", "lfs/objects/batch") == 0  # nothing the old way
    environment = os.environ | {
        "HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "0", "HF_TOKEN": WRITE,
        "HF_HOME": str(tmp_path / "stranger"), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", STRANGER_PROLOGUE + LOAD], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert process.returncode == 0, process.stderr[-3000:]
    expected = JinaBertModel.from_pretrained(folder).encode("What is ALiBi?")[:4]
    assert json.loads(process.stdout.splitlines()[-1]) == pytest.approx(expected.tolist(), abs=1e-6)
    assert xet.seen("GET", "xet-read-token") >= 1
    assert xet.served["model.safetensors"] == 0  # it came by its chunks

    before = stored(xet)
    scale_weights(folder, 0.5)
    second = published(xet, folder)
    assert repo.resolve("main").changed == ("model.safetensors",)
    assert second.oid != first.oid
    assert stored(xet) > before
    xet.log.clear()
    assert published(xet, folder).oid == second.oid
    assert xet.writes == []


@pytest.mark.parametrize(
    ("method", "page", "how", "said"),
    [
        ("GET", "xet-write-token", 403, "could not upload the files"),
        ("GET", "xet-write-token", 500, "could not upload the files"),
        ("GET", "xet-write-token", "drop", "could not upload the files"),
        ("POST", "/commit/", 403, "could not commit"),
    ],
)
def test_what_fails_leaves_nothing_published(xet, folder, tmp_path, method, page, how, said):
    published(xet, folder)
    before = dict(xet.repos["me/small"].refs)
    scale_weights(folder, 0.5)
    xet.faults.append(Fault(method, page, how, times=float("inf")))
    answer = refused(xet, folder)
    assert said in answer
    assert "\n" not in answer
    assert xet.repos["me/small"].refs == before
    xet.faults.clear()
    assert published(xet, folder).oid == xet.repos["me/small"].resolve("main").oid  # and now it is


def test_a_store_that_cannot_be_written_publishes_nothing(xet, folder, tmp_path):
    published(xet, folder)
    before = dict(xet.repos["me/small"].refs)
    scale_weights(folder, 0.5)
    good, xet.xet_store = xet.xet_store, str(tmp_path / "file" / "below")
    (tmp_path / "file").write_text("no folder")
    answer = refused(xet, folder)
    assert "could not upload the files" in answer
    assert xet.repos["me/small"].refs == before
    xet.xet_store = good
    assert published(xet, folder).oid == xet.repos["me/small"].resolve("main").oid


def test_a_commit_that_names_what_was_never_uploaded_is_refused(xet, folder, tmp_path):
    """The control: the Hub of these tests puts the file together again before it takes a commit."""
    published(xet, folder)
    before = dict(xet.repos["me/small"].refs)
    scale_weights(folder, 0.5)
    xet.faults.append(Fault("POST", "/commit/", lambda: setattr(xet, "xet_store", str(tmp_path / "empty"))))
    answer = refused(xet, folder)
    assert "was not uploaded" in answer
    assert xet.repos["me/small"].refs == before
