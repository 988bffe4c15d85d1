"""What `export` takes: damaged and missing checkpoints are one line, and nothing is written.

Pins: the damages that `verify` finds in weights, configuration and tokenizer; that the check of the folder reads a
long text and fails for disturbed weights; that every other engine is compared at a long input, too.
"""

import json

import numpy as np
import pytest
from conftest import GOLDEN
from sentence_transformers import SentenceTransformer
from test_verify import DAMAGES, folder, rewrite, rewrite_json, whole  # noqa: F401  pytest finds the fixtures by name

from hub_repo import export as export_module
from hub_repo.export import main
from hub_repo.folders.loading import CHECK_TEXTS
from hub_repo.formats import gguf_export, parity, tei
from hub_repo.formats.parity import disturbed
from modeling_jina_bert import JinaBertModel

WEIGHTS, WORDS = "model.safetensors", "embeddings.word_embeddings.weight"
FOUND_BY_VERIFY = ("truncated", "no weights", "nan", "shape", "dtype", "lacking", "unknown", "no words", "tokenizer",
                   "shard outside", "shard missing", "config")  # fmt: skip


def as_index(f, content):
    (f / WEIGHTS).rename(f / "part.safetensors")
    (f / f"{WEIGHTS}.index.json").write_text(json.dumps(content))


def lacks_tokenizer(f):
    for name in ("tokenizer.json", "vocab.txt"):
        (f / name).unlink()


def fewer_rows(f):
    rewrite(f, lambda weights: weights.update({WORDS: weights[WORDS][:900].clone()}))
    rewrite_json(f / "config.json", vocab_size=900)


CASES = {
    **{case: DAMAGES[case] for case in FOUND_BY_VERIFY},
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is not a whole safetensors file"),
    "garbage": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 5000), f"{WEIGHTS} is not a whole safetensors file"),
    "list for an index": (lambda f: as_index(f, []), "index.json lacks weight_map or metadata"),
    "list for a configuration": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "text for a number": (lambda f: rewrite_json(f / "config.json", hidden_size="x"), "expected int, got str"),
    "layers": (lambda f: rewrite_json(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "more tokens than rows": (fewer_rows, "has token 999, the embedding 900 rows"),
    "no vocabulary": (lacks_tokenizer, "has no tokenizer: neither tokenizer.json nor vocab.txt"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_line_and_nothing_is_written(folder, tmp_path, capsys, case):  # noqa: F811
    damage, message = CASES[case]
    damage(folder)
    assert main(["--model", str(folder), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert str(folder) in said
    assert message.replace("tokenizer.json: ", "tokenizer.json ") in said
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_no_such_checkpoint_is_one_line(tmp_path, capsys):
    for name, message in (
        ("nowhere", "is neither a folder nor the name of a Hub repository"),
        ("nobody/nothing", "the Hub cannot be asked: HF_HUB_OFFLINE is set"),
    ):
        assert main(["--model", name, "--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {name} ")
        assert message in said
        assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_check_of_the_folder_has_a_long_text_and_a_control(tmp_path, monkeypatch):
    source = JinaBertModel.from_pretrained(GOLDEN / "A-small4h").eval()
    assert max(map(len, source.tokenizer(list(CHECK_TEXTS))["input_ids"])) > max(parity.LENGTHS)
    right, wrong = (model.encode(list(CHECK_TEXTS)) for model in (source, disturbed(source)))

    def verify(vectors):
        monkeypatch.setattr(export_module, "load_in_fresh_process", lambda _: {"AutoModel": vectors})
        export_module._verify(source, tmp_path, tmp_path, "float16")

    verify(right)
    for place in (0, 2):  # the short text and the long one
        with pytest.raises(RuntimeError, match="other vectors than the checkpoint's"):
            verify(np.where(np.arange(len(right))[:, None] == place, wrong, right))
    monkeypatch.setattr(export_module, "_SMALLEST_COSINE", {"float16": -1.0})
    with pytest.raises(RuntimeError, match="cannot tell the checkpoint from disturbed weights"):
        verify(right)


def test_every_format_is_compared_at_a_long_input(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    source = JinaBertModel.from_pretrained(GOLDEN / "A-small4h").eval()
    lengths = []

    def recorded(model, batch):
        lengths.append(batch["input_ids"].shape[1])
        return parity.torch_embeddings(model, batch)

    monkeypatch.setattr(gguf_export, "torch_embeddings", recorded)
    monkeypatch.setattr(tei, "torch_embeddings", recorded)
    gguf_export.write_gguf(source, GOLDEN / "A-small4h", tmp_path / "model.gguf")
    gguf_export.check_gguf(tmp_path / "model.gguf", source, "f16")
    tei.write_tei(source, GOLDEN / "A-small4h", tmp_path)
    tei.check_tei(tmp_path, source, "float16")
    assert lengths == [129, 7, 129, 2049] * 2


def test_what_a_source_says_of_its_vectors_is_kept_or_refused(folder, tmp_path, capsys):  # noqa: F811
    settings = {"prompts": {"query": "q: "}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    rewrite_json(folder / "config_sentence_transformers.json", **settings)
    rewrite_json(folder / "sentence_bert_config.json", max_seq_length=16)  # as a training leaves it
    assert main(["--model", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text()) == settings
    model = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True)
    assert (model.max_seq_length, model.default_prompt_name, model.similarity_fn_name) == (8192, "query", "dot")
    rewrite_json(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    assert main(["--model", str(folder), "--output", str(tmp_path / "other")]) == 2
    assert "pooling is not the mean" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
