"""What of a folder may be published: every kind of secret, pickle, link and size is found, and nothing harmless is."""

import json
import os
import zipfile

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import save_file

from hub_repo.hub.publishable import Limits, UnpublishableFolder, scan

LIMITS = Limits(file_bytes=2_000_000, text_bytes=800_000)
TOKEN = "a-token-of-no-known-form"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "small" / "sub").mkdir(parents=True)
    (tmp_path / "small" / "README.md").write_text("# Card\n")
    return tmp_path / "small"


def torch_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


def link(path, target):
    path.symlink_to(target)


PRIVATE_KEY = "-----BEGIN RSA " + "PRIVATE KEY-----"
UNPUBLISHABLE = {
    "own token": (lambda f: (f / "a.json").write_text(json.dumps([TOKEN])), "a.json:1: the token of this machine"),
    "hub token": (lambda f: (f / "notes.md").write_text("a\nb hf_" + "A1" * 17), "notes.md:2: a Hugging Face token"),
    "aws key": (lambda f: (f / "x.py").write_text("k='AKIA" + "Z2" * 8 + "'"), "x.py:1: an AWS access key"),
    "private key": (lambda f: (f / "sub" / "k").write_text(PRIVATE_KEY), "sub/k:1: a private key"),
    "in metadata": (
        lambda f: save_file({"a": torch.zeros(1)}, f / "b.safetensors", metadata={"run": "ghp_" + "a" * 36}),
        "b.safetensors (metadata):1: a GitHub token",
    ),
    "env": (lambda f: (f / ".env").write_text("A=1"), ".env: private by its name"),
    "git": (lambda f: (f / ".git" / "objects").mkdir(parents=True), ".git: private by its name"),
    "gitignore": (lambda f: (f / ".gitignore").write_text("*"), ".gitignore: the Hub would silently leave out"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"1"), "pytorch_model.bin: a pickle by its suffix"),
    "renamed pickle": (lambda f: (f / "w.dat").write_bytes(b"\x80\x04\x95abc"), "w.dat: a pickle by its content"),
    "renamed archive": (lambda f: torch_archive(f / "w.dat"), "w.dat: a torch archive"),
    "no safetensors": (lambda f: torch_archive(f / "w.safetensors"), "w.safetensors: not a whole safetensors file"),
    "cut": (
        lambda f: (f / "w.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      " + b"1"),
        "w.safetensors: not a whole safetensors file",
    ),
    "link out": (lambda f: link(f / "l", REPOSITORY / "LICENSE"), "l: a link that leaves the folder"),
    "link to nothing": (lambda f: link(f / "l", "nothing"), "l: a broken link"),
    "link to a folder": (lambda f: link(f / "l", "sub"), "l: a link to a folder"),
    "pipe": (lambda f: os.mkfifo(f / "p"), "p: not a regular file"),
    "large text": (lambda f: (f / "t.txt").write_text("a" * 900_000), "t.txt: 900,000 bytes of text"),
    "large weights": (
        lambda f: save_file({"a": torch.zeros(10**6)}, f / "w.safetensors"),
        "w.safetensors: 4,000,0",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), UNPUBLISHABLE.values(), ids=UNPUBLISHABLE)
def test_what_may_not_be_published(folder, spoil, message):
    spoil(folder)
    found = scan(folder, LIMITS)
    assert [problem.startswith(message) for problem in found.problems] == [True]
    assert not any(secret in found.problems[0] for secret in ("A1A1", "Z2Z2", "aaaa", TOKEN))
    assert [file.path for file in found.files if message.startswith(f"{file.path}:")] == []


def test_what_only_looks_unpublishable(folder):
    """OpenVINO's weights end in .bin; a link inside is a file; words of code look like tokens; weights are large."""
    (folder / "openvino").mkdir()
    (folder / "openvino" / "openvino_model.xml").write_text("<net/>")
    (folder / "openvino" / "openvino_model.bin").write_bytes(bytes(100))
    link(folder / "vocabulary.txt", "README.md")
    (folder / "notes.md").write_text(
        "hf_hub_download, hf_" + "_".join(["long", "name"] * 6) + ", AKIA, sk-learn, .env"
    )
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_bytes(b"\x80\x04\x95")
    # The length of this header begins like a pickle, 80 02.
    save_file({"a" * 576: torch.zeros(10_000)}, folder / "model.safetensors")
    assert (folder / "model.safetensors").read_bytes()[:2] == b"\x80\x02"
    found = scan(folder, LIMITS)
    assert found.problems == []
    assert found.left_out == ["__pycache__"]
    assert {file.path: file.size for file in found.files} == {
        "README.md": 7,
        "model.safetensors": (folder / "model.safetensors").stat().st_size,
        "notes.md": (folder / "notes.md").stat().st_size,
        "openvino/openvino_model.bin": 100,
        "openvino/openvino_model.xml": 6,
        "vocabulary.txt": 7,
    }


def test_every_problem_is_found_at_once(folder):
    for spoil in ("env", "git", "pickle", "large text"):
        UNPUBLISHABLE[spoil][0](folder)
    assert len(scan(folder, LIMITS).problems) == 4
    with pytest.raises(UnpublishableFolder, match="is not a folder"):
        scan(folder / "README.md", LIMITS)


def test_hashes_are_those_of_git_and_lfs(folder):
    """`printf '# Card\\n' | git hash-object --stdin`, and sha256sum."""
    (file,) = scan(folder, LIMITS).files
    assert file.blob_id == "9efb2139bc6b95ddfecd34389a01a09c05cdb23a"
    assert file.sha256 == "87851527cd6c59eacbdd2c6798ddeb44925b095e24f5d67530cd3d57bfb716de"
