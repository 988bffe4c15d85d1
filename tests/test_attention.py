"""Every implementation against the eager one: values, gradients, padding of any kind, and no quadratic tensor.

The eager implementation is held against the official code in test_golden.py.
"""

import copy
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SHIPPED, LargestTensor, tiny_config

from modeling_jina_bert import JinaBertModel, alibi_slopes, cpu_attention, cpu_products, layers
from modeling_jina_bert import attention as attention_module
from modeling_jina_bert.attention import ATTENTION_FUNCTIONS, eager_attention, flex_attention, sdpa_attention
from modeling_jina_bert.packing import Sequences

LENGTH = 129


def masks() -> dict[str, torch.Tensor | None]:
    right = torch.ones(3, LENGTH, dtype=torch.bool)
    right[0, 7:] = right[1, 100:] = False
    holes = right.clone()
    holes[2, 3:40:5] = False
    nothing = right.clone()
    nothing[1] = False
    equal = torch.ones(3, LENGTH, dtype=torch.bool)
    equal[:2, 50:] = False
    return {"none": None, "right": right, "equal": equal, "left": right.flip(1), "holes": holes, "empty row": nothing}


def layout(heads: int, mask: torch.Tensor | None, batch: int = 3, length: int = LENGTH, **options) -> Sequences:
    options = {"dtype": torch.float64, "device": torch.device("cpu"), **options}
    return Sequences.of_batch(alibi_slopes(heads), mask, batch, length, **options)


def attend(attention, heads: int, mask: torch.Tensor | None, *, gradients=True, **options) -> list[torch.Tensor]:
    """The context `(3, LENGTH, heads, 16) float64`; then the gradients of query, key and value of a sum over it.

    Every `attention` gets the same inputs; the options are for it.
    """
    generator = torch.Generator().manual_seed(heads)
    *qkv, weights = (torch.randn(3, LENGTH, heads, 16, dtype=torch.float64, generator=generator) for _ in range(4))
    if mask is not None:  # an empty sequence: its value is defined, a gradient through its scores is not
        weights[~mask.any(dim=1)] = 0
    sequences = layout(heads, mask)
    packed = [sequences.pack(x.requires_grad_(gradients)) for x in qkv]
    context, _ = attention(*packed, sequences, scaling=0.25, **options)
    assert context.shape == packed[0].shape
    context = sequences.unpack(context)
    results = [context, *(torch.autograd.grad((context * weights).sum(), qkv) if gradients else ())]
    assert all(x.abs().max() > 0 for x in results)
    return results


def gap(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """Largest difference of any element of any tensor."""
    return max((x - y).abs().max().item() for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("heads", [1, 4, 6, 12])
def test_sdpa_equals_eager(heads, kind):
    expected = attend(eager_attention, heads, masks()[kind])
    assert gap(attend(sdpa_attention, heads, masks()[kind]), expected) < 1e-11


class QueriesOfEachCall(torch.overrides.TorchFunctionMode):
    """Records how many queries of a sequence each call of torch's attention has."""

    def __init__(self):
        super().__init__()
        self.queries: list[int] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.queries.append(args[0].shape[2])
        return function(*args, **(kwargs or {}))


# With dropout the CPU has no kernel for packed sequences either, and sdpa_attention takes the path of other devices.
# This one drops nothing: one probability in 10^12, and there are 2 * 10^5.
AS_ELSEWHERE = {"dropout": 1e-12}


@pytest.mark.parametrize("kind", ["none", "right", "equal"])
def test_short_sequences_on_other_devices_equal_eager(kind):
    expected = attend(eager_attention, 4, masks()[kind])
    with QueriesOfEachCall() as calls:
        found = attend(sdpa_attention, 4, masks()[kind], **AS_ELSEWHERE)
    assert calls.queries == [LENGTH]  # the whole batch at once, under a dense bias
    assert gap(found, expected) < 1e-11


@pytest.mark.parametrize("kind", masks())
def test_long_sequences_on_other_devices_equal_eager(monkeypatch, kind):
    # As they are, these two sizes ask for 2,000 tokens, of which eager attention makes a gigabyte.
    monkeypatch.setattr(attention_module, "DENSE_LENGTH", LENGTH - 1)
    monkeypatch.setattr(attention_module, "BLOCK_SCORES", 4 * 50 * LENGTH)
    expected = attend(eager_attention, 4, masks()[kind])
    with QueriesOfEachCall() as calls:
        found = attend(sdpa_attention, 4, masks()[kind], **AS_ELSEWHERE)
    if kind in ("right", "equal"):  # packed: each sequence at its own length
        assert max(calls.queries) < LENGTH
        assert set(calls.queries) >= ({7, 50, LENGTH - 2 * 50} if kind == "right" else {50, LENGTH - 2 * 50})
    else:
        assert set(calls.queries) == {50, LENGTH - 2 * 50}  # blocks of queries, and again in the backward pass
    assert gap(found, expected) < 1e-11


@pytest.mark.parametrize("kind", masks())
def test_flex_attention_equals_eager(kind):
    """Uncompiled and forward only, as on the CPU: score and mask functions are the ones that CUDA compiles."""
    expected = attend(eager_attention, 4, masks()[kind], gradients=False)
    assert gap(attend(flex_attention, 4, masks()[kind], gradients=False), expected) < 1e-11


def test_two_threads_give_the_gradients_of_one(monkeypatch):
    """The heads of a long sequence go side by side in the backward pass, in threads of our own."""
    pools = []

    class RecordedPool(ThreadPoolExecutor):
        def __init__(self, threads):
            pools.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(cpu_attention, "ThreadPoolExecutor", RecordedPool)
    qkv = [torch.randn(2400, 4, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gradients = {}
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        context, _ = sdpa_attention(*qkv, layout(4, None, 1, 2400), scaling=0.25)
        gradients[threads] = torch.autograd.grad(context.square().sum(), qkv)
    assert pools == [2]
    assert all(gradient.abs().max() > 0 for gradient in gradients[1])
    assert gap(gradients[2], gradients[1]) < 1e-11


def test_flex_attention_refuses_gradients_on_the_cpu():
    model = JinaBertModel(tiny_config(vocab_size=100))
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="forward only on the CPU"):
        model(torch.randint(1, 100, (1, 33)))


def test_flex_attention_visits_the_blocks_that_the_bound_keeps():
    length, heads = 1500, 4
    query, key = (torch.randn(heads, length, 16) / 4 for _ in range(2))
    documents = torch.arange(length) // 900
    lengths = torch.tensor([900, 600])
    mask = torch.arange(900) < lengths[:, None]
    visited = {}
    for sparse in (False, True):
        sequences = layout(heads, mask, 2, 900, dtype=torch.float32, sparse=sparse)
        block_mask = attention_module._flex_block_mask(query, key, sequences, documents, scaling=0.25)
        visited[sparse] = block_mask.kv_num_blocks[0].sum(dim=1)
        # Every block of queries visits its own block of keys.
        for head in range(heads):
            for row, count in enumerate(block_mask.kv_num_blocks[0, head].tolist()):
                assert row in block_mask.kv_indices[0, head, row, :count]
    assert (visited[False] == visited[False][0]).all()
    # Blocks of 128: the first sequence covers blocks 0 - 7, the second 7 - 11, block 7 is of both.
    assert visited[False][0] == 8 * 8 + 5 * 5 - 1 + 2 * (7 + 4) - 2 * (7 + 4)
    assert visited[True][0] < visited[False][0]
    assert visited[True].tolist() == sorted(visited[True].tolist())  # slopes descend with the head


@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
def test_the_model_gives_the_same_on_every_path(name):
    torch.manual_seed(0)
    reference = JinaBertModel(tiny_config(vocab_size=100)).double().train()
    reference.set_attn_implementation("eager")
    model = copy.deepcopy(reference)
    model.set_attn_implementation(name)
    ids, mask = torch.randint(1, 100, (3, LENGTH)), masks()["right"].long()
    found = []
    for instance in (reference, model):
        with torch.set_grad_enabled(name == "sdpa"):
            states = instance(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        gradients = ()
        if name == "sdpa":
            gradients = torch.autograd.grad(states.square().mean(), list(instance.encoder.parameters()))
        found.append((states, *gradients))
    assert gap(*found) < 1e-10


def largest_tensor(mask: torch.Tensor, *, training: bool) -> int:
    """Bytes, of a forward pass through a model of 4 heads, in training with the backward pass."""
    model = JinaBertModel(tiny_config(vocab_size=100)).train(training)
    ids = torch.randint(1, 100, mask.shape)
    with torch.set_grad_enabled(training), LargestTensor() as recorder:
        pooled = model(ids, attention_mask=mask).last_hidden_state.mean()
        if training:
            pooled.backward()
    return recorder.bytes


@pytest.mark.parametrize("kind", ["whole", "packed"])
@pytest.mark.parametrize("training", [False, True])
def test_memory_is_linear_in_the_length(monkeypatch, kind, training):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the recorder is one thread's
    found = {}
    for length in (1024, 4096):
        mask = torch.ones(2, length, dtype=torch.int64)
        if kind == "packed":
            mask[1, length // 2 :] = 0
        found[length] = largest_tensor(mask, training=training)
    assert 0 < found[4096] <= 4.2 * found[1024]
    assert found[4096] < 4096 * 4096


@pytest.mark.parametrize("training", [False, True])
def test_memory_of_left_padding_is_that_of_a_block_of_queries(monkeypatch, training):
    monkeypatch.setattr(attention_module, "BLOCK_SCORES", 2**20)  # as it is, the scores of 2,048 tokens are one block
    mask = torch.ones(2, 2048, dtype=torch.int64)
    mask[1, :1024] = 0
    assert 0 < largest_tensor(mask, training=training) <= 8 * 2**20 < 4 * 4 * 2048 * 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("length", [1, 10, 12, 127, 128, 129])
def test_a_single_text_has_the_numbers_that_it_has_in_a_batch(monkeypatch, length, by_products, dtype):
    """Of up to 128 tokens in a way of its own; unpadded, padded to more, and beside another text."""
    monkeypatch.setattr(cpu_products, "mkl_is_slow", lambda: by_products)
    monkeypatch.setattr(cpu_products, "multiplies_bf16", lambda: by_products)
    model = JinaBertModel(tiny_config(vocab_size=100)).eval().to(dtype)
    ids = torch.randint(1, 100, (2, 150))
    mask = (torch.arange(150) < torch.tensor([length, 140])[:, None]).long()
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).last_hidden_state[0, :length]
        alone = model(ids[:1, :length]).last_hidden_state[0]
        padded = model(ids[:1], attention_mask=mask[:1]).last_hidden_state[0]
    tolerance = 2e-6 if dtype == torch.float32 else 0.05
    assert (alone - expected).abs().max() < tolerance
    assert (padded[:length] - expected).abs().max() < tolerance
    assert not padded[length:].any()


@pytest.mark.parametrize("by_products", [False, True])
def test_what_is_kept_for_the_backward_pass_is_linear_in_the_length(monkeypatch, by_products):
    """The sum of all tensors, which many small ones could make quadratic."""
    monkeypatch.setattr(cpu_products, "mkl_is_slow", lambda: by_products)
    monkeypatch.setattr(cpu_products, "multiplies_bf16", lambda: by_products)
    model = JinaBertModel(tiny_config(vocab_size=100)).train().bfloat16()
    found = {}
    for length in (1024, 4096):
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states = model(torch.randint(1, 100, (1, length))).last_hidden_state
        found[length] = sum(kept.values())
        assert found[length] > states.nbytes
    assert found[4096] <= 4.05 * found[1024]


PEAK_MEMORY = """
import sys
import torch
from modeling_jina_bert import JinaBertConfig, JinaBertModel

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

torch.set_num_threads(2)
model = JinaBertModel(JinaBertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072,
                                     num_hidden_layers=2, initializer_range=0.05)).eval()
model.to(getattr(torch, sys.argv[1]))
with torch.no_grad():
    model(torch.randint(5, 30000, (1, 64)))  # whatever is allocated once
    for length in map(int, sys.argv[2:]):
        ids = torch.randint(5, 30000, (1, length))
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")
        model(ids)
        print(length, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 450e6), ("float32", 600e6)])
def test_peak_memory_of_the_process_at_base_width(dtype, most):
    """8192 tokens: at most 450 MB above the loaded model in bfloat16; in float32 hidden states are twice as large.

    Here, in five and eleven processes: 336 to 374 and 362 to 456 MB.
    """
    process = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, dtype, "8192", "16384"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert process.returncode == 0, process.stderr
    peaks = {int(length): int(peak) for length, peak in map(str.split, process.stdout.splitlines())}
    hidden_states = 8192 * 768 * getattr(torch, dtype).itemsize
    assert hidden_states < peaks[8192] < most
    assert peaks[16384] < 2.3 * peaks[8192]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_peak_memory_at_base_width_at_32768_tokens():
    process = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, "bfloat16", "8192", "32768"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.returncode == 0, process.stderr
    peaks = {int(length): int(peak) for length, peak in map(str.split, process.stdout.splitlines())}
    assert peaks[32768] <= 4 * peaks[8192]


def test_the_memory_test_sees_a_quadratic_tensor():
    model = JinaBertModel(tiny_config(vocab_size=100)).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad(), LargestTensor() as recorder:
        model(torch.randint(1, 100, (1, 2048)))
    assert recorder.bytes >= 4 * 4 * 2048 * 2048


def test_eager_returns_probabilities_whatever_is_configured():
    model = JinaBertModel(tiny_config(vocab_size=100)).eval()
    assert model.config._attn_implementation == "sdpa"
    outputs = model(torch.randint(1, 100, (2, 7)), output_attentions=True)
    assert [a.shape for a in outputs.attentions] == [(2, 4, 7, 7)] * 2
    assert torch.allclose(outputs.attentions[0].sum(-1), torch.ones(2, 4, 7))


@pytest.mark.parametrize("wanted", [{"output_hidden_states": True}, {"output_hidden_states": [0]}])
def test_recorded_layers_have_the_shape_of_the_batch(wanted):
    model = JinaBertModel(tiny_config(vocab_size=100)).eval()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    outputs = model(torch.randint(1, 100, (2, 7)), attention_mask=mask, **wanted)
    recorded = [states.shape for states in outputs.hidden_states if states is not None]
    assert recorded
    assert set(recorded) == {(2, 7, model.config.hidden_size)}


def test_set_attn_implementation_switches_the_path(monkeypatch):
    model = JinaBertModel(tiny_config(vocab_size=100)).eval()
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name, function in list(ATTENTION_FUNCTIONS.items()):
        monkeypatch.setitem(ATTENTION_FUNCTIONS, name, recorded(name, function))
    ids = torch.randint(1, 100, (2, 7))
    outputs = []
    for name in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            outputs.append(model(ids).last_hidden_state)
    assert calls == ["eager", "eager", "sdpa", "sdpa", "flex_attention", "flex_attention"]
    for output in outputs[1:]:
        assert torch.allclose(outputs[0], output, atol=1e-5)


def test_flash_attention_without_its_package_is_refused():
    with pytest.raises(ImportError, match="FlashAttention2"):
        JinaBertModel._from_config(tiny_config(vocab_size=100), attn_implementation="flash_attention_2")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="paged_nonsense"):
        JinaBertModel._from_config(tiny_config(vocab_size=100), attn_implementation="paged_nonsense")


def test_dropout_is_applied_in_training_only():
    model = JinaBertModel(tiny_config(vocab_size=100, attention_probs_dropout_prob=0.5))
    ids = torch.randint(1, 100, (1, 33))
    assert not torch.equal(model.train()(ids).last_hidden_state, model(ids).last_hidden_state)
    assert torch.equal(model.eval()(ids).last_hidden_state, model(ids).last_hidden_state)


def test_flex_attention_refuses_dropout():
    model = JinaBertModel(tiny_config(vocab_size=100, attention_probs_dropout_prob=0.5)).train()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"no dropout.*0\.5"):
        model(torch.randint(1, 100, (1, 33)))


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    plain = JinaBertModel(tiny_config(vocab_size=100)).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    ids, mask = torch.randint(1, 100, (3, LENGTH)), masks()["right"].long()
    gradients = []
    for model in (plain, checkpointed):
        loss = model(ids, attention_mask=mask).last_hidden_state[mask.bool()].square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.encoder.parameters())))
    for expected, found in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(expected, found)


def test_autocast():
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config(vocab_size=100)).train()
    ids, mask = torch.randint(1, 100, (3, LENGTH)), masks()["right"].long()
    exact = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    errors = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        states.float().square().mean().backward()
        errors[name] = (states - exact).abs().max().item()
    assert 0 < errors["sdpa"] <= 2 * errors["eager"]


@pytest.mark.parametrize("by_products", [False, True])
def test_the_operator_is_sound(monkeypatch, by_products):
    """torch's own checks of an operator: schema, fake implementation, autograd registration, dynamic shapes."""
    monkeypatch.setattr(cpu_attention, "by_products", lambda dtype: by_products)
    lengths = torch.tensor([0, 5, 5, 70, 1])
    qkv = [torch.randn(81, 4, 16, requires_grad=True) for _ in range(3)]
    slopes = torch.tensor(alibi_slopes(4))
    torch.library.opcheck(cpu_attention.alibi_attention, (*qkv, slopes, lengths.cumsum(0), 0.25, True, True))


@pytest.mark.parametrize("by_products", [False, True])
def test_rows_behind_the_last_sequence_change_nothing(monkeypatch, by_products):
    monkeypatch.setattr(cpu_attention, "by_products", lambda dtype: by_products)
    lengths = torch.tensor([0, 5, 5, 70, 1])
    qkv = [torch.randn(81, 4, 16) for _ in range(3)]
    slopes = torch.tensor(alibi_slopes(4))

    def attend(behind: int) -> list[torch.Tensor]:
        rows = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, behind)).requires_grad_() for x in qkv]
        context, _ = cpu_attention.alibi_attention(*rows, slopes, lengths.cumsum(0), 0.25, True, True)
        assert context.isfinite().all()
        return [context[:81], *(x[:81] for x in torch.autograd.grad(context[:81].square().sum(), rows))]

    for found, expected in zip(attend(7), attend(0), strict=True):
        assert torch.equal(found, expected)


def test_each_packed_sequence_is_computed_at_its_own_length(monkeypatch):
    """The path of devices without a packed kernel, here on the CPU: no row of a longer neighbour's length."""
    torch.manual_seed(0)
    lengths = [700, 3, 40]
    slopes = alibi_slopes(4)
    sequences = Sequences.of_lengths(slopes, lengths, dtype=torch.float64, device=torch.device("cpu"), sparse=False)
    qkv = [torch.randn(sum(lengths), 4, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    seen = []
    sdpa = attention_module._sdpa

    def noted(query, *arguments, **options):
        seen.append(query.shape[2])
        return sdpa(query, *arguments, **options)

    monkeypatch.setattr(attention_module, "_sdpa", noted)
    found = attention_module._one_by_one(*qkv, sequences, scaling=0.25, dropout=0.0)
    assert seen == lengths
    expected, _ = eager_attention(*qkv, sequences, scaling=0.25)
    assert (found - expected).abs().max() < 1e-12
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), qkv) for x in (found, expected)), strict=True):
        assert (ours - theirs).abs().max() < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("post_norm", [False, True])
def test_the_dropout_of_a_pass_without_gradients_is_drawn_again_with_them(monkeypatch, dtype, post_norm):
    """What cached losses rely on: both passes from one random state are the same function."""
    monkeypatch.setattr(layers, "MLP_BLOCK_BYTES", 4096)
    config = tiny_config(vocab_size=100, hidden_dropout_prob=0.3, qk_post_norm=post_norm)
    model = JinaBertModel(config).to(dtype).train()
    ids = torch.randint(1, 100, (3, 11))  # 33 rows, which the grid of products makes 36 of
    state = torch.get_rng_state()
    with_gradients = model(ids).last_hidden_state.detach().float()
    torch.set_rng_state(state)
    with torch.no_grad():
        without = model(ids).last_hidden_state.float()
    limit = 1e-4 if dtype == torch.float32 else 0.2  # hidden states have a spread of 1; another mask is off by 4
    assert (without - with_gradients).abs().max() < limit
    with torch.no_grad():
        assert (model(ids).last_hidden_state.float() - with_gradients).abs().max() > 1  # guard: other masks


def test_attention_dropout_without_gradients():
    """Monte Carlo dropout of the attention alone: rows of the grid have no place in the padded batch."""
    model = JinaBertModel(tiny_config(vocab_size=100, attention_probs_dropout_prob=0.5)).eval()
    ids = torch.randint(1, 100, (1, 33))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        for layer in model.encoder.layer:
            layer.attention.self.train()
        assert not torch.allclose(model(ids).last_hidden_state, expected, atol=1e-2)
        assert model.train()(ids).last_hidden_state.shape == expected.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "padding"), [(3000, "right"), (3000, "left"), (300, "right"), (300, "left")])
def test_a_cuda_device_gives_the_numbers_of_the_reference(dtype, name, length, padding):
    """Hidden states and gradients, against eager in float64 on the CPU: at most twice the error of eager there."""
    if name == "flash_attention_2":
        pytest.importorskip("flash_attn")
        if dtype == torch.float32:
            pytest.skip("flash-attn is for half precision")
    torch.manual_seed(0)
    reference = JinaBertModel(tiny_config(vocab_size=100)).double()
    ids, mask = torch.randint(1, 100, (2, length)), torch.ones(2, length, dtype=torch.int64)
    mask[1, slice(length // 2, None) if padding == "right" else slice(None, length // 2)] = 0

    def states_and_gradients(implementation: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        model = copy.deepcopy(reference).to(device=device, dtype=dtype)
        model.set_attn_implementation(implementation)
        states = model(ids.to(device), attention_mask=mask.to(device)).last_hidden_state[mask.bool().to(device)]
        gradients = torch.autograd.grad(states.double().square().mean(), list(model.encoder.parameters()))
        return [x.cpu().double() for x in (states.detach(), *gradients)]

    exact = states_and_gradients("eager", torch.float64, "cpu")
    known = states_and_gradients("eager", dtype, "cpu")
    for expected, by_eager, found in zip(exact, known, states_and_gradients(name, dtype, "cuda"), strict=True):
        scale = expected.abs().max().clamp(min=1e-6)
        allowed = max(2 * ((by_eager - expected).abs().max() / scale).item(), 1e-4)
        assert (found - expected).abs().max() / scale <= allowed


@pytest.mark.gpu
def test_encode_on_a_cuda_device():
    model = JinaBertModel.from_pretrained(SHIPPED)
    texts = ["a short one", "a longer text, " * 700, "words " * 90]
    expected = model.encode(texts)
    found = model.encode(texts, device="cuda")
    assert isinstance(found, np.ndarray)
    assert np.abs(found - expected).max() < 1e-3
    states = model.encode(texts, output_value="token_embeddings")
    assert all(x.device.type == "cpu" for x in states)
