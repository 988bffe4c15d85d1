"""`jina-bert export`, `card` and `push`: each flag reaches what it stands for, the files and the local Hub.

Pins: every format that is asked for is written and loads in its engine; a folder without a card is said to need one;
scores and tags go into the card; visibility, branch, tag, message, pull request, pruning and the dry run are what the
Hub then has; a refused folder is one line and a line for each reason, status 2, and sends nothing.
"""

import json
import shutil
from pathlib import Path

import pytest
from cards import CARD
from cli_runs import in_a_folder, refuse, run, succeed  # noqa: F401  pytest finds the fixture by name
from conftest import GOLDEN
from hub_login import WRITE, logged_in_hub  # noqa: F401  pytest finds the fixture by name
from hub_state import Blob

from hub_repo.folders.checkpoint_files import stored_tensors
from hub_repo.model_card import check_card

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own calls
RECORDS = [{"model": "ours", "set": "STSB", "metrics": {"spearman": 0.5}, "sizes": {"pairs": 9}}]


FILES = (
    "small/onnx/model.onnx",
    "small/onnx/model_quantized.onnx",
    "small/openvino/openvino_model.xml",
    "small/small-F16.gguf",
    "small-tei/model.safetensors",
    "small",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A golden model exported by the command, with its card and the files of every engine."""
    for package in ("onnxruntime", "openvino", "gguf"):
        pytest.importorskip(package)
    root = tmp_path_factory.mktemp("exported")
    (root / "CARD.md").write_text(CARD)
    formats = ["--onnx", "fp32,int8", "--openvino", "--gguf", "f16", "--tei", root / "small-tei", "--dtype", "float32"]
    stdout, stderr = succeed("export", GOLDEN / "A-small4h", root / "small", "--card", root / "CARD.md", *formats)
    *files, _ = lines = stdout.splitlines()
    assert [line.split(" (")[0] for line in lines] == [f"wrote and verified {root / name}" for name in FILES]
    assert all("cosine" in line for line in files)
    assert "no model card" not in stderr
    return root


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported / "small", tmp_path / "small")


@pytest.fixture
def verified(monkeypatch):
    """Pushes without the load in a fresh process, which takes seconds; the folders that were to be checked."""
    asked = []
    monkeypatch.setattr("hub_repo.push._verify", lambda *arguments: asked.append(arguments))
    return asked


def test_export_writes_what_is_asked_for(exported):
    assert (exported / "small" / "README.md").read_text() == CARD
    assert {tensor.dtype for tensor in stored_tensors(exported / "small").values()} == {"F32"}
    assert json.loads((exported / "small-tei" / "config.json").read_text())["model_type"] == "bert"


def test_export_without_a_card_says_that_a_push_needs_one(monkeypatch):
    monkeypatch.setattr("hub_repo.export._verify", lambda *arguments: None)
    stdout, stderr = succeed("export", GOLDEN / "A-small4h", "out")
    assert stdout == "wrote and verified out\n"
    assert "note: out has no model card (README.md), which a push needs: --card CARD.md writes one." in stderr
    assert {tensor.dtype for tensor in stored_tensors(Path("out")).values()} == {"F16"}


def test_export_refuses_formats_that_there_are_not():
    for options, message in (
        (["--onnx", "fp64"], "'fp64' is not one of"),
        (["--gguf", "f16,q2"], "'q2' is not one of"),
        (["--card", "nowhere.md"], "nowhere.md is no file"),
    ):
        assert message in refuse("export", GOLDEN / "A-small4h", "out", *options)


def test_scores_and_tags_go_into_the_card(tmp_path):
    for name, content in (("README.md", CARD), ("bare.md", "# No metadata\n"), ("other.json", "{}")):
        (tmp_path / name).write_text(content)
    (tmp_path / "results.json").write_text(json.dumps({"records": RECORDS}))
    stdout, _ = succeed("card", "README.md", "--results", "results.json", "--model", "ours", "--tags", "a b,c")
    assert stdout == "README.md: written, its metadata is what the Hub takes\n"
    filled = (tmp_path / "README.md").read_text()
    assert check_card(filled) == []
    assert all(
        part in filled for part in ("value: 0.5", "type: spearman_cosine", "- a b\n", "- c\n", "A random model.")
    )
    assert "unchanged" in succeed("card", "README.md")[0]
    assert "bm25" in refuse("card", "README.md", "--results", "results.json", "--model", "bm25")
    assert "other.json" in refuse("card", "README.md", "--results", "other.json", "--model", "ours")
    assert "does not begin with a block of metadata" in refuse("card", "bare.md")
    assert (tmp_path / "README.md").read_text() == filled


def test_a_push_of_the_exported_folder_loads_by_name(hub, folder):
    """With the check of the folder, as a user runs it."""
    stdout, _ = succeed("push", "small", "me/small", "--private", "--tag", "v1", "--commit-message", "First")
    repo = hub.repos["me/small"]
    commit = repo.resolve("main")
    assert (repo.private, commit.title, repo.refs["refs/tags/v1"]) == (True, "First", commit.oid)
    assert stdout.splitlines()[-1] == "tag: v1"
    assert f"/me/small/commit/{commit.oid}" in stdout
    found = json.loads(succeed("info", "me/small", "--revision", "v1", "--json")[0])
    assert (found["kind"], found["loads"], found["commit"]) == ("ours", True, commit.oid)


def test_the_flags_of_push(hub, folder, verified):
    assert "dry run: nothing was sent" in succeed("push", "small", "me/small", "--dry-run")[0]
    assert hub.repos == {}
    succeed("push", "small", "me/small", "--public", "--trust")
    assert verified == [(Path("small"), False), (Path("small"), True)]
    repo = hub.repos["me/small"]
    first = repo.resolve("main")
    assert not repo.private
    assert "me/small is public, not private" in refuse("push", "small", "me/small", "--private")
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    assert "a new repository" not in succeed("push", "small", "me/small", "--revision", "next")[0]
    assert repo.resolve("next").parent == repo.resolve("main").oid == first.oid
    stdout, _ = succeed("push", "small", "me/small", "--create-pr")
    assert "pull request: " in stdout
    assert "refs/pr/1" in repo.refs
    assert "tag the commit after" in refuse("push", "small", "me/small", "--create-pr", "--tag", "v1")
    hub.commit("me/small", {"old.txt": Blob(b"1", False)}, title="old")
    assert "kept      old.txt" in succeed("push", "small", "me/small", "--dry-run")[0]
    assert "deleted   old.txt" in succeed("push", "small", "me/small", "--prune")[0]
    assert "old.txt" not in repo.resolve("main").files


def test_code_that_is_not_the_packages_is_refused_without_trust(hub, folder):
    (folder / "alibi.py").write_text((folder / "alibi.py").read_text() + "\n# changed\n")
    status, stdout, stderr = run("push", "small", "me/small")
    assert (status, stdout, hub.repos) == (2, "", {})
    assert stderr.startswith("error: small cannot be published, for ")
    assert "alibi.py" in stderr


def test_a_refused_folder_is_a_line_and_one_for_each_reason(hub, folder, verified):
    (folder / "pytorch_model.bin").write_bytes(b"1")
    (folder / "notes.txt").write_text(f"my token is {WRITE}")
    status, stdout, stderr = run("push", "small", "me/small")
    assert (status, stdout, hub.log) == (2, "", [])
    first, *reasons = stderr.splitlines()
    assert first == f"error: small cannot be published, for {len(reasons)} reasons:"
    assert {reason.split(":")[0] for reason in reasons} == {"  pytorch_model.bin", "  notes.txt"}
    assert WRITE not in stderr
    (folder / "pytorch_model.bin").unlink()
    (folder / "notes.txt").unlink()
    (folder / "README.md").unlink()
    assert run("push", "small", "me/small")[2].startswith(
        "error: small cannot be published, for 1 reason:\n  README.md"
    )
