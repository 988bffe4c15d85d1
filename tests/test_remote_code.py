"""What a stranger does: a folder, a fresh process, no package, no network.

Pins: AutoModel, every head and SentenceTransformer with trust_remote_code; save_pretrained after fine-tuning writes a
folder that loads the same way; without trust an error, never random weights.
"""

import json
import re

import numpy as np
import pytest
import torch
from conftest import SHIPPED, run_as_stranger, tiny_config
from test_checkpoints import HEADS

from hub_repo.export import code_files, sentence_transformers_files
from modeling_jina_bert import JinaBertConfig, JinaBertForMultipleChoice, JinaBertModel

CLASSES = [JinaBertModel, *HEADS]
AUTO_CLASSES = {value.split(".")[-1]: name for name, value in JinaBertConfig().auto_map.items()}

LOAD_AND_SAVE = """
import sys, torch, transformers
source, target, *classes = sys.argv[1:]
for name, auto in (item.split("=") for item in classes):
    # Each folder has a name of its own: transformers shares the code of folders of one name.
    model = getattr(transformers, auto).from_pretrained(f"{source}/{name}", trust_remote_code=True).eval()
    ids = torch.arange(1, 15).view(1, 2, 7) if auto == "AutoModelForMultipleChoice" else torch.arange(1, 15).view(2, 7)
    with torch.no_grad():
        torch.save(model(ids)[0], f"{target}/{name}.pt")
        for parameter in model.parameters():
            parameter.add_(0.01)  # "fine-tuning"
    model.save_pretrained(f"{target}/{name}")
"""


def initial(cls):
    torch.manual_seed(0)
    return cls(tiny_config(vocab_size=100)).eval()


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    """Every class as saved by us, in 0; a stranger loads and saves these in 1, another stranger those in 2."""
    root = tmp_path_factory.mktemp("generations")
    for cls in CLASSES:
        initial(cls).save_pretrained(root / "0" / cls.__name__)
    classes = [f"{cls.__name__}={AUTO_CLASSES[cls.__name__]}" for cls in CLASSES]
    for source, target in (("0", "1"), ("1", "2")):
        (root / target).mkdir()
        process = run_as_stranger(LOAD_AND_SAVE, root / source, root / target, *classes, cwd=root / target)
        assert process.returncode == 0, process.stderr
    return root


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_load_fine_tune_save_reload(generations, cls):
    model = initial(cls)
    ids = torch.arange(1, 15).view(2, 7)
    for generation in ("1", "2"):
        with torch.no_grad():
            expected = model(ids[None] if cls is JinaBertForMultipleChoice else ids)[0]
            for parameter in model.parameters():
                parameter.add_(0.01)
        found = torch.load(generations / generation / f"{cls.__name__}.pt")
        torch.testing.assert_close(found, expected, msg=f"generation {generation}")


USE = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
folder, target, *texts = sys.argv[1:]
try:
    AutoModel.from_pretrained(folder)
except ValueError as error:
    print("without trust:", error)
auto = AutoModel.from_pretrained(folder, trust_remote_code=True)
sentence = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
assert sentence.max_seq_length == 8192, sentence.max_seq_length
assert AutoTokenizer.from_pretrained(folder).model_max_length == 8192
np.savez(target, auto=auto.encode(texts, normalize_embeddings=True), sentence=sentence.encode(texts))
sentence.save_pretrained(target + "-saved")
again = SentenceTransformer(target + "-saved", trust_remote_code=True, device="cpu")
assert np.abs(again.encode(texts) - sentence.encode(texts)).max() < 1e-6
"""


def test_the_shipped_folder_right_after_a_clone(tmp_path):
    texts = ["What is ALiBi?", "", "A text of nine hundred words. " * 150]
    process = run_as_stranger(USE, SHIPPED, tmp_path / "vectors.npz", *texts, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert re.search("without trust: .*trust_remote_code=True", process.stdout, re.DOTALL)
    with np.load(tmp_path / "vectors.npz") as found:
        expected = JinaBertModel.from_pretrained(SHIPPED).encode(texts, normalize_embeddings=True)
        np.testing.assert_allclose(found["auto"], expected, atol=2e-6)
        np.testing.assert_allclose(found["sentence"], expected, atol=2e-6)


def test_the_published_code_is_the_package():
    names = {path.name for path in code_files()}
    assert {path.name for path in SHIPPED.glob("*.py")} == names
    for path in code_files():
        assert (SHIPPED / path.name).read_bytes() == path.read_bytes(), f"run python -m hub_repo.export: {path.name}"


def test_the_shipped_folder_is_complete():
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["model_type"] == "jina_bert"
    assert config["auto_map"] == JinaBertConfig().auto_map
    for name, content in sentence_transformers_files(config["hidden_size"], 8192).items():
        assert json.loads((SHIPPED / name).read_text()) == content, name
    for name in ("README.md", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        assert (SHIPPED / name).stat().st_size > 0, name
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 30e6
