"""Gives memory that was freed back to the system: without it a training process on the CPU grows with every step.

Measured (stage I, 512 tokens, batches of differing lengths): 25 MB a step, 13.8 GB after 560 steps, then killed by the
system; no tensor was alive that should not be. glibc keeps freed blocks of up to 32 MiB in its heap, and between live
ones of other sizes they are not used again. `malloc_trim` gives back whole free pages wherever they lie.
"""

import ctypes
import sys

from transformers import TrainerCallback

TRIM_STEPS = 20
"""Steps between two trims: each takes about 0.2 s."""


def trim_heap() -> bool:
    """Gives the free pages of the heap back; False where the C library cannot (only glibc can)."""
    if sys.platform != "linux":
        return False
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is None:  # musl
        return False
    malloc_trim(0)
    return True


class HeapTrimmer(TrainerCallback):
    """Calls `trim_heap` every `TRIM_STEPS` steps of a training on the CPU; elsewhere tensors are not in the heap."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cpu" and state.global_step % TRIM_STEPS == 0:
            trim_heap()
