"""Stage I from a trained BERT: both architectures begin with its weights, the MLPs of a JinaBERT with its function."""

import pytest
import torch
from conftest import SHIPPED, tiny_config
from mlm_runs import log, recipe
from transformers import AutoModelForMaskedLM, BertConfig, BertModel, set_seed

from modeling_jina_bert import JinaBertForMaskedLM
from training import mlm
from training.bert_start import constant_directions, load_bert, start_from
from training.control import SparseBertForMaskedLM
from training.recipe import RecipeError

SHAPE = {
    "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
TEXTS = [torch.randint(5, 300, (32,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(40)]


@pytest.fixture(name="bert")
def bert_with_constant_directions():
    """What training gives a BERT: the MLPs' inputs have a mean, so that a vector has the same product with all."""
    set_seed(0)
    bert = BertModel(BertConfig(**SHAPE, max_position_embeddings=32, initializer_range=0.2), add_pooling_layer=False)
    for layer in bert.encoder.layer:
        norm = layer.attention.output.LayerNorm
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.constant_(norm.bias, 1.0)
        torch.nn.init.normal_(layer.intermediate.dense.bias, std=0.2)
    return bert.eval()


def test_a_gated_mlp_computes_what_the_plain_one_did(bert):
    model = JinaBertForMaskedLM(tiny_config(**{**SHAPE, "vocab_size": 304})).eval()
    own = model.bert.embeddings.word_embeddings.weight[300:].clone()
    start_from(model, bert, TEXTS)
    torch.testing.assert_close(model.bert.embeddings.word_embeddings.weight[300:], own, rtol=0, atol=0)
    for number, (layer, plain) in enumerate(zip(model.bert.encoder.layer, bert.encoder.layer, strict=True)):
        inputs = []
        handle = plain.intermediate.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0]))
        with torch.no_grad():
            bert(torch.tensor(TEXTS[:4]))
            expected = plain.output(plain.intermediate(inputs[0]), inputs[0])
            found = layer.mlp(inputs[0])
            fresh = JinaBertForMaskedLM(model.config).bert.encoder.layer[number].mlp(inputs[0])
        handle.remove()
        error = (found - expected).norm() / expected.norm()
        assert error < 0.01
        assert (fresh - expected).norm() / expected.norm() > 10 * error  # of a model that did not begin with the BERT


def test_the_fitted_direction_has_one_product_with_all_hidden_states(bert):
    ones = constant_directions(bert, TEXTS[:20])
    seen = []
    bert.encoder.layer[1].intermediate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    bert(torch.tensor(TEXTS[20:24]))  # others than were fitted to
    products = seen[0] @ ones[1]
    assert products.mean().item() == pytest.approx(1, abs=0.01)
    assert products.std() < 0.02


def test_one_token_is_computed_as_by_the_bert(bert):
    """A text of one token has no distances; with the BERT's position 0 as nothing, only the MLPs differ."""
    with torch.no_grad():
        bert.embeddings.position_embeddings.weight[0] = 0
    model = JinaBertForMaskedLM(tiny_config(**SHAPE)).eval()
    start_from(model, bert, TEXTS)
    token = torch.tensor([[17]])
    with torch.no_grad():
        expected, found = (m(token).last_hidden_state for m in (bert, model.bert))
    assert (found - expected).norm() / expected.norm() < 0.01


def test_the_control_is_the_bert(bert):
    control = SparseBertForMaskedLM(BertConfig(**SHAPE, max_position_embeddings=32)).eval()
    start_from(control, bert, [])
    ids = torch.tensor(TEXTS[:3])
    with torch.no_grad():
        torch.testing.assert_close(control.bert(ids).last_hidden_state, bert(ids).last_hidden_state)


def test_other_shapes_are_named(bert):
    def error(model):
        with pytest.raises(RecipeError) as raised:
            start_from(model, bert, TEXTS)
        return str(raised.value)

    assert "hidden_size is 16 there and 32" in error(JinaBertForMaskedLM(tiny_config(**{**SHAPE, "hidden_size": 32})))
    assert "hidden_act is 'gelu' there and 'relu'" in error(
        JinaBertForMaskedLM(tiny_config(**SHAPE, feed_forward_type="reglu"))
    )
    fewer = tiny_config(**{**SHAPE, "vocab_size": 200})
    assert "300 tokens there, the model has 200" in error(JinaBertForMaskedLM(fewer))
    assert "qk_post_norm" in error(JinaBertForMaskedLM(tiny_config(**SHAPE, qk_post_norm=True)))
    assert "32 positions there, 64" in error(SparseBertForMaskedLM(BertConfig(**SHAPE, max_position_embeddings=64)))


def test_what_is_no_bert_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match="not a BERT: its model_type is 'jina_bert'"):
        load_bert(str(SHIPPED))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_bert(str(tmp_path))


@pytest.mark.parametrize("architecture", ["jina_bert", "bert"])
def test_a_recipe_trains_from_a_bert_and_resumes(tmp_path, architecture):
    set_seed(3)
    shape = {**SHAPE, "vocab_size": 30522, "max_position_embeddings": 32}
    BertModel(BertConfig(**shape, initializer_range=0.1)).save_pretrained(tmp_path / "bert")
    overrides = [f"initial_bert={tmp_path / 'bert'}", f"architecture={architecture}", "model.hidden_dropout_prob=0.0"]
    if architecture == "bert":
        overrides += ["model.feed_forward_type=null", "model.max_position_embeddings=32"]
    final = mlm.train(recipe(tmp_path / "run", *overrides))
    first = log(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(10.3, abs=1.0)
    trained = AutoModelForMaskedLM.from_pretrained(final, trust_remote_code=True)
    theirs = BertModel.from_pretrained(tmp_path / "bert").embeddings.word_embeddings.weight
    words = trained.get_input_embeddings().weight[:30522]
    assert (words - theirs).abs().max() < 0.02  # six steps of at most 0.003; others would be 0.1 away
    (tmp_path / "bert" / "config.json").unlink()  # a resumed run does not read it
    again = mlm.train(recipe(tmp_path / "run", *overrides), resume=str(tmp_path / "run" / "checkpoint-4"))
    assert (again / "model.safetensors").is_file()
