"""Every implementation against the eager one: values, gradients, padding of any kind, and no quadratic tensor."""

import pytest
import torch
from conftest import tiny_config

from modeling_jina_bert import JinaBertModel, alibi_slopes
from modeling_jina_bert import attention as attention_module
from modeling_jina_bert.attention import AttentionBias, eager_attention, sdpa_attention

LENGTH = 129


def masks() -> dict[str, torch.Tensor | None]:
    right = torch.ones(3, LENGTH, dtype=torch.bool)
    right[0, 7:] = right[1, 100:] = False
    holes = right.clone()
    holes[2, 3:40:5] = False
    nothing = right.clone()
    nothing[1] = False
    return {"none": None, "right": right, "left": right.flip(1), "holes": holes, "empty row": nothing}


@pytest.mark.parametrize("path", ["dense", "linear"])
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("heads", [1, 4, 6, 12])
def test_sdpa_equals_eager(monkeypatch, path, kind, heads):
    if path == "linear":  # what long sequences take
        monkeypatch.setattr(attention_module, "DENSE_LENGTH", 0)
        monkeypatch.setattr(attention_module, "QUERY_BLOCK", 50)
    mask = masks()[kind]
    generator = torch.Generator().manual_seed(heads)
    qkv = [torch.randn(3, heads, LENGTH, 16, dtype=torch.float64, generator=generator) for _ in range(3)]
    weights = torch.randn(3, heads, LENGTH, 16, dtype=torch.float64, generator=generator)
    if kind == "empty row":  # uniform attention: its value is defined, a gradient through its scores is not
        weights[1] = 0
    results = []
    for function in (eager_attention, sdpa_attention):
        inputs = [x.clone().requires_grad_() for x in qkv]
        bias = AttentionBias(alibi_slopes(heads), mask, LENGTH, dtype=torch.float64, device=torch.device("cpu"))
        context, _ = function(*inputs, bias, scaling=0.25)
        gradients = torch.autograd.grad((context * weights).sum(), inputs)
        results.append((context, *gradients))
    for eager, sdpa in zip(*results, strict=True):
        assert eager.abs().max() > 0
        assert (eager - sdpa).abs().max() < 1e-11


@pytest.mark.parametrize("span", [None, (0, 100), (29, 129)])
def test_blocks_of_queries_equal_eager(monkeypatch, span):
    """The path of devices whose kernels read no strided view."""
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 50)
    mask = None
    if span is not None:
        mask = torch.zeros(1, LENGTH, dtype=torch.bool)
        mask[:, span[0] : span[1]] = True
    query, key, value = (torch.randn(1, 4, LENGTH, 16, dtype=torch.float64) for _ in range(3))
    bias = AttentionBias(alibi_slopes(4), mask, LENGTH, dtype=torch.float64, device=torch.device("cpu"))
    expected, _ = eager_attention(query, key, value, bias, scaling=0.25)
    start, stop = span or (0, LENGTH)
    found = attention_module._blockwise(
        query, key[:, :, start:stop], value[:, :, start:stop], bias, span=span, scaling=0.25, dropout=0.0
    )
    assert (found - expected).abs().max() < 1e-12


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the storage of the largest tensor that any operation returns, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_memory_is_linear_in_the_length(padded, training):
    config = tiny_config(vocab_size=100)
    model = JinaBertModel(config).train(training)

    def largest(length: int) -> int:
        ids = torch.randint(1, 100, (2, length))
        mask = torch.ones_like(ids)
        if padded:
            mask[1, length // 2 :] = 0
        with torch.set_grad_enabled(training), LargestTensor() as recorder:
            pooled = model(ids, attention_mask=mask).last_hidden_state.mean()
            if training:
                pooled.backward()
        return recorder.bytes

    short, long = largest(1024), largest(4096)
    assert short > 0
    assert long <= 4.2 * short
    assert long < 4096 * 4096


def test_eager_returns_probabilities_whatever_is_configured():
    model = JinaBertModel(tiny_config(vocab_size=100)).eval()
    assert model.config._attn_implementation == "sdpa"
    outputs = model(torch.randint(1, 100, (2, 7)), output_attentions=True)
    assert [a.shape for a in outputs.attentions] == [(2, 4, 7, 7)] * 2
    assert torch.allclose(outputs.attentions[0].sum(-1), torch.ones(2, 4, 7))


def test_set_attn_implementation_switches_the_path(monkeypatch):
    model = JinaBertModel(tiny_config(vocab_size=100)).eval()
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name, function in list(attention_module.ATTENTION_FUNCTIONS.items()):
        monkeypatch.setitem(attention_module.ATTENTION_FUNCTIONS, name, recorded(name, function))
    ids = torch.randint(1, 100, (2, 7))
    outputs = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        outputs.append(model(ids).last_hidden_state)
    assert calls == ["eager", "eager", "sdpa", "sdpa"]
    assert torch.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2"])
def test_unsupported_implementations_are_refused(name):
    with pytest.raises((ValueError, ImportError)):
        JinaBertModel._from_config(tiny_config(vocab_size=100), attn_implementation=name)


def test_dropout_is_applied_in_training_only():
    config = tiny_config(vocab_size=100, attention_probs_dropout_prob=0.5)
    model = JinaBertModel(config)
    ids = torch.randint(1, 100, (1, 33))
    assert not torch.equal(model.train()(ids).last_hidden_state, model(ids).last_hidden_state)
    assert torch.equal(model.eval()(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_device_gives_the_numbers_of_the_cpu(dtype):
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config(vocab_size=100)).eval()
    ids = torch.randint(1, 100, (2, 3000))
    mask = torch.ones_like(ids)
    mask[1, 1700:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        in_dtype = model.to(dtype)(ids, attention_mask=mask).last_hidden_state[mask.bool()].float()
        model.to("cuda")
        found = model(ids.cuda(), attention_mask=mask.cuda()).last_hidden_state.cpu()[mask.bool()].float()
    # At most twice the error of the same dtype on the CPU, and for float32 what TF32-free rounding gives.
    assert (found - expected).abs().max() <= max(2 * (in_dtype - expected).abs().max().item(), 1e-4)
