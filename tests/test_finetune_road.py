"""A user's road: a CSV of pairs, a folder of the official form, and at the end a repository that a stranger loads.

Law: what is loaded by name, with AutoModel and SentenceTransformer, is the fine-tuned model, whole or LoRA merged.
"""

import sys

import numpy as np
import pytest
from conftest import GOLDEN, STRANGER_PROLOGUE
from hub_login import logged_in_hub  # noqa: F401  pytest finds the fixture by name
from sentence_transformers import SentenceTransformer
from test_contrastive_training import finetune_command, table  # noqa: F401  pytest finds the fixture by name
from test_push import python

from hub_repo import export, push, verify
from modeling_jina_bert import JinaBertModel
from training import finetune

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own calls
TEXTS = ["How do I reset the device?", "", "Hold both buttons for ten seconds. " * 2]
LOAD = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
target, name, *texts = sys.argv[1:]
auto = AutoModel.from_pretrained(name, trust_remote_code=True)
sentence = SentenceTransformer(name, trust_remote_code=True, device="cpu")
np.savez(target, auto=auto.encode(texts, normalize_embeddings=True), sentence=sentence.encode(texts))
"""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [[], ["lora.r=4"]], ids=["whole", "lora"])
def test_from_a_csv_to_a_repository(hub, table, tmp_path, monkeypatch, capfd, changes):  # noqa: F811
    command = finetune_command(table, tmp_path / "run", "license=mit", "training.num_train_epochs=1", *changes)
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("hub_repo.push._verify", lambda *arguments: None)  # seconds, twice; `verify` itself is called
    finetune.main()
    final, folder = tmp_path / "run" / "final", tmp_path / "mine"
    assert (tmp_path / "run" / "adapter").is_dir() == bool(changes)
    for step, arguments in (
        (export, ["--model", final, "--output", folder, "--card", final / "README.md"]),
        (verify, [folder]),
        (push, [folder, "me/mine", "--dry-run"]),
        (push, [folder, "me/mine"]),
    ):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        assert not step.main()
    assert "dry run: nothing was sent" in capfd.readouterr().out
    assert len(hub.repos["me/mine"].history()) == 2  # the first, empty, and ours

    python(["-c", STRANGER_PROLOGUE + LOAD, str(tmp_path / "vectors.npz"), "me/mine", *TEXTS], tmp_path, tmp_path)
    exported = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu").encode(TEXTS)
    model = SentenceTransformer(str(final), trust_remote_code=True, device="cpu")
    model.max_seq_length = 8192  # trained with 48, published with 8192
    trained = model.encode(TEXTS)
    with np.load(tmp_path / "vectors.npz") as found:
        for name in ("auto", "sentence"):
            np.testing.assert_allclose(found[name], exported, atol=2e-6, err_msg=name)
    assert (exported * trained).sum(axis=1).min() > 0.9999  # stored as float16
    start = JinaBertModel.from_pretrained(GOLDEN / "A-small4h").encode(TEXTS, normalize_embeddings=True)
    assert (trained * start).sum(axis=1).max() < 0.999  # fine-tuning made a difference that rounding cannot
