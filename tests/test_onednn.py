"""What inference on the CPU computes through oneDNN: the layers' own numbers, and the layers themselves otherwise."""

import copy
import pickle

import pytest
import torch
from torch import nn

from modeling_jina_bert import (
    JinaBertConfig,
    JinaBertModel,
    alibi,
    attention,
    count_scores,
    cpu_products,
    layers,
    onednn,
)
from modeling_jina_bert.packing import Sequences

HIDDEN, WIDTH = 48, 80
CONFIG = {"vocab_size": 100, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _on_every_processor(monkeypatch):
    """Whichever processor the tests run on."""
    monkeypatch.setattr(onednn, "_pays", lambda dtype: dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(cpu_products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(cpu_products, "multiplies_bf16", lambda: True)


@pytest.fixture
def products(monkeypatch):
    """The products that oneDNN is asked for: the name of what is fused into each."""
    asked = []

    class Recorded:
        operator = onednn._product

        def __call__(self, *arguments):
            asked.append(arguments[3])
            return self.operator(*arguments)

        def binary(self, *arguments):
            asked.append(arguments[4])
            return self.operator.binary(*arguments)

    monkeypatch.setattr(onednn, "_product", Recorded())
    return asked


def model_of(**options) -> JinaBertModel:
    torch.manual_seed(0)
    config = JinaBertConfig(**{**CONFIG, "intermediate_size": WIDTH, "initializer_range": 0.2, **options})
    return JinaBertModel(config, add_pooling_layer=False).eval()


def states(model: JinaBertModel) -> torch.Tensor:
    ids = torch.arange(5, 65).view(3, 20)
    mask = torch.arange(20) < torch.tensor([20, 7, 1])[:, None]
    return model(ids, mask.long()).last_hidden_state.detach()


@pytest.mark.parametrize("post_norm", [False, True])
def test_the_layers_give_their_own_numbers(products, post_norm):
    model = model_of(qk_post_norm=post_norm)
    expected = states(model.double())  # no products of oneDNN in float64
    assert products == []
    with torch.inference_mode():
        found = states(model.float())
    of_a_layer = ["none"] * 3 + ["add", "gelu", "mul", "none" if post_norm else "add"]
    assert products == of_a_layer * 2
    assert (found - expected).abs().max() < 1e-5
    with torch.inference_mode():
        half = states(model.bfloat16())
    assert (half - expected).abs().max() < 0.1
    assert (half - expected).abs().mean() < 0.01


def test_relu_gates(products):
    model = model_of(feed_forward_type="reglu")
    expected = states(model.double())
    with torch.inference_mode():
        found = states(model.float())
    assert products == (["none"] * 3 + ["add", "relu", "mul", "add"]) * 2
    assert (found - expected).abs().max() < 1e-5


def test_an_activation_in_its_place_is_called(products):
    """As by who measures what GELU by tanh changes."""
    model = model_of()
    for layer in model.encoder.layer:
        layer.mlp.act = nn.Tanh()
    expected = states(model.double())
    with torch.inference_mode():
        found = states(model.float())
    assert "gelu" not in products
    assert (found - expected).abs().max() < 1e-5


def test_dropout_acts_without_gradients_too(products):
    model = model_of(hidden_dropout_prob=0.5).train()
    with torch.no_grad():
        first, second = states(model), states(model)
    assert set(products) == {"none"}
    assert (first - second).abs().max() > 0.1


def test_gradients_and_autocast_go_through_the_modules(products):
    model = model_of()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        states(model)
    states(model)
    assert products == []


class _Doubled(nn.Linear):
    """A layer that does more than its product, as adapters do."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def _subclass(layer):
    layer.__class__ = _Doubled


def _hook(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def _replaced_forward(layer):
    plain = layer.forward
    layer.forward = lambda hidden_states: 2 * plain(hidden_states)


@pytest.mark.parametrize("change", [_subclass, _hook, _replaced_forward])
def test_a_layer_that_does_more_is_called(change):
    layer = nn.Linear(HIDDEN, WIDTH)
    hidden_states = torch.randn(5, HIDDEN)
    with torch.inference_mode():
        before = onednn.linear(layer, hidden_states)
        assert onednn.applies(hidden_states, layer)
        change(layer)
        assert not onednn.applies(hidden_states, layer)
        torch.testing.assert_close(onednn.linear(layer, hidden_states), 2 * before)


def test_strided_and_empty_inputs_are_left_to_torch():
    layer = nn.Linear(HIDDEN, WIDTH)
    with torch.inference_mode():
        assert not onednn.applies(torch.randn(HIDDEN, 5).T, layer)
        assert onednn.linear(layer, torch.empty(0, HIDDEN)).shape == (0, WIDTH)
        strided = nn.Linear(WIDTH, HIDDEN)
        strided.weight = nn.Parameter(torch.randn(WIDTH, HIDDEN).T)
        assert not onednn.applies(torch.randn(5, WIDTH), strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("post_norm", [False, True])
def test_packed_weights_give_the_same_numbers(products, dtype, post_norm):
    model = model_of(qk_post_norm=post_norm).to(dtype)
    with torch.inference_mode():
        expected = states(model)
        asked = products.copy()
        model.pack_weights()
        assert not [module for module in model.encoder.modules() if isinstance(module, nn.Linear)]
        products.clear()
        found = states(model)
    assert products == asked
    torch.testing.assert_close(found, expected)
    assert model.to("cpu", dtype) is model  # as sentence-transformers asks for in every `encode`
    model.pack_weights()  # a second time there is nothing to do


def test_packed_layers_are_called_where_nothing_is_fused():
    """With another activation, and under autocast, whose inputs are float32."""
    model = model_of().bfloat16()
    for layer in model.encoder.layer:
        layer.mlp.act = nn.Tanh()
    with torch.inference_mode():
        expected = states(model)
        model.pack_weights()
        torch.testing.assert_close(states(model), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert (states(model) - expected).abs().max() < 0.1


@pytest.mark.parametrize("use", [states, lambda model: model.double(), lambda model: model.to("meta")])
def test_what_packed_weights_cannot_do_is_an_error(use):
    model = model_of()
    model.pack_weights()
    with pytest.raises(RuntimeError, match=r"packed weights .*: .*unpack_weights\(\) first"):
        use(model)
    model.unpack_weights()
    use(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("post_norm", [False, True])
def test_packed_weights_are_saved_copied_and_unpacked(tmp_path, dtype, post_norm):
    model = model_of(qk_post_norm=post_norm).to(dtype)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        expected = states(model)
    model.pack_weights()
    model.save_pretrained(tmp_path)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model.encoder.layer[0].attention.output.dense))
    assert copied.state_dict().keys() == weights.keys()
    assert type(copied.encoder.layer[0].attention.output.dense) is type(pickled) is onednn.PackedLinear
    assert torch.equal(pickled.unpacked().weight, weights["encoder.layer.0.attention.output.dense.weight"])
    model.unpack_weights()
    loaded = JinaBertModel.from_pretrained(tmp_path, dtype=dtype, add_pooling_layer=False)
    for other in (copied, loaded, model):
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
        with torch.inference_mode():
            torch.testing.assert_close(states(other), expected)
    model(torch.arange(5, 25)[None]).last_hidden_state.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_what_cannot_be_packed_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"do not pay for torch\.float64"):
        onednn.pack(nn.Sequential(nn.Linear(4, 4).double()), gated=())
    model = model_of()
    _hook(model.encoder.layer[1].mlp.wo)
    with pytest.raises(RuntimeError, match="wo is more than a linear layer"):
        model.pack_weights()
    assert type(model.encoder.layer[0].mlp.wo) is nn.Linear


def test_adapters_are_called_and_not_packed():
    """peft's layers are no `nn.Linear`, but have the weight of one."""
    peft = pytest.importorskip("peft")
    model = model_of()
    with torch.inference_mode():
        before = states(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["wo", "dense", "query", "gated_layers"]), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = states(model)
    with torch.inference_mode():
        found = states(model)
    assert (found - expected).abs().max() < 1e-4
    assert (found - before).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="have adapters: merge them"):
        model.pack_weights()


def test_mlp_blocks_of_tokens(monkeypatch):
    model = model_of()
    with torch.inference_mode():
        expected = states(model)
        monkeypatch.setattr(layers, "MLP_BLOCK_BYTES", 2 * WIDTH * 4 * 7)  # 7 tokens
        assert (states(model) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("scores_at_a_time", [2**20, 3000])
@pytest.mark.parametrize("lengths", [[1], [17] * 5, [40, 40, 3, 1, 64], [700], [2500], [2300, 20, 2300]])
def test_attention_by_products_equals_eager(monkeypatch, lengths, scores_at_a_time):
    """bfloat16: batches of sequences, of heads, blocks of queries, windows. Measured against the float64 reference."""
    monkeypatch.setattr(cpu_products, "_SCORES", scores_at_a_time)
    monkeypatch.setattr(cpu_products, "_ROWS", 64)
    heads = 4
    generator = torch.Generator().manual_seed(len(lengths))
    qkv = [torch.randn(sum(lengths), heads, 16, generator=generator).bfloat16() for _ in range(3)]
    slopes = alibi.alibi_slopes(heads)
    options = {"device": torch.device("cpu"), "sparse": True}

    for x in qkv:
        x.requires_grad_()
    upstream = torch.randn(sum(lengths), heads, 16, generator=generator).bfloat16()

    def attend() -> list[torch.Tensor]:
        """The context, and the gradients of query, key and value."""
        sequences = Sequences.of_lengths(slopes, lengths, dtype=torch.bfloat16, **options)
        context, _ = attention.sdpa_attention(*qkv, sequences, scaling=0.25)
        return [context, *torch.autograd.grad(context, qkv, upstream)]

    doubles = [x.detach().double().requires_grad_() for x in qkv]
    exact, _ = attention.eager_attention(
        *doubles, Sequences.of_lengths(slopes, lengths, dtype=torch.float64, **options), scaling=0.25
    )
    exact = [exact, *torch.autograd.grad(exact, doubles, upstream.double())]
    with count_scores() as count:
        found = attend()
    assert (max(lengths) >= 2048) == (count.skipped_share > 0)
    monkeypatch.setattr(cpu_products, "mkl_is_slow", lambda: False)
    fused = attend()
    for one, other, reference in zip(found, fused, exact, strict=True):
        gap = (one.double() - reference).abs()
        assert gap.max() < 0.03 * max(1, reference.abs().max())
        # At most twice the error of the fused kernel.
        assert gap.mean() < 2 * (other.double() - reference).abs().mean() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_shapes_whatever_the_lengths(monkeypatch, dtype):
    """oneDNN keeps memory for every shape: 300 lengths must not be 300 shapes of each product."""
    shapes = set()
    operator, batched = onednn._product, torch.bmm

    class Recorded:
        def __call__(self, states, *arguments):
            shapes.add(("linear", states.shape[0]))
            return operator(states, *arguments)

        def binary(self, states, *arguments):
            shapes.add(("linear", states.shape[0]))
            return operator.binary(states, *arguments)

    def recorded(left, right, **options):
        shapes.add(("bmm", left.shape))
        return batched(left, right, **options)

    monkeypatch.setattr(onednn, "_product", Recorded())
    monkeypatch.setattr(torch, "bmm", recorded)
    model = model_of().to(dtype)
    with torch.inference_mode():
        for length in range(1, 301):
            model(
                torch.full((2, length), 7),
                torch.tensor([[1] * length, [1] * (length // 2 + 1) + [0] * (length - length // 2 - 1)]),
            )
    on_grid = {onednn.on_grid(rows) for rows in range(1, 601)}
    assert len(on_grid) == 67
    assert {rows for kind, rows in shapes if kind == "linear"} <= on_grid
    of_attention = [shape for kind, shape in shapes if kind == "bmm"]
    assert len(of_attention) <= 3 * len(on_grid)
    assert bool(of_attention) == (dtype == torch.bfloat16)
