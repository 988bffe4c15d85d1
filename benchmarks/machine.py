"""What the figures were measured on: processor, instruction sets, memory, versions, commit.

Law: nothing is guessed; what a system does not tell is null. Linux tells everything, others less.
"""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

INSTRUCTION_SETS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
"""Flags of /proc/cpuinfo that decide which matrix kernels a library can take."""
BF16_SETS = ("avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "transformers", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "flash-attn")
_REPOSITORY = Path(__file__).parent.parent


def _cpuinfo() -> list[dict[str, str]]:
    """One dictionary a processor of /proc/cpuinfo; none where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return []
    blocks = path.read_text().strip().split("\n\n")
    pairs = [[line.partition(":") for line in block.splitlines()] for block in blocks]
    return [{name.strip(): value.strip() for name, _, value in block} for block in pairs]


def instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that the processor has."""
    processors = _cpuinfo()
    flags = set(processors[0].get("flags", "").split()) if processors else set()
    return [name for name in INSTRUCTION_SETS if name in flags]


def has_native_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; otherwise it is emulated and slower than float32."""
    return any(name in BF16_SETS for name in instruction_sets())


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = {(p["physical id"], p["core id"]) for p in _cpuinfo() if "core id" in p and "physical id" in p}
    return min(usable, len(cores)) if cores else usable


def memory_bytes(field: str) -> int | None:
    """A field of /proc/meminfo, for example "MemTotal" or "MemAvailable"."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _git(*arguments: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", "-C", _REPOSITORY, *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the figures; None for one that is not installed."""
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


def describe_machine() -> dict[str, Any]:
    """JSON values about processor, memory, versions and the commit of this repository."""
    processors = _cpuinfo()
    model = processors[0].get("model name") if processors else platform.processor()
    changes = _git("status", "--porcelain", "--", "modeling_jina_bert", "benchmarks")
    return {
        "cpu": model or None,
        "instruction_sets": instruction_sets(),
        "logical_cores": os.cpu_count(),
        "physical_cores": physical_cores(),
        "memory_bytes": memory_bytes("MemTotal"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": describe_versions(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": changes.splitlines() if changes is not None else None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
