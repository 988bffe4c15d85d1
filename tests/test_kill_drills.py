"""Trainings that are killed, in processes of their own, and go on: the weights are those of one that was not.

Laws: what a step computed, what workers fetched ahead and what a checkpoint half wrote is lost without a trace; the
resumed run is the undisturbed one bit for bit, dropout included.
"""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from contrastive_runs import RECIPES, losses, overrides, start_folder, weights  # noqa: F401
from contrastive_runs import recipe as pair_recipe
from mlm_runs import OVERRIDES, WORKERS, assert_same_weights, log, recipe, undisturbed_run  # noqa: F401

from training import contrastive, mlm
from training.run import checkpoints, is_whole


def run_killed(arguments: list[str], folder: Path):
    """Runs a program that kills itself."""
    with open(folder / "stderr", "w") as errors:  # a pipe would stay open until the orphaned workers notice
        process = subprocess.run(
            [sys.executable, "-c", *arguments], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=errors, timeout=500
        )
    assert process.returncode == -signal.SIGKILL, (folder / "stderr").read_text()[-2000:]


WHILE_SAVING = """
import os, signal, sys
import torch
from training import mlm
from training.recipe import MLMRecipe, load_recipe

output, *overrides = sys.argv[1:]
save = torch.save

def killed_while_saving(content, path, **kwargs):
    save(content, path, **kwargs)
    if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed_while_saving
torch.set_num_threads(1)
mlm.train(load_recipe(MLMRecipe, "training/recipes/tiny-mlm.yaml", [f"output_dir={output}", *overrides]))
"""


def test_killed_while_saving_it_resumes_from_the_checkpoint_before(run, tmp_path, caplog):
    run_killed([WHILE_SAVING, str(tmp_path), *OVERRIDES, *WORKERS], tmp_path)
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    assert [is_whole(path) for path in checkpoints(str(tmp_path))] == [False, True]
    with caplog.at_level("INFO"):
        final = mlm.train(recipe(tmp_path, *WORKERS), resume=True)
    assert "checkpoint-4 is not whole" in caplog.text
    assert f"resuming from {tmp_path / 'checkpoint-2'}" in caplog.text
    assert "again" not in caplog.text  # the position of the data was in the checkpoint
    assert_same_weights(run / "final", final)
    assert_same_weights(run / "checkpoint-4", tmp_path / "checkpoint-4")
    again, whole = (
        [(entry["step"], entry["loss"], entry["tokens"]) for entry in log(folder) if "loss" in entry]
        for folder in (tmp_path, run)
    )
    assert again[-4:] == whole[2:]


IN_A_STEP = """
import os, runpy, signal, sys
import torch
from training.monitor import MonitoredTrainer

batch, module = int(sys.argv[1]), sys.argv[2]
training_step, done = MonitoredTrainer.training_step, 0

def killed_after_a_batch(self, *args, **kwargs):
    global done
    loss, done = training_step(self, *args, **kwargs), done + 1
    if done == batch:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss

MonitoredTrainer.training_step = killed_after_a_batch
torch.set_num_threads(1)
del sys.argv[1:3]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
DRAWN = [random.Random(seed).randint(7, 18) for seed in range(3)]
"""Batches of 18, three a step; the first checkpoint is written after the sixth."""


@pytest.mark.parametrize("batch", [DRAWN[0], *(pytest.param(batch, marks=pytest.mark.slow) for batch in DRAWN[1:])])
def test_stage_one_killed_in_any_step(run, tmp_path, batch):
    config = ["--config", str(RECIPES / "tiny-mlm.yaml"), f"output_dir={tmp_path}"]
    run_killed([IN_A_STEP, str(batch), "training.mlm", *config, *OVERRIDES, *WORKERS], tmp_path)
    assert {path.name: is_whole(path) for path in checkpoints(str(tmp_path))} == {
        f"checkpoint-{step}": True for step in (2, 4) if 3 * step < batch
    }
    final = mlm.train(recipe(tmp_path, *WORKERS), resume=True)
    assert_same_weights(run / "final", final)
    steps = {entry["step"]: (entry["loss"], entry["tokens"]) for entry in log(tmp_path) if "loss" in entry}
    assert steps == {entry["step"]: (entry["loss"], entry["tokens"]) for entry in log(run) if "loss" in entry}


@pytest.mark.parametrize(
    ("stage", "seed"),
    [("hard-negatives", 0), *(pytest.param(s, 1, marks=pytest.mark.slow) for s in ("pairs", "hard-negatives"))],
)
def test_stages_two_and_three_killed_in_any_step(start, tmp_path, stage, seed):
    """Two batches a step, the first checkpoint after the sixth; one more is fetched ahead by a worker."""
    changes = ["training.gradient_accumulation_steps=2", "training.dataloader_num_workers=1"]
    changes += ["num_negatives=3", "mini_batch_tokens=100"] if "hard" in stage else []
    batch = random.Random(f"{stage} {seed}").randint(7, 12)
    whole = contrastive.train(pair_recipe(stage, start, tmp_path / "whole", *changes))
    config = ["--config", str(RECIPES / f"tiny-{stage}.yaml")]
    module = f"training.{stage.replace('-', '_')}"
    killed = overrides(stage, start, tmp_path / "killed", *changes)
    run_killed([IN_A_STEP, str(batch), module, *config, *killed], tmp_path)
    assert [path.name for path in checkpoints(str(tmp_path / "killed"))] == ["checkpoint-3"]
    final = contrastive.train(pair_recipe(stage, start, tmp_path / "killed", *changes), resume=True)
    assert_same_weights(whole, final)
    assert weights(whole)["encoder.layer.0.mlp.wo.weight"].ne(weights(start)["encoder.layer.0.mlp.wo.weight"]).any()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
