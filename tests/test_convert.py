"""Official form <-> ours: what was equal to the official code stays equal, and nothing disappears unnamed.

Pins: both golden layouts, there and back; prefix, heads, shards, .bin, casts; the report; every refusal, with nothing
left behind; that a stranger loads the result is in test_verify.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_repo.convert import convert, main
from hub_repo.folders.checkpoint_files import FolderError
from modeling_jina_bert import JinaBertForMaskedLM, JinaBertForSequenceClassification, JinaBertModel
from modeling_jina_bert.configuration_jina_bert import AUTO_MAP

SEMANTIC = (
    "_name_or_path", "model_type", "auto_map", "architectures", "hidden_act", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "intermediate_size", "feed_forward_type", "position_embedding_type", "vocab_size",
    "type_vocab_size", "layer_norm_eps", "max_position_embeddings", "model_max_length", "emb_pooler", "pad_token_id",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "torch_dtype", "use_cache",
)  # fmt: skip
"""Fields of config.json that the official code reads."""


def rewrite(folder, change):
    """Applies a function to the dictionary of weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def source(golden, tmp_path):
    """A copy of a golden folder: official form, prefix `bert.`, MLM head."""
    return shutil.copytree(golden.folder, tmp_path / "source", ignore=shutil.ignore_patterns("golden*", "plain"))


@torch.no_grad()
def test_there_and_back(golden, source, tmp_path):
    report = convert(source, tmp_path / "ours")
    assert report.layout == golden.folder.name[0]
    assert report.largest_difference == 0
    model = JinaBertModel.from_pretrained(tmp_path / "ours")
    valid = golden.inputs("leftpad")["attention_mask"].bool()
    states = model(**golden.inputs("leftpad")).last_hidden_state.double()[valid]
    assert (states - golden.tensors["f64.leftpad.last_hidden_state"][valid]).abs().max() < 3e-5
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == "jina_bert"
    assert config["auto_map"] == AUTO_MAP
    for name in ("modeling_jina_bert.py", "modules.json", "1_Pooling/config.json", "tokenizer.json", "vocab.txt"):
        assert (tmp_path / "ours" / name).stat().st_size > 0

    back = convert(tmp_path / "ours", tmp_path / "official", target="official")
    assert [change for change in back.tensors if not change.is_plain] == []
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "official" / "model.safetensors")
    encoder = {name.removeprefix("bert."): x for name, x in before.items() if name.startswith("bert.")}
    assert encoder.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in encoder.items())
    original = json.loads((source / "config.json").read_text()) | {"architectures": ["JinaBertModel"]}
    returned = json.loads((tmp_path / "official" / "config.json").read_text())
    assert {name: returned.get(name) for name in SEMANTIC} == {name: original[name] for name in SEMANTIC}
    assert not list((tmp_path / "official").glob("*.py"))


def test_the_report_accounts_for_every_tensor(source, tmp_path):
    report = convert(source, tmp_path / "ours", dtype="float16")
    stored = load_file(source / "model.safetensors")
    assert {change.source for change in report.tensors} == set(stored)
    dropped = {change.source for change in report.tensors if change.target is None}
    assert dropped == {name for name in stored if name.startswith("cls.")}
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert {change.target for change in report.tensors} - {None} == set(written)
    for name, tensor in written.items():
        assert torch.equal(tensor, stored[f"bert.{name}"].half()), name
    assert 0 < report.largest_difference < 5e-3
    text = "\n".join(report.lines())
    assert "renamed bert.embeddings.LayerNorm.bias to embeddings.LayerNorm.bias, cast from F32 to F16" in text
    assert "dropped cls.predictions.bias: part of the head 'cls'" in text
    assert "config.json: model_type 'bert' is now 'jina_bert'" in text
    assert "sentence-transformers files were missing" in text


@torch.no_grad()
def test_a_kept_head_is_equal(golden, source, tmp_path):
    convert(source, tmp_path / "ours", keep_head=True)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == ["JinaBertForMaskedLM"]
    logits = JinaBertForMaskedLM.from_pretrained(tmp_path / "ours")(**golden.inputs("batch")).logits
    at_labels = logits[golden.tensors["batch.labels"] != -100].double()
    assert (at_labels - golden.tensors["f64.batch.mlm_logits_at_labels"]).abs().max() < 5e-5


@pytest.mark.parametrize("storage", ["bin", "shards"])
def test_other_storage(golden, source, tmp_path, storage):
    weights = load_file(golden.folder / "plain" / "model.safetensors")  # no prefix, with a pooler
    (source / "model.safetensors").unlink()
    if storage == "bin":
        torch.save(weights, source / "pytorch_model.bin")
    else:
        names = sorted(weights)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, members in shards.items():
            save_file({name: weights[name] for name in members}, source / file)
        index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    report = convert(source, tmp_path / "ours")
    assert all(change.is_plain for change in report.tensors)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in weights.items())


def test_pooling_length_and_prompts_are_carried_over(source, tmp_path):
    convert(source, tmp_path / "first")
    modules = json.loads((tmp_path / "first" / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    for name in ("modules.json", "1_Pooling", "sentence_bert_config.json", "config_sentence_transformers.json"):
        path = tmp_path / "first" / name
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, source / name)
    (source / "modules.json").write_text(json.dumps(modules[:2]))
    rewrite_json(source / "sentence_bert_config.json", max_seq_length=777)
    settings = {"prompts": {"query": "q: "}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    settings["truncate_dim"] = 16
    rewrite_json(source / "config_sentence_transformers.json", **settings)
    convert(source, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "modules.json").read_text()) == modules[:2]
    assert json.loads((tmp_path / "second" / "sentence_bert_config.json").read_text())["max_seq_length"] == 777
    assert json.loads((tmp_path / "second" / "config_sentence_transformers.json").read_text()) == settings
    (source / "sentence_bert_config.json").unlink()  # releases from 6 on have it in the tokenizer alone
    for length, written in ((99, 99), (10**30, 8192)):
        rewrite_json(source / "tokenizer_config.json", model_max_length=length)
        convert(source, tmp_path / str(written))
        assert (
            json.loads((tmp_path / str(written) / "sentence_bert_config.json").read_text())["max_seq_length"]
            == written
        )
    rewrite_json(source / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    with pytest.raises(FolderError, match="not the mean"):
        convert(source, tmp_path / "third")


def test_a_classifier_keeps_its_class(tmp_path, golden):
    model = JinaBertForSequenceClassification.from_pretrained(golden.folder / "plain", num_labels=3)
    model.save_pretrained(tmp_path / "source")
    shutil.copyfile(golden.folder / "tokenizer.json", tmp_path / "source" / "tokenizer.json")
    convert(tmp_path / "source", tmp_path / "official", target="official", keep_head=True)
    again = JinaBertForSequenceClassification.from_pretrained(tmp_path / "official")
    assert type(again).__name__ in json.loads((tmp_path / "official" / "config.json").read_text())["architectures"]
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    report = convert(tmp_path / "source", tmp_path / "embeddings")
    assert {x.source for x in report.tensors if x.target is None} == {"classifier.weight", "classifier.bias"}


KEY = "bert.encoder.layer.1.attention.self.key.weight"
REFUSALS = {
    "missing tensor": (lambda w: w.pop(KEY), "lacks 1 tensors: encoder.layer.1.attention.self.key.weight"),
    "other shape": (
        lambda w: w.update({KEY: w[KEY][:32].clone()}),
        r"is \(32, 64\), the configuration says \(64, 64\)",
    ),
    "not finite": (lambda w: w[KEY].fill_(float("nan")), f"{KEY} is not finite"),
    "unknown tensors": (
        lambda w: w.update({"bert.encoder.layer.0.attention.self.layer_norm_x.weight": torch.ones(64)}),
        "no JinaBERT of its layout has: bert.encoder.layer.0.attention.self.layer_norm_x.weight",
    ),
    "unknown layout": (
        lambda w: [w.pop(name) for name in list(w) if "gated_layer" in name],
        "neither JinaBERT layout",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_tensors_are_named_and_nothing_is_written(source, tmp_path, case):
    change, message = REFUSALS[case]
    rewrite(source, change)
    with pytest.raises(FolderError, match=message):
        convert(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_third_layout_is_refused(golden, source, tmp_path):
    """q and k normalised in layout A, which base-es is suspected of: leaving them out would be wrong vectors."""
    names = [f"bert.encoder.layer.0.attention.self.layer_norm_{x}.{y}" for x in "qk" for y in ("weight", "bias")]
    rewrite(source, lambda weights: weights.update({name: torch.ones(64) for name in names}))
    if golden.folder.name.startswith("B"):
        return  # there they belong
    with pytest.raises(FolderError, match="has 4 tensors that no JinaBERT of its layout has"):
        convert(source, tmp_path / "ours")


def test_an_overflow_in_the_cast_is_refused(source, tmp_path):
    rewrite(source, lambda weights: weights[KEY].mul_(1e6))
    with pytest.raises(FolderError, match=f"{KEY} overflows as F16"):
        convert(source, tmp_path / "ours", dtype="float16")


def test_an_output_that_computes_something_else_is_refused(source, tmp_path, monkeypatch):
    def corrupted(tensors, path, metadata):
        name = "encoder.layer.0.attention.self.value.weight"
        save_file({**tensors, name: tensors[name] * 1.01}, path, metadata=metadata)

    monkeypatch.setattr("hub_repo.convert.save_file", corrupted)
    with pytest.raises(RuntimeError, match="would not compute what"):
        convert(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: rewrite_json(folder / "config.json", position_embedding_type="absolute"), "not a JinaBERT"),
        (lambda folder: rewrite_json(folder / "config.json", num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "not a whole safetensors file"),
        (lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "vocab.txt")], "has no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
    ],
)
def test_bad_folders_are_one_line(source, tmp_path, capsys, prepare, message):
    prepare(source)
    assert main(["--source", str(source), "--output", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ours").exists()


def test_bad_arguments(source, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for arguments, message in (
        ([str(source), tmp_path / "full"], "is not empty"),
        ([tmp_path / "nowhere", tmp_path / "ours"], "neither a folder nor the name of a Hub repository"),
        (["nobody/nothing-here", tmp_path / "ours"], "the Hub cannot be asked: HF_HUB_OFFLINE is set"),
    ):
        assert main(["--source", str(arguments[0]), "--output", str(arguments[1])]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "file").read_text() == "mine"
    with pytest.raises(FolderError, match="dtype='int8' is not one of"):
        convert(source, tmp_path / "ours", dtype="int8")
