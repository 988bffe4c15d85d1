"""Loading: official forms just work, gaps are errors that name the tensor, nothing is silently random."""

import json
import logging
import pickle
import shutil

import pytest
import torch
from conftest import SHIPPED, tiny_config
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from modeling_jina_bert import (
    JinaBertConfig,
    JinaBertForMaskedLM,
    JinaBertForMultipleChoice,
    JinaBertForQuestionAnswering,
    JinaBertForSequenceClassification,
    JinaBertForTokenClassification,
    JinaBertModel,
    JinaBertPreTrainedModel,
)
from modeling_jina_bert.checkpoints import is_qk_post_norm
from modeling_jina_bert.configuration_jina_bert import AUTO_MAP

HEADS = [
    JinaBertForMaskedLM,
    JinaBertForSequenceClassification,
    JinaBertForTokenClassification,
    JinaBertForQuestionAnswering,
    JinaBertForMultipleChoice,
]


def states(model, golden) -> torch.Tensor:
    encoder = getattr(model, "bert", model)
    with torch.no_grad():
        return encoder(**golden.inputs("leftpad")).last_hidden_state.double()


@pytest.mark.parametrize("storage", ["safetensors", "bin", "sharded safetensors", "fp16"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_official_forms(golden, tmp_path, storage, prefixed):
    source = golden.folder if prefixed else golden.folder / "plain"
    shutil.copy(source / "config.json", tmp_path)
    weights = load_file(source / "model.safetensors")
    if storage == "fp16":
        weights = {name: tensor.half() for name, tensor in weights.items()}
    if storage == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    elif storage.startswith("sharded"):
        names = sorted(weights)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for shard, members in shards.items():
            save_file({name: weights[name] for name in members}, tmp_path / shard, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = golden.tensors["f64.leftpad.last_hidden_state"]
    for cls in (JinaBertModel, JinaBertForMaskedLM if prefixed else JinaBertForTokenClassification):
        model = cls.from_pretrained(tmp_path)
        assert model.dtype == torch.float32  # config.json says so, also for fp16 files
        assert (states(model, golden) - expected).abs().max() < (0.05 if storage == "fp16" else 3e-5)


def test_the_layout_is_read_from_the_tensors(golden, tmp_path):
    shutil.copytree(golden.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"], config["_name_or_path"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = JinaBertModel.from_pretrained(tmp_path)
    assert model.config.qk_post_norm == golden.folder.name.startswith("B")
    assert (states(model, golden) - golden.tensors["f64.leftpad.last_hidden_state"]).abs().max() < 3e-5


@pytest.mark.parametrize("cls", HEADS)
def test_every_head_loads_saves_and_loads_again(golden, tmp_path, cls):
    model = cls.from_pretrained(golden.folder)
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "jina_bert"
    assert saved["auto_map"] == AUTO_MAP
    again = cls.from_pretrained(tmp_path)
    for (name, first), second in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("cls", [JinaBertModel, *HEADS])
def test_outputs_as_a_tuple_and_all_hidden_states(cls):
    model = cls(tiny_config(vocab_size=100)).eval()
    ids = torch.arange(1, 15).view(1, 2, 7) if cls is JinaBertForMultipleChoice else torch.arange(1, 15).view(2, 7)
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    assert [a.shape for a in outputs.attentions] == [(2, 4, 7, 7)] * 2
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.allclose(as_tuple[0], outputs[0], atol=1e-4)  # eager against SDPA


def test_masked_lm_stays_tied(golden, tmp_path):
    model = JinaBertForMaskedLM.from_pretrained(golden.folder)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    model.save_pretrained(tmp_path)
    assert not any("decoder" in name for name in load_file(tmp_path / "model.safetensors"))


def test_a_missing_pooler_is_left_out_not_random(golden):
    model = JinaBertModel.from_pretrained(golden.folder)
    assert model.pooler is None
    assert model(**golden.inputs("leftpad")).pooler_output is None
    assert JinaBertModel.from_pretrained(golden.folder / "plain").pooler is not None


@pytest.mark.parametrize(
    "tensor",
    ["bert.embeddings.LayerNorm.weight", "bert.encoder.layer.1.attention.self.key.bias", "cls.predictions.bias"],
)
def test_a_missing_tensor_is_named(golden, tmp_path, tensor):
    shutil.copytree(golden.folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[tensor]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=tensor):
        JinaBertForMaskedLM.from_pretrained(tmp_path)


def test_modules_of_a_users_own_class_are_new(golden, tmp_path):
    class Regressor(JinaBertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = JinaBertModel(config, add_pooling_layer=False)
            self.regressor = torch.nn.Linear(config.hidden_size, 1)
            self.post_init()

    model = Regressor.from_pretrained(golden.folder)
    expected = JinaBertModel.from_pretrained(golden.folder).state_dict()
    found = model.bert.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(Regressor.from_pretrained(tmp_path).regressor.weight, model.regressor.weight)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["regressor.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the model: regressor\.bias"):
        Regressor.from_pretrained(tmp_path)


def test_an_adapter_brings_no_pooler_that_its_base_has_not(golden, tmp_path):
    """A pooler would have random weights."""
    plain = JinaBertModel.from_pretrained(golden.folder)
    plain.pooler = None
    plain.save_pretrained(tmp_path / "base")
    model = JinaBertModel.from_pretrained(tmp_path / "base")
    assert model.pooler is None
    model.add_adapter(LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**adapter, "base_model_name_or_path": str(tmp_path / "base")})
    )
    assert JinaBertModel.from_pretrained(tmp_path / "adapter").pooler is None


def test_the_layout_of_quantised_tensors():
    name = "encoder.layer.0.mlp.{}._weight_qdata"
    assert is_qk_post_norm({name.format("up_gated_layer")})
    assert not is_qk_post_norm({name.format("gated_layers")})


def test_attentions_that_the_configuration_asks_for(golden):
    model = JinaBertModel.from_pretrained(golden.folder, output_attentions=True)
    found = model(torch.randint(5, 100, (2, 9))).attentions
    assert len(found) == model.config.num_hidden_layers
    assert torch.allclose(found[0].sum(-1), torch.ones(()), atol=1e-5)


def test_a_tensor_of_another_shape_is_named(golden, tmp_path):
    shutil.copytree(golden.folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.key.weight"
    weights[name] = weights[name][:32].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{name.removeprefix('bert.')} is \(32, 64\), the configuration says \(64, 64\)"
    ):
        JinaBertModel.from_pretrained(tmp_path)


KEY = "encoder.layer.1.attention.self.key.weight"


@pytest.fixture
def plain(golden, tmp_path):
    """A copy of a golden model without a prefix, to damage."""
    return shutil.copytree(golden.folder / "plain", tmp_path / "model")


def rewrite(folder, **tensors):
    weights = load_file(folder / "model.safetensors") | tensors
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_numbers_that_are_not_finite_are_refused(plain):
    key = load_file(plain / "model.safetensors")[KEY]
    rewrite(plain, **{KEY: key * 1e6})
    JinaBertModel.from_pretrained(plain)
    with pytest.raises(ValueError, match=rf"{KEY} has values that are not finite in torch\.float16"):
        JinaBertModel.from_pretrained(plain, dtype=torch.float16)
    for value in ("nan", "inf", "-inf"):
        key[3, 5] = float(value)
        rewrite(plain, **{KEY: key})
        with pytest.raises(ValueError, match=f"{plain}: {KEY} has values that are not finite"):
            JinaBertModel.from_pretrained(plain)


def test_large_numbers_are_finite(plain):
    rewrite(plain, **{KEY: torch.full((64, 64), 1e38)})  # their sum is not
    assert dict(JinaBertModel.from_pretrained(plain).named_parameters())[KEY].eq(1e38).all()


def test_integers_are_no_weights(plain):
    rewrite(plain, **{"embeddings.position_ids": torch.arange(512)})  # a buffer of some releases
    JinaBertModel.from_pretrained(plain)
    rewrite(plain, **{KEY: torch.ones(64, 64, dtype=torch.int8)})
    with pytest.raises(ValueError, match=f"{KEY} is stored as I8, not one of F64, F32, F16, BF16"):
        JinaBertModel.from_pretrained(plain)


def test_a_layout_that_is_neither_is_refused(plain):
    """As of a code repository that we do not know: the layers of one layout, and something between them."""
    rewrite(plain, **{"encoder.layer.0.attention.self.layer_norm_x.weight": torch.ones(4)})
    with pytest.raises(ValueError, match=r"1 tensors in its layers .*layer_norm_x"):
        JinaBertModel.from_pretrained(plain)


def test_buffers_of_published_files_are_left_out(plain):
    rewrite(plain, **{"encoder.alibi": torch.ones(1, 4, 8, 8), "embeddings.position_ids": torch.arange(8.0)[None]})
    names = JinaBertModel.from_pretrained(plain).state_dict().keys()
    assert names == load_file(plain / "model.safetensors").keys() - {"encoder.alibi", "embeddings.position_ids"}


@pytest.mark.parametrize("value", ["torch", None])
def test_the_attention_field_of_the_published_code(plain, value):
    """Its configuration has one of that name and writes it into config.json."""
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "attn_implementation": value}))
    assert JinaBertModel.from_pretrained(plain).config._attn_implementation == "sdpa"


def test_the_tokenizer_comes_from_where_the_weights_did():
    """A folder inside a repository; an access token gets into no pickle."""
    model = JinaBertModel.from_pretrained(SHIPPED.parent, subfolder=SHIPPED.name, token="hf_secret")
    assert model.encode("a word").shape == (256,)
    again = pickle.dumps(JinaBertModel.from_pretrained(SHIPPED.parent, subfolder=SHIPPED.name, token="hf_secret"))
    assert b"hf_secret" not in again
    assert pickle.loads(again).encode("a word").shape == (256,)


@pytest.mark.parametrize("layers", [1, 10**9])
def test_another_number_of_layers_is_refused(plain, layers):
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with pytest.raises(ValueError, match=rf"{plain} holds \d layers, the .* says num_hidden_layers={layers}\."):
        JinaBertModel.from_pretrained(plain)


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
def test_shards_are_files_of_the_folder(plain, storage):
    weights = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    save = torch.save if storage == "bin" else save_file
    save(weights, plain.parent / f"outside.{storage}")
    index = plain / ("pytorch_model.bin.index.json" if storage == "bin" else "model.safetensors.index.json")
    for name, message in (
        (f"../outside.{storage}", f"{index} names '../outside.{storage}', which is not a file name in this folder"),
        (str(plain.parent / f"outside.{storage}"), "which is not a file name in this folder"),
        (f"other.{storage}", f"{index} names 'other.{storage}', which is missing"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
        with pytest.raises(ValueError, match=message):
            JinaBertModel.from_pretrained(plain)
    content = (plain.parent / f"outside.{storage}").read_bytes()
    (plain / f"other.{storage}").write_bytes(content[:-1000])
    with pytest.raises(ValueError, match=f"other.{storage} is not a whole"):
        JinaBertModel.from_pretrained(plain)
    (plain / f"other.{storage}").write_bytes(content)
    assert JinaBertModel.from_pretrained(plain).num_parameters() > 0


def test_a_head_of_another_size_is_new_if_asked_for(golden, tmp_path):
    JinaBertForSequenceClassification.from_pretrained(golden.folder, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.weight is \(3, 64\), the configuration says \(5, 64\)"):
        JinaBertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = JinaBertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 5


def test_a_plain_bert_is_refused(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a JinaBERT"):
        JinaBertModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither JinaBERT layout"):
        JinaBertModel.from_pretrained(tmp_path, config=tiny_config())


def test_the_log_says_what_was_renamed_and_left_out(golden, caplog):
    with caplog.at_level(logging.INFO, logger="modeling_jina_bert"):
        JinaBertModel.from_pretrained(golden.folder)
    assert "the prefix 'bert.' was removed" in caplog.text
    assert "Left out, not part of this class: cls.predictions.bias" in caplog.text
    assert "read as model_type jina_bert" in caplog.text


def test_loading_info_and_mismatched_sizes_are_still_options(golden):
    model, info = JinaBertForSequenceClassification.from_pretrained(
        golden.folder, num_labels=5, output_loading_info=True
    )
    assert "classifier.weight" in info["missing_keys"]
    assert model.classifier.out_features == 5


def test_registered_by_import(golden, tmp_path):
    JinaBertModel.from_pretrained(golden.folder).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is JinaBertModel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65}, "not a multiple"),
        ({"is_decoder": True}, "encoder"),
        ({"feed_forward_type": "original"}, "feed_forward_type"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is less than 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 is less than 1"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        JinaBertConfig(**changes)


@pytest.mark.parametrize(
    ("size", "parameters"), [("small", 32_690_688), ("base", 137_368_320), ("large", 435_188_736)]
)
def test_published_parameter_counts(size, parameters):
    shapes = {
        "small": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048},
        "base": {},
        "large": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "feed_forward_type": "reglu",
        },
    }
    with torch.device("meta"):
        model = JinaBertModel(JinaBertConfig(**shapes[size]))
    assert model.num_parameters() == parameters
    assert not list(model.buffers())


def test_reglu_is_relu():
    config = tiny_config(vocab_size=100, feed_forward_type="reglu")
    assert config.hidden_act == "relu"
    assert isinstance(JinaBertModel(config).encoder.layer[0].mlp.act, torch.nn.ReLU)
