"""The systems that are compared: what they are called, where they run, how long a text they are tried at.

Law: a system is either measured or listed with the reason why not. This file imports nothing heavy: the command and
every worker read it.
"""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from .machine import has_native_bf16
from .workloads import Shape

OURS_LONGEST = 131072
INSTALL = "pip install -e '.[benchmarks]'"


@dataclass(frozen=True)
class System:
    """What can be measured.

    Attributes:
        kind: "ours", "bert", "dense", "ceiling", "onnxruntime", "openvino" or "self-check".
        dtype: "fp32", "bf16", "int8", or "device" for what the runtime chooses.
        longest: Tokens a sequence up to which it is tried.
        description: One line for the log.
        device: "cpu", "cuda" or "any".
        packages: Modules that it needs beside torch and transformers.
        options: Of the loader of its kind.
    """

    kind: str
    dtype: str
    longest: int
    description: str
    device: str = "any"
    packages: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_graph(self) -> bool:
        """Whether it runs our ONNX export."""
        return self.kind in ("onnxruntime", "openvino")


_GRAPH = ("onnx", "onnxscript", "onnxruntime")  # building needs them whatever runs it
_OPENVINO = (*_GRAPH, "openvino")
_TRACED = "traced from torch, attention with a dense bias"
_PUBLISHED = "what hub_repo.export writes, attention block by block"

SYSTEMS: dict[str, System] = {
    "ours-sdpa-fp32": System("ours", "fp32", OURS_LONGEST, "this package, its default"),
    "ours-sdpa-fp32-all-scores": System(
        "ours", "fp32", OURS_LONGEST, "sparse_attention=False", device="cpu", options={"sparse": False}
    ),
    "ours-sdpa-fp32-compiled": System(
        "ours", "fp32", OURS_LONGEST, "torch.compile of the encoder, dynamic", options={"compiled": True}
    ),
    "ours-sdpa-fp32-packed": System(
        "ours", "fp32", OURS_LONGEST, "after pack_weights()", device="cpu", options={"packed": True}
    ),
    "ours-eager-fp32": System("ours", "fp32", 2048, "every score in memory", options={"attention": "eager"}),
    "ours-sdpa-bf16": System("ours", "bf16", OURS_LONGEST, "bfloat16 weights and activations"),
    "ours-sdpa-bf16-all-scores": System(
        "ours", "bf16", OURS_LONGEST, "the same, sparse_attention=False", device="cpu", options={"sparse": False}
    ),
    "ours-sdpa-bf16-compiled": System(
        "ours", "bf16", OURS_LONGEST, "the same, torch.compile of the encoder, dynamic", options={"compiled": True}
    ),
    "ours-sdpa-bf16-packed": System(
        "ours", "bf16", OURS_LONGEST, "the same, after pack_weights()", device="cpu", options={"packed": True}
    ),
    "ours-eager-bf16": System("ours", "bf16", 2048, "every score in memory", options={"attention": "eager"}),
    "ours-flex-bf16": System(
        "ours", "bf16", OURS_LONGEST, "flex_attention", device="cuda", options={"attention": "flex_attention"}
    ),
    "ours-flash2-bf16": System(
        "ours",
        "bf16",
        OURS_LONGEST,
        "flash_attention_2",
        device="cuda",
        packages=("flash_attn",),
        options={"attention": "flash_attention_2"},
    ),
    "onnxruntime-fp32": System("onnxruntime", "fp32", 8192, _TRACED, device="cpu", packages=_GRAPH),
    "onnxruntime-int8": System(
        "onnxruntime",
        "int8",
        8192,
        f"{_TRACED}, weights quantised, activations dynamically",
        device="cpu",
        packages=_GRAPH,
        options={"quantized": True},
    ),
    "onnxruntime-export-fp32": System(
        "onnxruntime", "fp32", 32768, _PUBLISHED, device="cpu", packages=_GRAPH, options={"published": True}
    ),
    "onnxruntime-export-int8": System(
        "onnxruntime",
        "int8",
        32768,
        f"{_PUBLISHED}, its int8 form",
        device="cpu",
        packages=_GRAPH,
        options={"published": True, "quantized": True},
    ),
    "openvino": System(
        "openvino", "device", 8192, f"{_TRACED}, precision of the device", device="cpu", packages=_OPENVINO
    ),
    "openvino-fp32": System(
        "openvino",
        "fp32",
        8192,
        f"{_TRACED}, precision f32",
        device="cpu",
        packages=_OPENVINO,
        options={"precision": "f32"},
    ),
    "openvino-export": System(
        "openvino",
        "device",
        32768,
        f"{_PUBLISHED}, precision of the device",
        device="cpu",
        packages=_OPENVINO,
        options={"published": True},
    ),
    "openvino-export-fp32": System(
        "openvino",
        "fp32",
        32768,
        f"{_PUBLISHED}, precision f32",
        device="cpu",
        packages=_OPENVINO,
        options={"published": True, "precision": "f32"},
    ),
    "bert-fp32": System("bert", "fp32", 512, "transformers' BertModel, sdpa; its MLP has no gate: fewer operations"),
    "dense-pytorch-fp32": System("dense", "fp32", 8192, "the official computation: dense bias, all scores, padding"),
    "dense-sdpa-fp32": System(
        "dense", "fp32", 8192, "the official computation with torch's sdpa under a dense mask", options={"fused": True}
    ),
    "gemm-ceiling-fp32": System("ceiling", "fp32", OURS_LONGEST, "matrix products of the linear layers alone"),
    "gemm-ceiling-bf16": System("ceiling", "bf16", OURS_LONGEST, "matrix products of the linear layers alone"),
}
"""Name -> system, in the order of the tables."""

SELF_CHECK = "self-check"
HIDDEN: dict[str, System] = {
    SELF_CHECK: System("self-check", "-", OURS_LONGEST, "touches 64 MiB a call; checks the measurement of memory")
}
"""Measured only when named."""


class SelfCheck:
    """Touches `BYTES` in every call, prints as libraries do, and computes nothing."""

    BYTES = 64 * 2**20

    def prepare(self, lengths) -> dict[str, Any]:
        """One call; nothing is reported."""
        self.call()
        return {}

    def call(self) -> None:
        """Writes every page of a new block of memory, which ends with the call."""
        print("a line on the standard output")
        block = bytearray(self.BYTES)
        block[::1024] = b"x" * (self.BYTES // 1024)


def select(names: list[str] | None, device: str) -> dict[str, System]:
    """The systems of a run, in the order of the tables.

    Args:
        names: What the command line names; None for all of the device.
        device: "cpu" or "cuda".

    Raises:
        ValueError: A name that does not exist, or a system of the other device.
    """
    known = SYSTEMS | HIDDEN
    if names is None:
        return {name: system for name, system in SYSTEMS.items() if system.device in ("any", device)}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown system {name!r}: one of {', '.join(known)}.")
        if known[name].device not in ("any", device):
            raise ValueError(f"{name} runs on {known[name].device} only, and --device is {device}.")
    return {name: system for name, system in known.items() if name in names}


def missing(system: System, device: str) -> tuple[str, str] | None:
    """Why a system cannot run on this machine.

    Returns:
        Status and reason, or None if nothing is known to be missing.
    """
    absent = [package for package in system.packages if importlib.util.find_spec(package) is None]
    if "flash_attn" in absent:
        return "not installed", "not installed: pip install flash-attn"
    if absent:
        return "not installed", f"{', '.join(absent)} not installed: {INSTALL}"
    if system.kind == "ceiling" and system.dtype == "bf16" and device == "cpu" and not has_native_bf16():
        return "not available", "this processor has no bf16 products (avx512_bf16, amx_bf16)"
    return None


def load(system: System, shape: Shape, *, device: str, threads: int, graph: str | None):
    """Loads a system in the process that calls this.

    Args:
        system: Of `SYSTEMS` or `HIDDEN`.
        shape: Of the model.
        device: "cpu" or "cuda".
        threads: Of the computation on the CPU.
        graph: Folder of the ONNX export, where the system needs one.

    Returns:
        An object with `prepare(lengths)`, which computes once and returns what is to be reported, and `call()`.
    """
    if system.kind == "self-check":
        return SelfCheck()
    if system.needs_graph:
        from pathlib import Path

        from . import graph_systems

        return graph_systems.load(system.kind, Path(graph or ""), threads=threads, options=system.options)
    import torch

    from . import torch_systems

    torch.set_num_threads(threads)
    return torch_systems.load(system.kind, shape, dtype=system.dtype, device=device, options=system.options)
