"""A training process on the CPU does not grow by what it has freed."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from training.heap import TRIM_STEPS, HeapTrimmer, trim_heap


def resident() -> int:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the heap of glibc")
def test_freed_blocks_between_live_ones_go_back_to_the_system(tmp_path):
    if not trim_heap():
        pytest.skip("a C library without malloc_trim")
    callback, arguments = HeapTrimmer(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    blocks, live = [], []
    for _ in range(2000):
        blocks.append(torch.ones(25_000))  # below the least size that glibc keeps out of its heap
        live.append(torch.ones(64))
    held = resident()
    blocks.clear()
    callback.on_step_end(arguments, TrainerState(global_step=TRIM_STEPS + 1), TrainerControl())
    assert resident() > held - 20, "freeing alone gives it back: nothing is shown here"
    callback.on_step_end(arguments, TrainerState(global_step=TRIM_STEPS), TrainerControl())
    assert resident() < held - 120
    assert len(live) == 2000
