"""One system in a process of its own: answers requests in JSON lines, times calls, measures their memory.

    python -m benchmarks.worker

Law: one request, one answer, in order, on the standard output as it was when the process began; what libraries print
goes to the standard error. An exception is an answer; only a crash ends the process, or the end of its input.

Peak memory is the growth of the peak resident set during a call above the resident set after loading (loading includes
a first small call, so that threads, kernels and a compiled model exist). It is that of a running service: what a
runtime keeps between calls counts. On CUDA it is the growth of the memory that torch has allocated. Where there is no
/proc, it is not measured.
"""

import ctypes
import gc
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

LOADING_LENGTHS = (16, 16)
"""Sequences of the small call that belongs to loading."""
MEMORY_SHARE = 0.9
"""Of the memory that is available before the first call at a length, what a worker on the CPU may take on top."""
OUT_OF_MEMORY = re.compile(
    r"out of memory|bad_?alloc|(allocate|allocating) memory|failed to allocate|MemoryError|Cannot allocate", re.I
)


def status_of(message: str) -> str:
    """ "out of memory" or "failed", from what an exception or a log says.

    Example:
        >>> status_of("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
        'out of memory'
    """
    return "out of memory" if OUT_OF_MEMORY.search(message) else "failed"


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status, for example VmHWM, the peak resident set."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _reset_peak() -> bool:
    """Sets VmHWM to the present resident set; False where the kernel does not offer it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _others_cpu() -> float | None:
    """CPU seconds that other processes, and other guests of the host, have used since the start; None if unknown."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _give_back_memory():
    """Frees what Python, torch on CUDA and the C library keep of former calls."""
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass


def _limit_memory():
    """Makes an allocation beyond what is available an error of this process, and not a crash of another one."""
    from .machine import memory_bytes

    available, data = memory_bytes("MemAvailable"), _status_bytes("VmData")
    if available is None or data is None:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = data + int(MEMORY_SHARE * available)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


class Worker:
    """What the requests do. The names of the methods are those of the requests."""

    def __init__(self):
        self.system: Any = None
        self.device = "cpu"
        self.loaded_bytes: int | None = None

    def load(self, system: str, shape: str, device: str, threads: int, graph: str | None) -> dict[str, Any]:
        """Loads the system, calls it once, and notes what is resident afterwards.

        Returns:
            `loaded_bytes`, None where it cannot be measured, and what the system says about itself.
        """
        from .systems import HIDDEN, SYSTEMS, load
        from .workloads import SHAPES

        self.device = device
        self.system = load((SYSTEMS | HIDDEN)[system], SHAPES[shape], device=device, threads=threads, graph=graph)
        self.system.prepare(LOADING_LENGTHS)
        _give_back_memory()
        about: dict[str, Any] = {}
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
            about = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        self.loaded_bytes = self._resident_bytes()
        return {"loaded_bytes": self.loaded_bytes, **about, **getattr(self.system, "info", {})}

    def prepare(self, lengths: list[int]) -> dict[str, Any]:
        """Takes the batch of a length and computes it once.

        Returns:
            What the system reports about it, and `kept_bytes`.
        """
        _give_back_memory()
        if self.device == "cpu":
            _limit_memory()
        return {**self.system.prepare(lengths), "kept_bytes": self._kept_bytes()}

    def settle(self) -> dict[str, Any]:
        """Gives back what it can; `kept_bytes` is what is still in memory above what was after loading."""
        _give_back_memory()
        return {"kept_bytes": self._kept_bytes()}

    def _resident_bytes(self) -> int | None:
        if self.device == "cuda":
            import torch

            return torch.cuda.memory_allocated()
        return _status_bytes("VmRSS")

    def _kept_bytes(self) -> int:
        resident = self._resident_bytes()
        return 0 if resident is None or self.loaded_bytes is None else max(0, resident - self.loaded_bytes)

    def call(self) -> dict[str, Any]:
        """One timed call.

        Returns:
            `seconds`; `peak_bytes` above what is resident after loading; `others_cpu_seconds`, what other processes
            computed meanwhile, give or take 20 ms; `kept_bytes`. None for what is not measured.
        """
        if self.device == "cuda":
            return self._call_on_cuda()
        measured, others = _reset_peak(), _others_cpu()
        start = time.perf_counter()
        output = self.system.call()
        seconds = time.perf_counter() - start
        peak = _status_bytes("VmHWM") if measured else None
        del output
        return {
            "seconds": seconds,
            "peak_bytes": None if peak is None else max(0, peak - self.loaded_bytes),
            "others_cpu_seconds": None if others is None else _others_cpu() - others,
            "kept_bytes": self._kept_bytes(),
        }

    def _call_on_cuda(self) -> dict[str, Any]:
        import torch

        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = self.system.call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        del output
        peak = torch.cuda.max_memory_allocated() - self.loaded_bytes
        return {"seconds": seconds, "peak_bytes": max(0, peak), "others_cpu_seconds": None, "kept_bytes": 0}


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"status": "ok", **getattr(worker, request.pop("request"))(**request)}
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    # Outside of the handler, where the traceback no longer holds the tensors of the failed call.
    _give_back_memory()
    return {"status": status_of(message), "message": message.strip()[:2000]}


def main():
    """Answers until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out after all, this process is ended
    except OSError:
        pass
    worker = Worker()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(worker, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
