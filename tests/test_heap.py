"""A training process on the CPU keeps what a step has freed for the next one, and does not grow by it."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from training.heap import trim_heap

PROGRAM = """
import json
from pathlib import Path
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from training.heap import TRIM_STEPS, HeapTrimmer

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

callback, arguments = HeapTrimmer(), TrainingArguments(output_dir="unused", use_cpu=True)
blocks, live = [], []
for _ in range(4000):
    blocks.append(torch.ones(25_000))  # below the least size that glibc keeps out of its heap
    live.append(torch.ones(64))
found = [resident()]
blocks.clear()
for step in (TRIM_STEPS + 1, TRIM_STEPS):
    callback.on_step_end(arguments, TrainerState(global_step=step), TrainerControl())
    found.append(resident())
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the heap of glibc")
def test_freed_blocks_between_live_ones_go_back_to_the_system(tmp_path):
    """In a process of its own: in this one, the heap is full of the holes that other tests left."""
    if not trim_heap():
        pytest.skip("a C library without malloc_trim")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300
    )
    held, freed, trimmed = json.loads(run.stdout.splitlines()[-1])
    assert freed > held - 40, "freeing alone gives it back: nothing is shown here"
    assert trimmed < held - 250


KEPT = """
import json, resource
import torch
from training.heap import keep_freed_memory

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(2**24).add_(1)  # 64 MiB, more than glibc ever keeps in its heap by itself
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds

faults(2)
before = faults(5)
able = keep_freed_memory()
faults(3)
print(json.dumps([able, before, faults(5)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the heap of glibc")
def test_large_blocks_are_not_asked_for_anew():
    run = subprocess.run(
        [sys.executable, "-c", KEPT], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300
    )
    able, before, after = json.loads(run.stdout.splitlines()[-1])
    if not able:
        pytest.skip("a C library without mallopt")
    assert before > 4 * (after + 1)  # one growth of the heap among the five rounds is allowed
