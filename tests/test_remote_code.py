"""What a stranger does: a folder, a fresh process, no package, no network.

Pins: AutoModel, every head and SentenceTransformer with trust_remote_code; save_pretrained after fine-tuning writes a
folder that loads the same way; without trust an error, never random weights.
"""

import json

import numpy as np
import pytest
import torch
from conftest import SHIPPED, run_as_stranger, tiny_config
from test_checkpoints import HEADS

from hub_repo.export import code_files, sentence_transformers_files
from modeling_jina_bert import JinaBertConfig, JinaBertModel

LOAD_AND_SAVE = """
import sys, torch, transformers
source, target, auto, vectors = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(source, trust_remote_code=True).eval()
ids = torch.arange(1, 15).view(1, 2, 7) if auto == "AutoModelForMultipleChoice" else torch.arange(1, 15).view(2, 7)
with torch.no_grad():
    torch.save(model(ids)[0], vectors)
    for parameter in model.parameters():
        parameter.add_(0.01)  # "fine-tuning"
model.save_pretrained(target)
"""


@pytest.mark.parametrize("cls", [JinaBertModel, *HEADS], ids=lambda cls: cls.__name__)
def test_load_fine_tune_save_reload(tmp_path, cls):
    auto = next(auto for auto, name in JinaBertConfig().auto_map.items() if name.endswith(f".{cls.__name__}"))
    torch.manual_seed(0)
    model = cls(tiny_config(vocab_size=100)).eval()
    model.save_pretrained(tmp_path / "first")
    for generation, (source, target) in enumerate([("first", "second"), ("second", "third")]):
        process = run_as_stranger(
            LOAD_AND_SAVE, tmp_path / source, tmp_path / target, auto, tmp_path / "out.pt", cwd=tmp_path
        )
        assert process.returncode == 0, process.stderr
        ids = torch.arange(1, 15).view(2, 7)
        with torch.no_grad():
            expected = model(ids[None] if auto.endswith("MultipleChoice") else ids)[0]
            for parameter in model.parameters():
                parameter.add_(0.01)
        torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, msg=f"generation {generation}")


WITHOUT_TRUST = """
import sys, transformers
transformers.AutoModel.from_pretrained(sys.argv[1])
"""


def test_without_trust_it_is_loud():
    process = run_as_stranger(WITHOUT_TRUST, SHIPPED, cwd=SHIPPED.parent)
    assert process.returncode != 0
    assert "trust_remote_code" in process.stderr


USE = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
folder, target, *texts = sys.argv[1:]
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
