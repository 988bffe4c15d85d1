"""What the three stages share around a Trainer: the log, the recipe beside checkpoints, resuming."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .recipe import RecipeError, save_recipe


class RunRecorder(TrainerCallback):
    """Appends every log entry to `log.jsonl` and writes `recipe.yaml` beside every checkpoint.

    Entries carry `step`, `seconds` since this process started training, and what the Trainer logged.
    """

    def __init__(self, recipe: Any):
        self.recipe = recipe
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        save_recipe(self.recipe, args.output_dir)
        self.started = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            entry = {"step": state.global_step, "seconds": round(time.monotonic() - self.started, 1), **(logs or {})}
            with open(Path(args.output_dir) / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def on_save(self, args, state, control, **kwargs):
        save_recipe(self.recipe, Path(args.output_dir) / f"checkpoint-{state.global_step}")


def resume_checkpoint(output_dir: str, resume: bool | str | None) -> str | None:
    """The checkpoint to resume from.

    Args:
        output_dir: Folder of the run.
        resume: None starts anew, True takes the last checkpoint of `output_dir`, a string names one.

    Raises:
        RecipeError: There is none; or a new run would write into the checkpoints of an old one.
    """
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if resume is None:
        if last is not None:
            raise RecipeError(f"{last} exists: pass --resume to go on from it, or another output_dir.")
        return None
    if resume is True:
        if last is None:
            raise RecipeError(f"--resume: there is no checkpoint in {output_dir}.")
        return last
    if not (Path(resume) / "trainer_state.json").is_file():
        raise RecipeError(f"--resume: {resume} is not a checkpoint (no trainer_state.json).")
    return str(resume)


_SHAPE = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "feed_forward_type", "qk_post_norm",
)  # fmt: skip


def check_checkpoint(checkpoint: str | None, config: PreTrainedConfig):
    """Raises `RecipeError` if a checkpoint to resume from is of a model of another shape; None passes."""
    if checkpoint is None:
        return
    saved = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    for name in _SHAPE:
        if saved.get(name) != getattr(config, name):
            raise RecipeError(
                f"{checkpoint} is a checkpoint of another model: its {name} is {saved.get(name)!r}, "
                f"the recipe's is {getattr(config, name)!r}."
            )


def exit_on_recipe_error(main):
    """Runs an entry point; a `RecipeError` ends it with one line and status 2 instead of a traceback."""
    try:
        main()
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
