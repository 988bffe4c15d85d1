"""Equality with the official code on both published layouts.

Pins: hidden states, pooler, MLM and classification logits and losses, `encode`; eager and SDPA; float32 and float64;
and that a wrong build (tanh GELU, no ALiBi) is far outside the tolerance, so these tests can fail.
"""

import pytest
import torch
from safetensors.torch import load_file

from modeling_jina_bert import (
    JinaBertForMaskedLM,
    JinaBertForSequenceClassification,
    JinaBertModel,
    attention_tiles,
    count_scores,
    mean_pooling,
)

TOLERANCE = {torch.float32: (3e-5, 5e-5), torch.float64: (1e-10, 1e-10)}  # hidden states, logits
PATHS = [(impl, dtype) for impl in ("eager", "sdpa") for dtype in TOLERANCE]
paths = pytest.mark.parametrize(("implementation", "dtype"), PATHS, ids=[f"{i}-{str(d)[6:]}" for i, d in PATHS])


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return (found.double() - expected.double()).abs().max().item()


@paths
@torch.no_grad()
def test_hidden_states(golden, implementation, dtype):
    hidden, _ = TOLERANCE[dtype]
    model = JinaBertModel.from_pretrained(golden.folder / "plain", dtype=dtype, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    expected = golden.tensors
    for name in ("batch", "leftpad", "long"):
        inputs = golden.inputs(name)
        outputs = model(**inputs)
        states, valid = outputs.last_hidden_state, inputs["attention_mask"].bool()
        if name == "long":
            assert gap(states[:, ::10], expected["f64.long.every_10th_hidden_state"]) < hidden
        else:
            assert gap(states[valid], expected[f"f64.{name}.last_hidden_state"][valid]) < hidden
        assert gap(outputs.pooler_output, expected[f"f64.{name}.pooler_output"]) < hidden
        pooled = mean_pooling(states, inputs["attention_mask"])  # float32 by definition
        assert gap(pooled, expected[f"f64.{name}.mean_pooled"]) < 3e-5


@torch.no_grad()
def test_hidden_states_by_flex_attention(golden):
    """Uncompiled, as on the CPU; what is not packed, as left padding, takes the path of sdpa."""
    model = JinaBertModel.from_pretrained(golden.folder / "plain", dtype=torch.float32)
    model.set_attn_implementation("flex_attention")
    for name in ("batch", "long"):
        pooled = mean_pooling(model(**golden.inputs(name)).last_hidden_state, golden.inputs(name)["attention_mask"])
        assert gap(pooled, golden.tensors[f"f64.{name}.mean_pooled"]) < 3e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_hidden_states_without_what_is_below_rounding(golden, dtype, monkeypatch):
    """The longest text, of 1,100 tokens, looked at for what can be left out as if it were a long one."""
    monkeypatch.setattr(attention_tiles, "SPARSE_LENGTH", 512)
    monkeypatch.setattr(attention_tiles, "BLOCK", 64)
    model = JinaBertModel.from_pretrained(golden.folder / "plain", dtype=dtype)
    with count_scores() as count:
        states = model(**golden.inputs("long")).last_hidden_state
    assert count.skipped_share > 0.02
    assert gap(states[:, ::10], golden.tensors["f64.long.every_10th_hidden_state"]) < TOLERANCE[dtype][0]


@paths
@torch.no_grad()
def test_without_a_mask_and_with_an_empty_one(golden, implementation, dtype):
    hidden, _ = TOLERANCE[dtype]
    model = JinaBertModel.from_pretrained(golden.folder / "plain", dtype=dtype, attn_implementation=implementation)
    states = model(golden.tensors["batch.input_ids"][1:2, :33]).last_hidden_state
    assert gap(states, golden.tensors["f64.nomask.last_hidden_state"]) < hidden
    ids = golden.tensors["leftpad.input_ids"][1:2]
    states = model(ids, attention_mask=torch.zeros_like(ids)).last_hidden_state
    assert gap(states, golden.tensors["f64.allmasked.last_hidden_state"]) < hidden
    assert mean_pooling(states, torch.zeros_like(ids)).abs().max() == 0


@paths
@torch.no_grad()
def test_padding_positions_of_a_batch_that_is_not_packed(golden, implementation, dtype):
    """The official code computes them; ours does where layers are recorded or padding is not on the right."""
    hidden, _ = TOLERANCE[dtype]
    model = JinaBertModel.from_pretrained(golden.folder / "plain", dtype=dtype, attn_implementation=implementation)
    for name, options in (("batch", {"output_hidden_states": True}), ("leftpad", {})):
        states = model(**golden.inputs(name), **options).last_hidden_state
        assert gap(states, golden.tensors[f"f64.{name}.last_hidden_state"]) < hidden


@torch.no_grad()
def test_all_layers(golden):
    model = JinaBertModel.from_pretrained(golden.folder / "plain", dtype=torch.float32)
    outputs = model(**golden.inputs("batch"), output_hidden_states=True)
    assert gap(torch.stack(outputs.hidden_states), golden.tensors["f32.batch.hidden_states"]) < 6e-5


@paths
@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_masked_lm(golden, implementation, dtype, sparse):
    _, logits = TOLERANCE[dtype]
    model = JinaBertForMaskedLM.from_pretrained(golden.folder, dtype=dtype, attn_implementation=implementation)
    model.config.sparse_prediction = sparse
    labels = golden.tensors["batch.labels"]
    outputs = model(**golden.inputs("batch"), labels=labels)
    at_labels = outputs.logits if sparse else outputs.logits[labels != -100]
    assert gap(at_labels, golden.tensors["f64.batch.mlm_logits_at_labels"]) < logits
    assert gap(outputs.loss, golden.tensors["f64.batch.mlm_loss"]) < max(logits, 1e-6)
    first = model(**golden.inputs("long")).logits[:, :4]
    assert gap(first, golden.tensors["f64.long.mlm_logits_first4"]) < logits


@paths
@torch.no_grad()
def test_sequence_classification(golden, implementation, dtype):
    _, logits = TOLERANCE[dtype]
    model = JinaBertForSequenceClassification.from_pretrained(
        golden.folder / "plain", num_labels=3, dtype=dtype, attn_implementation=implementation
    )
    head = load_file(golden.folder / "seqcls_head.safetensors")
    model.classifier.load_state_dict({name.rsplit(".", 1)[1]: tensor for name, tensor in head.items()})
    outputs = model(**golden.inputs("batch"), labels=golden.tensors["batch.seqcls_labels"])
    assert gap(outputs.logits, golden.tensors["f64.batch.seqcls_logits"]) < logits
    assert gap(outputs.loss, golden.tensors["f64.batch.seqcls_loss"]) < max(logits, 1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_encode(golden, normalize):
    model = JinaBertModel.from_pretrained(golden.folder, dtype=torch.float32)
    found = model.encode(
        golden.meta["encode_sentences"], batch_size=golden.meta["encode_batch_size"], normalize_embeddings=normalize
    )
    expected = golden.tensors["f32.encode.embeddings" + ("_normalized" if normalize else "")]
    assert found.dtype == expected.numpy().dtype
    assert gap(torch.from_numpy(found), expected) < 3e-5


@torch.no_grad()
def test_bfloat16_is_no_worse_than_the_official_bfloat16(golden):
    reference = golden.tensors["f64.batch.mean_pooled"]
    model = JinaBertModel.from_pretrained(golden.folder / "plain", dtype=torch.bfloat16)
    inputs = golden.inputs("batch")
    pooled = mean_pooling(model(**inputs).last_hidden_state, inputs["attention_mask"])
    assert gap(pooled, reference) <= 2 * gap(golden.tensors["bf16.batch.mean_pooled"], reference)


@pytest.mark.parametrize("mutation", ["tanh GELU", "no ALiBi", "sorted slopes", "halves swapped"])
@torch.no_grad()
def test_a_wrong_build_is_seen(golden, mutation):
    model = JinaBertModel.from_pretrained(golden.folder / "plain", dtype=torch.float64)
    if mutation == "tanh GELU":
        for layer in model.encoder.layer:
            layer.mlp.act = torch.nn.GELU(approximate="tanh")
    elif mutation == "no ALiBi":
        model.slopes = (0.0,) * len(model.slopes)
    elif mutation == "sorted slopes":
        model.slopes = tuple(sorted(model.slopes))
    else:
        for layer in model.encoder.layer:
            up = layer.mlp.up_gated_layer if model.config.qk_post_norm else layer.mlp.gated_layers
            up.weight.copy_(torch.cat(up.weight.chunk(2)[::-1]))
    states = model(**golden.inputs("batch")).last_hidden_state
    assert gap(states, golden.tensors["f64.batch.last_hidden_state"]) > 1e-4
