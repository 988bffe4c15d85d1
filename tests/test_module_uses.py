"""What others do with a model's modules: replicas, offloading, hooks, dropout left on, threads, a config of tuples."""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, current_thread

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from conftest import tiny_config
from torch import nn
from transformers import BertTokenizer

import modeling_jina_bert as jina_bert
from modeling_jina_bert import JinaBertModel, onednn
from modeling_jina_bert.packing import Sequences

IDS = torch.arange(1, 15).view(2, 7)
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
HEADS = {
    "MaskedLM": IDS,
    "SequenceClassification": IDS,
    "TokenClassification": IDS,
    "QuestionAnswering": IDS,
    "MultipleChoice": IDS[None],
}


def model_of(head: str = "", **options) -> nn.Module:
    torch.manual_seed(0)
    name = f"JinaBertFor{head}" if head else "JinaBertModel"
    return getattr(jina_bert, name)(tiny_config(**{"vocab_size": 100, **options})).eval()


def replica(model: nn.Module) -> nn.Module:
    """As `nn.DataParallel` makes them on every GPU: tensors in place of the parameters, whatever device there is."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = None
            if child is not None:
                setattr(copy, name, copies[child])
        copy._former_parameters = OrderedDict()
        for name, parameter in module._parameters.items():
            setattr(copy, name, None if parameter is None else parameter.detach() * 1)
    return copies[model]


@pytest.mark.parametrize("head", ["", "SequenceClassification"])
def test_a_replica_of_data_parallel_has_the_numbers_of_the_model(head):
    model = model_of(head)
    copy = replica(model)
    assert next(copy.parameters(), None) is None
    for one, other in zip(copy(IDS, MASK).to_tuple(), model(IDS, MASK).to_tuple(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("head", HEADS)
def test_tuples_may_be_the_default_of_a_config(head):
    model = model_of(head)
    expected = model(HEADS[head]).to_tuple()
    model.config.return_dict = False
    found = model(HEADS[head])
    assert isinstance(found, tuple)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not isinstance(model(HEADS[head], return_dict=True), tuple)


def test_embeddings_on_disk(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "model")
    places = {"embeddings": "disk", "encoder": "cpu", "pooler": "cpu"}
    offloaded = JinaBertModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert offloaded.embeddings.token_type_embeddings.weight.is_meta
    torch.testing.assert_close(offloaded(IDS).last_hidden_state, model(IDS).last_hidden_state)
    offloaded.tokenizer = model.tokenizer = BertTokenizer({**SPECIAL, "word": 7})
    np.testing.assert_allclose(offloaded.encode("word"), model.encode("word"), atol=1e-5)
    chunks = [next(iter(m.encode_chunks("word word", "sentences"))).embedding for m in (offloaded, model)]
    np.testing.assert_allclose(*chunks, atol=1e-5)


def test_sequences_follow_a_layer_to_its_device():
    """accelerate moves the inputs of a layer on another GPU; here the other device is one without memory."""
    sequences = Sequences.of_batch((0.5, 0.25), MASK, 2, 7, dtype=torch.float32, device=torch.device("cpu"))
    moved = send_to_device(sequences, torch.device("meta"))
    assert moved is not sequences
    assert {moved.slopes.device.type, moved.attention_mask.device.type, moved._indices.device.type} == {"meta"}
    assert moved.bias.device.type == "meta"
    assert moved.cu_seqlens is sequences.cu_seqlens  # on the CPU always
    assert sequences.to("cpu") is sequences
    assert sequences.unpack(torch.empty(11, 4, device="meta")).shape == (2, 7, 4)


def test_a_trace_of_full_sequences_serves_padding():
    model = model_of().requires_grad_(False)
    traced = torch.jit.trace(
        lambda ids, mask: model(ids, mask).last_hidden_state, (IDS, torch.ones_like(IDS)), check_trace=False
    )
    valid = MASK.bool()
    torch.testing.assert_close(traced(IDS, MASK)[valid], model(IDS, MASK).last_hidden_state[valid])


@pytest.mark.parametrize("name", ["paged|eager", "flash_attention_3", "kernels-community/flash-attn2", "nothing"])
def test_attention_that_does_not_know_alibi_is_refused(name):
    with pytest.raises(ValueError, match="is none of eager, sdpa"):
        model_of(attn_implementation=name)
    with pytest.raises(ValueError, match="is none of eager, sdpa"):
        model_of().set_attn_implementation(name)


@pytest.fixture
def _products(monkeypatch):
    """Inference by oneDNN, whichever processor the tests run on."""
    monkeypatch.setattr(onednn, "_pays", lambda dtype: True)


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("post_norm", [False, True])
def test_hooks_fire_in_inference(post_norm):
    """Of every module inside the layers that is called with gradients, also of those that do nothing then."""
    model = model_of(qk_post_norm=post_norm)
    calls = []
    for name, module in model.encoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(IDS)
    expected, calls[:] = calls.copy(), []
    with torch.inference_mode():
        model(IDS)
    assert calls == expected
    assert any(name.endswith("mlp.act") for name in calls)
    assert any(name.endswith("output.dropout") for name in calls)


@pytest.mark.usefixtures("_products")
def test_dropout_that_is_left_on_drops():
    """Monte Carlo dropout: the model in evaluation mode, its dropouts in training mode."""
    model = model_of(hidden_dropout_prob=0.5)
    for place in ("mlp.dropout", "attention.output.dropout"):
        layer = model.encoder.layer[1].get_submodule(place).train()
        with torch.inference_mode():
            first, second = model(IDS).last_hidden_state, model(IDS).last_hidden_state
        assert (first - second).abs().max() > 0.1
        layer.eval()
    with torch.inference_mode():
        assert torch.equal(model(IDS).last_hidden_state, model(IDS).last_hidden_state)


@pytest.mark.parametrize("chunks", [False, True])
def test_threads_encode_with_a_model_in_training_mode(tokenizer, monkeypatch, chunks):
    """The first to finish does not switch dropout on under the other; what trained before trains afterwards."""
    model = model_of(hidden_dropout_prob=0.3, vocab_size=30528)
    model.tokenizer = tokenizer
    text = "some words " * 20
    encode = (lambda texts: [x[0].embedding for x in model.encode_chunks(texts, None)]) if chunks else model.encode
    (expected,) = encode([text])
    model.train()
    model.encoder.layer[0].eval()  # frozen
    both, first_ended = Barrier(2), Event()
    plain = model._hidden_states

    def wait_and_compute(*arguments, **options):
        """Neither computes before both are in evaluation mode, the second not before the first has ended."""
        if not both.broken:
            both.wait(30)
        if current_thread().name.endswith("_1"):
            first_ended.wait(30)
            both.abort()
        return plain(*arguments, **options)

    def first() -> list:
        found = encode([text])
        first_ended.set()
        return found

    monkeypatch.setattr(model, "_hidden_states", wait_and_compute)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(first), pool.submit(encode, [text, text])]
    for call in calls:
        np.testing.assert_allclose(call.result()[0], expected, atol=2e-6)
    assert [model.training, model.encoder.layer[0].training, model.encoder.layer[1].training] == [True, False, True]
