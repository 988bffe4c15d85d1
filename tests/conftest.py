"""Shared: golden models and outputs, the tokenizer of the shipped model, tiny random models, a stranger's process.

Law: a test gives the same whichever tests ran before it and whatever other process of pytest runs beside it. Each test
draws the same random numbers; each process has caches of its own, and the user's stay as they are.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Before the imports, which read them. A worker of pytest-xdist has one thread: threads of several processes for the
# same cores wait for each other at every barrier.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="jina-bert-tests-")
os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["HF_HOME"], "modules")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The local Hub answers in the time that a loaded machine needs.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "120")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "120")
os.environ.update({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, set_seed

from modeling_jina_bert import JinaBertConfig, cpu_attention

# OpenVINO's telemetry forks processes that call home and may hang without a network; without it there is a stub.
sys.modules.setdefault("openvino_telemetry", None)

REPOSITORY = Path(__file__).parent.parent
SHIPPED = REPOSITORY / "hub_repo" / "tiny"
GOLDEN = Path(__file__).parent / "golden"
CACHES = Path(os.environ["HF_HOME"])


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    set_seed(0)  # for its fixtures


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    set_seed(0)  # again: a fixture that an earlier test has made draws nothing


def pytest_unconfigure(config):
    shutil.rmtree(CACHES, ignore_errors=True)


@dataclass
class Golden:
    """A golden model: its folder (official form), the inputs and outputs, and the sentences of `encode`."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    meta: dict

    def inputs(self, name: str) -> dict[str, torch.Tensor]:
        return {key: self.tensors[f"{name}.{key}"] for key in ("input_ids", "attention_mask", "token_type_ids")}


@pytest.fixture(params=["A-small4h", "B-8h"], scope="session")
def golden(request) -> Golden:
    folder = GOLDEN / request.param
    meta = json.loads((folder / "meta.json").read_text())
    return Golden(folder, load_file(folder / "golden.safetensors"), meta)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def tiny_config(**changes) -> JinaBertConfig:
    """A 2-layer model; the wide initialisation makes attention depend on ALiBi (0.02 would hide its absence)."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return JinaBertConfig(**{**shape, "initializer_range": 0.2, "hidden_dropout_prob": 0.0, **changes})


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the storage of the largest tensor that any operation returns, in bytes; operators are looked into."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function.namespace).startswith("jina_bert_"):
            with self:
                result = OPERATORS[function](*args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


OPERATORS = {
    operator._opoverload: operator._init_fn for operator in (cpu_attention.alibi_attention, cpu_attention._backward)
}


STRANGER_PROLOGUE = """
import sys
class _NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_jina_bert" or name.startswith("modeling_jina_bert."):
            raise ModuleNotFoundError(f"No module named {name!r}: a stranger has not installed it", name=name)
sys.meta_path.insert(0, _NotInstalled())
"""


def run_as_stranger(program: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a program in a fresh process, offline, in which our package cannot be imported."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cwd / "hf_modules")}
    return subprocess.run(
        [sys.executable, "-c", STRANGER_PROLOGUE + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
