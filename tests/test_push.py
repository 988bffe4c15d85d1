"""Publishing against a local Hub over real HTTP: one commit or none, whatever breaks, and loadable by its name.

Pins: only what differs is sent; a lost answer makes no second commit; a failure leaves every ref as it was; secrets,
pickles and private files never leave; the token is in no output; a stranger loads what was published.
"""

import json
import math
import os
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from cards import CARD
from conftest import REPOSITORY, SHIPPED, STRANGER_PROLOGUE
from hub_login import OTHER, READ, WRITE, logged_in_hub  # noqa: F401  pytest finds the fixture by name
from hub_state import Blob, Fault
from huggingface_hub import constants
from push_runs import (  # noqa: F401  pytest finds the fixtures by name
    contents,
    copy_of_it,
    exported_folder,
    publish,
    refusal,
    scale_weights,
)
from safetensors.torch import load_file, save_file

from hub_repo.folders.folder_files import write_json
from hub_repo.push import describe, main, push
from modeling_jina_bert import JinaBertModel

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own calls


def test_one_commit_and_then_only_what_differs(hub, folder):
    hub.part_size = 1_000_000
    first = publish(folder, private=True, tag="v1", commit_message="first")
    repo = hub.repos["me/small"]
    commit = repo.resolve("main")
    assert [made.title for made in repo.history()] == ["first", "initial commit"]
    assert first.oid == commit.oid == repo.refs["refs/tags/v1"]
    assert first.commit_url == f"{constants.ENDPOINT}/me/small/commit/{commit.oid}"
    assert (first.new_repository, repo.private, first.tag, first.pr_url) == (True, True, "v1", None)
    found = {path: blob.content for path, blob in commit.files.items() if path != ".gitattributes"}
    assert found == contents(folder)
    assert [path for path, blob in commit.files.items() if blob.lfs] == ["model.safetensors"]
    assert hub.seen("PUT", "/lfs-part/") == math.ceil(len(found["model.safetensors"]) / 1_000_000) > 2

    hub.log.clear()
    assert publish(folder, private=True).oid == first.oid
    assert hub.writes == []

    (folder / "README.md").write_text(CARD + "\nMore.\n")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "notes.txt").write_text("new")
    second = publish(folder)
    assert repo.resolve("main").changed == ("README.md", "onnx/notes.txt")
    assert repo.resolve("main").parent == first.oid
    assert (second.count("new"), second.count("changed")) == (1, 1)
    assert hub.seen("PUT", "") == 0
    scale_weights(folder, 0.5)
    publish(folder)
    assert repo.resolve("main").changed == ("model.safetensors",)


def test_old_weights_of_other_engines_are_said(hub, folder, caplog):
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"of the weights before")
    publish(folder)
    (folder / "onnx" / "model.onnx").unlink()
    assert not caplog.text
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    publish(folder)
    assert "onnx/model.onnx on the Hub are of weights before these; --prune deletes" in caplog.text
    caplog.clear()
    publish(folder)  # nothing is new now: nothing to say
    assert not caplog.text


def test_dry_run_and_prune(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    nothing_there = publish(folder, dry_run=True)
    assert (nothing_there.new_repository, nothing_there.oid) == (True, None)
    assert nothing_there.count("new") == len(contents(folder))
    monkeypatch.setenv("HF_TOKEN", WRITE)
    publish(folder)
    hub.commit("me/small", {"old.py": Blob(b"1", False), "onnx/model.onnx": Blob(b"2", True)}, title="more")
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "alibi.pyc").write_bytes(b"\0")
    hub.log.clear()
    monkeypatch.delenv("HF_TOKEN")
    kept, pruned = (publish(folder, dry_run=True, prune=prune) for prune in (False, True))
    assert hub.writes == []
    assert hub.seen("GET", "cursor=") >= 2  # pages of the listing
    assert "kept      old.py  1 bytes" in describe(kept)
    size = (folder / "README.md").stat().st_size
    assert describe(pruned).splitlines()[-6:] == [
        f"changed   README.md  {size} bytes",
        "deleted   old.py  1 bytes",
        "deleted   onnx/model.onnx  1 bytes",
        f"unchanged {len(contents(folder)) - 2} files",
        "left out  __pycache__",
        f"dry run: nothing was sent; a push uploads {size} bytes to me/small, main",
    ]
    monkeypatch.setenv("HF_TOKEN", WRITE)
    publish(folder, prune=True)
    left = set(hub.repos["me/small"].resolve("main").files)
    assert left == {path for path in contents(folder) if "__pycache__" not in path} | {".gitattributes"}


def test_branches_tags_and_pull_requests(hub, folder, monkeypatch):
    first = publish(folder, tag="v1")
    repo = hub.repos["me/small"]
    assert publish(folder, revision="same").oid == repo.refs["refs/heads/same"] == first.oid
    (folder / "README.md").write_text(CARD + "\nNext.\n")
    following = publish(folder, revision="next/one")
    assert repo.refs["refs/heads/next/one"] == following.oid
    assert repo.commits[following.oid].parent == repo.refs["refs/heads/main"] == first.oid

    assert "has a tag v1 already" in refusal(folder, tag="v1")
    assert "v1 is a tag; push to a branch" in refusal(folder, revision="v1")
    assert "has no refs/pr/1" in refusal(folder, revision="refs/pr/1")
    assert "tag the commit after" in refusal(folder, create_pr=True, tag="v2")
    assert "against main" in refusal(folder, create_pr=True, revision="next/one")
    assert "not a name" in refusal(folder, tag="a b")
    assert "does not exist" in refusal(folder, "me/nothing", create_pr=True)

    monkeypatch.setenv("HF_TOKEN", OTHER)
    proposed = publish(folder, create_pr=True)
    assert proposed.pr_url == f"{constants.ENDPOINT}/me/small/discussions/1"
    assert proposed.revision == "refs/pr/1"
    assert proposed.oid == repo.refs["refs/pr/1"]
    monkeypatch.setenv("HF_TOKEN", WRITE)
    (folder / "README.md").write_text(CARD + "\nCorrected.\n")
    corrected = publish(folder, revision="refs/pr/1")
    assert [c.oid for c in repo.history("refs/pr/1")][:3] == [corrected.oid, proposed.oid, first.oid]
    assert repo.refs["refs/heads/main"] == first.oid


def test_who_may(hub, folder, monkeypatch):
    publish(folder, "me/open")
    publish(folder, "me/closed", private=True)
    before = {name: dict(repo.refs) for name, repo in hub.repos.items()}
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    assert "me/open is public, not private" in refusal(folder, "me/open", private=True)
    assert "me/closed is private, not public" in refusal(folder, "me/closed", private=False)
    assert "needs write permission" in refusal(folder, "other/new")
    assert "write owner/name" in refusal(folder, "small")
    assert "me//x" in refusal(folder, "me//x")
    for token, repo_id, message in [
        (READ, "me/open", "403 Forbidden: you must use a write token"),
        (OTHER, "me/open", "needs write permission"),
        (OTHER, "me/closed", "could not create the repository: 403"),
        ("hf_" + "x" * 34, "me/open", "does not accept the token"),
        ("", "me/open", "No Hugging Face token: run `hf auth login`"),
        ("hf_" + "ü" * 34, "me/open", "characters that no token has"),
    ]:
        monkeypatch.setenv("HF_TOKEN", token)
        shown = refusal(folder, repo_id)
        assert message in shown
        assert "\n" not in shown
        assert not token or token not in shown
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    assert "offline mode" in refusal(folder, "me/open")
    assert {name: repo.refs for name, repo in hub.repos.items()} == before


def test_an_unfit_folder_sends_nothing(hub, folder):
    (folder / "README.md").write_text(f"# No metadata\n\nBut my token is {WRITE}")
    (folder / "pytorch_model.bin").write_bytes(b"1")
    shown = refusal(folder).splitlines()
    assert shown[0] == f"{folder} cannot be published:"
    assert [line.split(";")[0] for line in shown[1:]] == [
        "  README.md:3: a Hugging Face token",
        "  README.md:3: the token of this machine",
        "  pytorch_model.bin: a pickle by its suffix .bin",
        "  README.md: does not begin with a block of metadata (--- YAML ---)",
    ]
    (folder / "README.md").unlink()
    assert "README.md: missing" in refusal(folder, dry_run=True)
    assert hub.log == []


def test_a_folder_that_does_not_verify_is_not_published(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"auto_map": {"AutoModel": "somebody/code--model.Model"}})
    with pytest.raises(ValueError, match="code of another repository"):
        push(folder, "me/small")
    assert main([str(folder), "me/small"]) == 2
    assert hub.repos == {}


PASSING = {
    "info": [Fault("GET", "/api/models/me/small$", 500)],
    "create": [Fault("POST", "/repos/create", "lose")],
    "listing": [Fault("GET", "/refs", "drop")],
    "card": [Fault("POST", "/validate-yaml", 502, after=1)],
    "upload": [Fault("PUT", "^/lfs/", "cut")],
    "rate limit": [Fault("POST", "/preupload/", 429, headers={"Retry-After": "0"})],
    "commit dropped": [Fault("POST", "/commit/", "drop"), Fault("POST", "/commit/", 503)],
    "commit cut": [Fault("POST", "/commit/", "cut")],
    "answer lost": [Fault("POST", "/commit/", "lose")],
    "branch": [Fault("POST", "/branch/", "lose")],
    "tag": [Fault("POST", "/tag/", "lose")],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_a_passing_fault_makes_no_difference(hub, folder, faults):
    hub.faults += faults
    result = publish(folder, revision="next", tag="v1")
    repo = hub.repos["me/small"]
    assert all(fault.times == 0 for fault in hub.faults)
    assert repo.refs == {
        "refs/heads/main": repo.resolve("main").oid,
        "refs/heads/next": result.oid,
        "refs/tags/v1": result.oid,
    }
    assert len(repo.history("next")) == len(repo.commits) == 2
    assert result.commit_url.endswith(f"/me/small/commit/{result.oid}")


def test_a_lost_answer_makes_no_second_pull_request(hub, folder):
    publish(folder)
    hub.commit("me/small", {"other.txt": Blob(b"1", False)}, title="another", ref="refs/pr/1")
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    hub.faults += [Fault("POST", "/commit/", "lose"), Fault("POST", "/commit/", "drop")]
    hub.faults[0].after = 1
    result = publish(folder, create_pr=True)
    assert result.pr_url.endswith("/me/small/discussions/2")
    assert sorted(ref for ref in hub.repos["me/small"].refs if "/pr/" in ref) == ["refs/pr/1", "refs/pr/2"]


LASTING = {
    "upload": (Fault("PUT", "^/lfs/", 403), "could not upload the files: 403"),
    "branch": (Fault("POST", "/branch/", 500), "could not create the branch next: 500"),
    "connection": (Fault("POST", "/commit/", "drop"), "could not commit: "),
    "server": (Fault("POST", "/commit/", 500), "could not commit: 500"),
    "refused": (Fault("POST", "/commit/", 400), "could not commit: 400"),
    "card": (Fault("POST", "/validate-yaml", 400), "could not have the card checked"),
    "echo": (Fault("POST", "/commit/", "echo"), "could not handle Bearer <token>"),
}


@pytest.mark.parametrize(("fault", "message"), LASTING.values(), ids=LASTING)
def test_a_lasting_fault_publishes_nothing(hub, folder, fault, message):
    publish(folder)
    repo = hub.repos["me/small"]
    refs, commits = dict(repo.refs), set(repo.commits)
    scale_weights(folder, 0.5)
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    fault.times = math.inf
    hub.faults.append(fault)
    hub.log.clear()
    assert message in refusal(folder, revision="next", tag="v1")
    assert (repo.refs, set(repo.commits)) == (refs, commits)
    expected = 1 if isinstance(fault.how, int) and fault.how < 500 else 3  # 4xx is not repeated
    assert hub.seen(fault.method, fault.path) == expected
    hub.faults.clear()
    assert publish(folder, revision="next", tag="v1").oid == repo.refs["refs/tags/v1"]


def test_somebody_else_pushes_meanwhile(hub, folder):
    publish(folder)
    (folder / "README.md").write_text(CARD + "\nMore.\n")

    def push_of_another():
        hub.commit("me/small", {"theirs.txt": Blob(b"1", False)}, title="theirs")

    hub.faults.append(Fault("POST", "/commit/", push_of_another))
    shown = refusal(folder)
    assert "somebody else pushed; nothing was published" in shown
    repo = hub.repos["me/small"]
    assert [commit.title for commit in repo.history()] == ["theirs", "Publish small", "initial commit"]
    publish(folder)
    assert repo.resolve("main").changed == ("README.md",)


def test_a_remote_gitignore_does_not_lose_files(hub, folder):
    publish(folder)
    head = hub.commit("me/small", {".gitignore": Blob(b"*.safetensors\n", False)}, title="ignore")
    scale_weights(folder, 0.5)
    assert "its .gitignore leaves out model.safetensors" in refusal(folder)
    assert hub.repos["me/small"].resolve("main") == head


def test_the_local_hub_serves_ranges_and_hides_what_is_private(hub, folder):
    publish(folder, private=True)
    url = f"{constants.ENDPOINT}/me/small/resolve/main/model.safetensors"
    weights = (folder / "model.safetensors").read_bytes()

    def get(**headers):
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers))

    with get(Authorization=f"Bearer {WRITE}", Range="bytes=10-19") as part:
        assert (part.status, part.read()) == (206, weights[10:20])
        assert part.headers["X-Repo-Commit"] == hub.repos["me/small"].refs["refs/heads/main"]
    for headers, status in [
        ({}, 401),
        ({"Authorization": f"Bearer {OTHER}"}, 404),
        ({"Authorization": f"Bearer {READ}", "Range": f"bytes={len(weights)}-"}, 416),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(**headers)
        assert caught.value.code == status
        caught.value.close()


LOAD = """
import os, sys
import numpy as np, torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification
target, first, *texts = sys.argv[1:]

def model(name, **revisions):
    return AutoModel.from_pretrained(name, trust_remote_code=True, **revisions)

small = model("me/small", code_revision="v1")
assert first in type(small).__module__, type(small).__module__
v1 = model("me/small", revision="v1", code_revision="v1")
assert v1.config._commit_hash == first != small.config._commit_hash, v1.config._commit_hash
found = {"main": small.encode(texts), "v1": v1.encode(texts)}
found["pull"] = model("me/small", revision="refs/pr/1").encode(texts)
for name in ("small", "tiny"):
    sentence = SentenceTransformer(f"me/{name}", trust_remote_code=True, device="cpu")
    found[f"sentence-{name}"] = sentence.encode(texts)
np.savez(target, **found)

kind = AutoModelForSequenceClassification
head = kind.from_pretrained("me/small", num_labels=3, trust_remote_code=True).eval()
with torch.no_grad():
    head.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    expected = head(torch.arange(1, 9)[None]).logits
    head.push_to_hub("me/head", private=True)
    again = kind.from_pretrained("me/head", trust_remote_code=True).eval()
    torch.testing.assert_close(again(torch.arange(1, 9)[None]).logits, expected)
assert expected.std() > 0.1, expected
try:
    model("me/head", token=False)
except OSError as error:
    print("refused:", " ".join(str(error).split())[:200])
"""


def python(arguments: list[str], tmp_path, cwd) -> str:
    """What a fresh process prints that finds the Hub and the token in its environment."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITE,
        "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DEBUG": "1",
    }  # fmt: skip
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    assert WRITE not in process.stdout + process.stderr
    return process.stdout


@pytest.mark.slow
def test_the_command_with_its_check_of_the_folder(hub, folder, tmp_path):
    arguments = ["-m", "hub_repo.push", str(folder), "me/small", "--private", "--tag", "v1"]
    output = python(arguments, tmp_path, REPOSITORY).splitlines()
    repo = hub.repos["me/small"]
    url = f"{constants.ENDPOINT}/me/small/commit/{repo.refs['refs/tags/v1']}"
    assert output[-2].startswith("published ")
    assert output[-2].endswith(f" to me/small, main (a new repository): {url}")
    assert (output[-1], len(repo.history()), repo.private) == ("tag: v1", 2, True)


def test_a_stranger_loads_what_was_published(hub, folder, tmp_path):
    """By name, in a process without the package."""
    first = publish(folder, private=True, tag="v1").oid
    publish(SHIPPED, "me/tiny")
    texts, expected = ["What is ALiBi?", "A longer text. " * 50], {}
    expected["v1"] = JinaBertModel.from_pretrained(folder).encode(texts)
    (folder / "alibi.py").write_text((folder / "alibi.py").read_text() + "\n# changed\n")
    for name, factor in [("main", 1.5), ("pull", 0.5)]:
        scale_weights(folder, factor)
        publish(folder, create_pr=name == "pull")
        expected[name] = JinaBertModel.from_pretrained(folder).encode(texts)
    assert np.abs(expected["main"] - expected["v1"]).max() > 0.1

    target = tmp_path / "vectors.npz"
    output = python(["-c", STRANGER_PROLOGUE + LOAD, str(target), first, *texts], tmp_path, tmp_path)
    assert "refused: me/head is not a local folder" in output
    norm = np.linalg.norm(expected["main"], axis=1, keepdims=True)
    tiny = JinaBertModel.from_pretrained(SHIPPED).encode(texts, normalize_embeddings=True)
    with np.load(target) as found:
        for name, vectors in {**expected, "sentence-small": expected["main"] / norm, "sentence-tiny": tiny}.items():
            np.testing.assert_allclose(found[name], vectors, atol=2e-5, err_msg=name)
    assert hub.repos["me/head"].private
    assert {"modeling_jina_bert.py", "alibi.py"} <= set(hub.repos["me/head"].resolve("main").files)
