"""A folder to publish, and pushing it, for the tests of publishing."""

import shutil
import traceback

import pytest
import torch
from cards import CARD
from conftest import tiny_config
from hub_login import OTHER, READ, WRITE
from safetensors.torch import load_file, save_file

from hub_repo.folders.folder_files import sentence_transformers_files, write_code, write_json, write_tokenizer
from hub_repo.push import PushError, Retries, push
from modeling_jina_bert import JinaBertModel


@pytest.fixture(name="exported", scope="module")
def exported_folder(tmp_path_factory, tokenizer):
    """A random model of width 64 in the form that the export writes."""
    folder = tmp_path_factory.mktemp("exported") / "small"
    folder.mkdir()
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config())
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32  # stored as float16, computed in float32
    model.config.save_pretrained(folder)
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(tokenizer, folder)
    write_code(folder)
    for name, content in sentence_transformers_files(64, 8192).items():
        write_json(folder / name, content)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(name="folder")
def copy_of_it(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "small")


def publish(folder, repo_id="me/small", **options):
    return push(folder, repo_id, verify=False, retries=Retries(2, 0.01), **options)


def refusal(folder, *arguments, **options) -> str:
    """The message of a push that fails; no traceback of it shows a token."""
    with pytest.raises((PushError, ValueError)) as caught:
        publish(folder, *arguments, **options)
    shown = "".join(traceback.format_exception(caught.value))
    assert not any(token in shown for token in (WRITE, READ, OTHER))
    return str(caught.value)


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scale_weights(folder, factor: float):
    weights = {name: tensor * factor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
