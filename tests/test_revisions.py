"""Revisions of a repository, over real HTTP: weights, tokenizer and the commit that is recorded are of one commit.

That a stranger's AutoModel does so too is in test_push.py.
"""

import json
import shutil

import numpy as np
import pytest
from conftest import GOLDEN
from hub_login import logged_in_hub  # noqa: F401  pytest finds the fixture by name
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_cli_info import WEIGHTS, folder, publish  # noqa: F401  pytest finds the fixture by name

from modeling_jina_bert import JinaBertForSequenceClassification, JinaBertModel

TEXTS = ["an eagle", "a text of a few words more"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What an earlier test has fetched would be found here without the Hub; its server would be asked, in vain."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)


def change(folder):  # noqa: F811
    """Half the weights, and a tokenizer that takes every "a" for a "the" and the other way round."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name: 0.5 * tensor for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["the"] = vocabulary["the"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_the_tokenizer_and_the_commit_are_those_of_the_weights(hub, folder, tmp_path):  # noqa: F811
    old = shutil.copytree(folder, tmp_path / "old")
    first = publish(hub, folder)
    hub.repos["me/model"].refs["refs/tags/v1"] = first.oid
    change(folder)
    second = publish(hub, folder)
    expected = {source: JinaBertModel.from_pretrained(source) for source in (old, folder)}
    assert [model.config._commit_hash for model in expected.values()] == [None, None]
    ids = [model.tokenizer(TEXTS)["input_ids"] for model in expected.values()]
    assert ids[0] != ids[1]
    for revision, commit, source in (
        ("v1", first, old), (first.oid, first, old), ("main", second, folder), (None, second, folder),
    ):  # fmt: skip
        model = JinaBertModel.from_pretrained("me/model", revision=revision)
        assert model.config._commit_hash == commit.oid
        assert model.tokenizer(TEXTS) == expected[source].tokenizer(TEXTS)
        np.testing.assert_allclose(model.encode(TEXTS), expected[source].encode(TEXTS), atol=1e-6)
    head = JinaBertForSequenceClassification.from_pretrained("me/model", revision="v1", num_labels=3)
    assert (head.config._commit_hash, head.bert.tokenizer(TEXTS)["input_ids"]) == (first.oid, ids[0])
    assert "_commit_hash" not in head.config.to_dict()


def test_a_push_after_the_load_changes_nothing(hub, folder, tmp_path):  # noqa: F811
    expected = JinaBertModel.from_pretrained(GOLDEN / "A-small4h").encode(TEXTS)
    first = publish(hub, folder)
    model = JinaBertModel.from_pretrained("me/model", cache_dir=tmp_path / "elsewhere")
    change(folder)
    publish(hub, folder)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-6)  # its tokenizer is read only now
    assert model.config._commit_hash == first.oid
