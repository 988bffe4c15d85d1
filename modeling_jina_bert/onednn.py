"""Linear layers of inference on the CPU as single oneDNN products: bias, activation, gate and residual in one pass.

Law: the numbers of the layers one after the other, to rounding; what is summed is summed in float32. What is not asked
of oneDNN here (gradients, autocast, compiling, tracing, and layers that are not a plain `nn.Linear`: adapters, hooks,
quantised weights) goes through the modules themselves.

Why: torch multiplies float32 matrices with MKL, which takes its slow kernels on a processor that is not Intel's;
oneDNN, which torch brings along, takes the widest there are. In bfloat16 torch takes oneDNN itself, and what is saved
are the passes over the intermediates.

TRAP: the operator wants contiguous operands; for a strided one it takes a reference loop, hundreds of times slower.
"""

import functools
import platform
from typing import Any

import torch
from torch import nn

_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
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


def _is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling the layer is nothing but its product, its activation, or, of dropout, nothing at all."""
    if "forward" in vars(layer) or any(getattr(layer, name) for name in _HOOKS):  # accelerate replaces `forward`
        return False
    if isinstance(layer, nn.Linear):
        weight = layer.weight
        return (
            type(layer) is nn.Linear
            and type(weight) is nn.Parameter
            and weight.is_contiguous()
            and weight.dtype == dtype
        )
    return not isinstance(layer, nn.Dropout) or (type(layer) is nn.Dropout and not layer.training)


def applies(hidden_states: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether the functions below compute these layers on these inputs; otherwise call the layers.

    Args:
        hidden_states: Of the first of the layers.
        layers: Products, and the activations and dropouts between them, which are not called either.
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
    )


def linear(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """``layer(hidden_states)``, `(..., in)` -> `(..., out)`, through oneDNN where that pays."""
    if not applies(hidden_states, layer):
        return layer(hidden_states)
    return _product(hidden_states, layer.weight, layer.bias, "none", [], "")


def linear_plus(layer: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``layer(hidden_states) + residual``, `(..., in)` and `(..., out)`; see `applies`."""
    return _product.binary(hidden_states, residual.contiguous(), layer.weight, layer.bias, "add")


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
    halves = layer.weight.chunk(2)  # type: ignore[operator]
    gate, factor = halves if gate_first else halves[::-1]
    activated = _product(hidden_states, gate, None, activation, [], "none")
    return _product.binary(hidden_states, activated, factor, None, "mul")
