"""Linear layers of inference on the CPU as single oneDNN products: bias, activation, gate and residual in one pass.

Law: the numbers of the layers one after the other, to rounding; what is summed is summed in float32. What is not asked
of oneDNN here (gradients, autocast, compiling, tracing, and layers that are not a plain `nn.Linear`: adapters, hooks,
quantised weights) goes through the modules themselves.

Why: torch multiplies float32 matrices with MKL, which takes its slow kernels on a processor that is not Intel's;
oneDNN, which torch brings along, takes the widest there are. In bfloat16 torch takes oneDNN itself, and what is saved
are the passes over the intermediates.

TRAP: the operator wants contiguous operands; for a strided one it takes a reference loop, hundreds of times slower.

Weights may be packed (`PackedLinear`): in the order that oneDNN reads them in, and would otherwise bring them into for
every product. That is half of the time of a product of a dozen rows, and a fiftieth of one of thousands.
"""

import functools
import platform
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import nn

_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACKED_FOR_ROWS = 16
"""Rows that weights are packed for: the order is the same for every number of them but one."""
_PACKED, _UNPACK = "A model with packed weights", "unpack_weights() first"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@functools.cache
def mkl_is_slow() -> bool:
    """Whether MKL, torch's library of float32 products, takes its slow kernels on this processor: those of AMD."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.mkl.is_available() and "AMD" in str(capabilities.get("cpu_name", ""))


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the processor has products of bfloat16 (AVX512-BF16 or AMX)."""
    return any(_has(f"_is_{name}_supported", torch.cpu) for name in ("avx512_bf16", "amx_tile"))


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor, of whatever make, has products of this half precision; True where torch cannot tell.

    TRAP: of x86 torch's own answer for bfloat16 is that of AVX512, which came before them.
    """
    if dtype == torch.bfloat16 and platform.machine() in ("x86_64", "AMD64"):
        return multiplies_bf16()
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return _has(f"_is_mkldnn_{name}_supported", torch.ops.mkldnn, unknown=True)


def _has(name: str, module: Any, *, unknown: bool = False) -> bool:
    supported = getattr(module, name, None)
    return unknown if supported is None else bool(supported())


def on_grid(rows: int) -> int:
    """The next of a few numbers of rows, at most a sixteenth (or 3) above: oneDNN keeps 0.5 MB for every shape.

    Example:
        >>> [on_grid(rows) for rows in (0, 10, 16, 100, 257, 1000, 4000)]
        [0, 12, 16, 100, 272, 1024, 4096]
    """
    step = max(4, 2 ** ((rows - 1).bit_length() - 5)) if rows else 1
    return -(-rows // step) * step


def _pays(dtype: torch.dtype) -> bool:
    if _product is None or not torch.backends.mkldnn.is_available():
        return False
    return (dtype == torch.float32 and mkl_is_slow()) or (dtype == torch.bfloat16 and multiplies_bf16())


class PackedLinear(nn.Module):
    """A linear layer for inference on the CPU alone: its weight is packed, and is no parameter.

    Saving and copying it are as before. Gradients, and another dtype or device, are a RuntimeError.

    Args:
        layer: Of a dtype that oneDNN multiplies here.
        parts: The number of layers, one above the other, that the weight is packed as: 2 for a gated one.

    Attributes:
        weights: Packed, of `parts` equal parts of the outputs.
        dtype: Of weights and products.
    """

    bias: torch.Tensor | None

    def __init__(self, layer: nn.Linear, parts: int = 1):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype, self.training = layer.weight.dtype, layer.training
        pack = functools.partial(torch.ops.mkldnn._reorder_linear_weight, batch_size=_PACKED_FOR_ROWS)
        self.weights = [pack(part.detach().contiguous()) for part in layer.weight.chunk(parts)]
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., in)` of any dtype and layout -> `(..., out)`.

        Raises:
            RuntimeError: Gradients are asked for.
        """
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise RuntimeError(f"{_PACKED} has no gradients: call it under torch.inference_mode(), or {_UNPACK}.")
        rows = hidden_states.to(self.dtype).contiguous()
        biases = [None] * len(self.weights) if self.bias is None else self.bias.chunk(len(self.weights))
        parts = zip(self.weights, biases, strict=True)
        return torch.cat([_product(rows, weight, bias, "none", [], "") for weight, bias in parts], dim=-1)

    def unpacked(self) -> nn.Linear:
        """The layer as it was."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.cat([weight.to_dense() for weight in self.weights]))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias)
        return layer.train(self.training)

    def _apply(self, fn, recurse=True):
        """Of `to`, `float` and so on, which packed weights cannot follow."""
        asked = fn(torch.empty(0, dtype=self.dtype))
        if (asked.dtype, asked.device.type) != (self.dtype, "cpu"):
            raise RuntimeError(f"{_PACKED} cannot be cast to {asked.dtype} or moved to {asked.device}: {_UNPACK}.")
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.unpacked().weight.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __reduce_ex__(self, protocol):
        return PackedLinear, (self.unpacked(), len(self.weights))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"


def pack(layers: nn.Module, *, gated: Container[str]):
    """Puts `PackedLinear` in place of the linear layers of a module.

    Args:
        layers: The module.
        gated: Names of the layers whose output is a gate and what it gates.

    Raises:
        RuntimeError: A layer that is not plain (adapters, hooks, another type of weight), or of a dtype or on a device
            that oneDNN does not multiply here; none is replaced then.
    """
    if any(hasattr(module, "base_layer") for module in layers.modules()):
        raise RuntimeError("The layers have adapters: merge them before their weights are packed.")
    found = [(parent, name, layer) for parent, name, layer in _children(layers) if isinstance(layer, nn.Linear)]
    for _, name, layer in found:
        weight = layer.weight
        if weight.device.type != "cpu" or not _pays(weight.dtype):
            raise RuntimeError(
                f"Packed weights do not pay for {weight.dtype} on {weight.device}: they are for bfloat16 on CPUs that "
                "multiply it (AVX512-BF16, AMX), and for float32 on those of AMD."
            )
        if not _is_plain(layer, weight.dtype):
            raise RuntimeError(f"{name} is more than a linear layer ({type(layer).__name__}).")
    for parent, name, layer in found:
        setattr(parent, name, PackedLinear(layer, 2 if name in gated else 1))


def unpack(layers: nn.Module):
    """Puts linear layers in place of every `PackedLinear` of a module."""
    for parent, name, layer in _children(layers):
        if isinstance(layer, PackedLinear):
            setattr(parent, name, layer.unpacked())


def _children(layers: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of every module inside."""
    return [(parent, *child) for parent in layers.modules() for child in parent.named_children()]


def _is_untouched(module: nn.Module) -> bool:
    """Whether calling the module is nothing but its class's forward; accelerate's hooks replace that."""
    return "forward" not in vars(module) and not any(getattr(module, name) for name in _HOOKS)


def _is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling the layer is nothing but its product."""
    if not _is_untouched(layer):
        return False
    if type(layer) is PackedLinear:
        return layer.dtype == dtype
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_contiguous()
        and layer.weight.dtype == dtype
    )


def _is_off(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Dropout and not dropout.training and _is_untouched(dropout)


def applies(
    hidden_states: torch.Tensor, *layers: nn.Module, dropout: nn.Module | None = None, act: nn.Module | None = None
) -> bool:
    """Whether the functions below compute these layers on these inputs; otherwise call the layers.

    Args:
        hidden_states: Of the first of the layers.
        layers: Products.
        dropout: What stands between or behind them and is not called either.
        act: The activation that is computed with a product, of a class that oneDNN knows.
    """
    return (
        hidden_states.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and type(hidden_states) is torch.Tensor
        and hidden_states.is_contiguous()
        and hidden_states.numel() > 0
        and _pays(hidden_states.dtype)
        and all(_is_plain(layer, hidden_states.dtype) for layer in layers)
        and (dropout is None or _is_off(dropout))
        and (act is None or _is_untouched(act))
    )


def linear(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """``layer(hidden_states)``, `(..., in)` -> `(..., out)`, through oneDNN where that pays."""
    if not applies(hidden_states, layer) or (isinstance(layer, PackedLinear) and len(layer.weights) > 1):
        return layer(hidden_states)
    return _product(hidden_states, *_weights(layer), layer.bias, "none", [], "")


def _weights(layer: nn.Module, parts: int = 1) -> Sequence[torch.Tensor]:
    return layer.weights if isinstance(layer, PackedLinear) else layer.weight.chunk(parts)  # type: ignore[operator]


def linear_plus(layer: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``layer(hidden_states) + residual``, `(..., in)` and `(..., out)`; see `applies`."""
    return _product.binary(hidden_states, residual.contiguous(), *_weights(layer), layer.bias, "add")


def gated(layer: nn.Module, hidden_states: torch.Tensor, *, activation: str, gate_first: bool) -> torch.Tensor:
    """``activation(gate) * factor`` of a layer without bias whose output is both, a half each; see `applies`.

    Args:
        layer: `nn.Linear`, `(in, 2 x width)`.
        hidden_states: `(..., in)`.
        activation: "gelu" (exact, by erf) or "relu".
        gate_first: Whether the first half is the gate.

    Returns:
        `(..., width)`.
    """
    halves = _weights(layer, 2)
    gate, factor = halves if gate_first else halves[::-1]
    activated = _product(hidden_states, gate, None, activation, [], "none")
    return _product.binary(hidden_states, activated, factor, None, "mul")
