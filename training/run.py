"""What the three stages share around a Trainer: the log, the recipe beside checkpoints, resuming.

Law: a checkpoint that is resumed from is whole. The file that says so is written last, after all processes have
written theirs, and lists every other file with its size.
"""

import itertools
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from omegaconf import OmegaConf
from transformers import PreTrainedConfig, TrainerCallback

from .recipe import RecipeError, save_recipe
from .source_files import source_files

logger = logging.getLogger(__name__)

_WHOLE = "complete.json"
_FILES = "data-files.json"


class TrainingDiverged(RuntimeError):
    """Training was stopped because going on makes no sense; the message says at which step, why and where to look."""


class RunRecorder(TrainerCallback):
    """Appends every log entry to `log.jsonl`, writes `recipe.yaml` beside every checkpoint and marks it as whole.

    Entries carry `step`, `seconds` since this process started training, and what the Trainer logged. It has to be the
    last callback that writes into checkpoints.
    """

    def __init__(self, recipe: Any):
        self.recipe = recipe
        self.files: dict[str, list[str]] = {}
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            leave_behind(args.output_dir, state.global_step)
            save_recipe(self.recipe, args.output_dir)
            self.files = files_read(self.recipe)
        self.started = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.write(args.output_dir, state.global_step, logs or {})

    def write(self, output_dir: str, step: int, entry: dict[str, Any]):
        """Appends one entry to the log."""
        seconds = round(time.monotonic() - self.started, 1)
        with open(Path(output_dir) / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": seconds, **entry}) + "\n")

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and state.is_world_process_zero:
            # A checkpoint of this step may be there, of a run that was resumed from an earlier one.
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).unlink(missing_ok=True)

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_recipe(self.recipe, checkpoint)
            (checkpoint / _FILES).write_text(json.dumps(self.files, indent=1), encoding="utf-8")
            mark_whole(checkpoint)


def mark_whole(checkpoint: Path):
    """Writes the list of a checkpoint's files and their sizes in bytes: it was written to the end."""
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()
    }
    (checkpoint / _WHOLE).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to the end and nothing of it was deleted since."""
    try:
        sizes = json.loads((checkpoint / _WHOLE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        # Versions without the list wrote the recipe last.
        return (checkpoint / "recipe.yaml").is_file() and (checkpoint / "trainer_state.json").is_file()
    except ValueError:  # killed while it was written
        return False
    sizes.pop(_WHOLE, None)
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )


def checkpoints(output_dir: str) -> list[Path]:
    """The checkpoints of a run, the last one first, whole or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def leave_behind(output_dir: str, step: int):
    """Renames the whole checkpoints after a step, which a run goes on from: the next `--resume` is to go on with that.

    `checkpoint-1000` becomes `left-checkpoint-1000`, or `left-2-checkpoint-1000` where that is taken.
    """
    for checkpoint in checkpoints(output_dir):
        if int(checkpoint.name.split("-")[1]) > step and is_whole(checkpoint):
            names = (f"left-{number}-{checkpoint.name}" for number in itertools.count(2))
            names = itertools.chain([f"left-{checkpoint.name}"], names)
            left = next(path for name in names if not (path := checkpoint.with_name(name)).exists())
            checkpoint.rename(left)
            logger.warning("%s is not of the run that goes on from step %d: now %s", checkpoint, step, left.name)


def resume_checkpoint(output_dir: str, resume: bool | str | None) -> str | None:
    """The checkpoint to resume from.

    Args:
        output_dir: Folder of the run.
        resume: None starts anew, True takes the last whole checkpoint of `output_dir`, a string names one.

    Returns:
        Its folder; None begins anew, as a run does that was killed before its first checkpoint was whole.

    Raises:
        RecipeError: There is none, or the one that is named is not whole; or a new run would write into the
            checkpoints of an old one; or it was saved without what training goes on with.
    """
    found = _resume_checkpoint(output_dir, resume)
    if found is not None and (Path(found) / "recipe.yaml").is_file():
        saved = OmegaConf.to_container(OmegaConf.load(Path(found) / "recipe.yaml"))
        if saved.get("training", {}).get("save_only_model"):
            raise RecipeError(
                f"{found} was saved with training.save_only_model: without the state of optimiser and schedule there "
                "is no going on. Begin a new run from it as a model."
            )
    return found


def _resume_checkpoint(output_dir: str, resume: bool | str | None) -> str | None:
    found = checkpoints(output_dir)
    if resume is None:
        if found:
            raise RecipeError(f"{found[0]} exists: pass --resume to go on from it, or another output_dir.")
        return None
    if resume is not True:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise RecipeError(f"--resume: {resume} is not a checkpoint (no trainer_state.json).")
        if not is_whole(Path(resume)):
            raise RecipeError(f"--resume: {resume} is not whole: cut off, or files were deleted.")
        return str(resume)
    for checkpoint in found:
        if is_whole(checkpoint):
            logger.info("resuming from %s", checkpoint)
            return str(checkpoint)
        logger.warning("%s is not whole (the run was killed while writing it): looking before it", checkpoint)
    if not found:
        raise RecipeError(f"--resume: there is no checkpoint in {output_dir}.")
    logger.warning("no checkpoint of %s is whole: beginning with the first step", output_dir)
    return None


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
        wanted = getattr(config, name, None)
        if saved.get(name) != wanted:
            raise RecipeError(
                f"{checkpoint} is a checkpoint of another model: its {name} is {saved.get(name)!r}, "
                f"the recipe's is {wanted!r}."
            )


_READ = ("max_length", "long_documents", "shuffle_buffer", "max_rows")
_READ_OF_SOURCE = ("text", "tokens", "heldout_share", "anchor", "positive", "hub", "hub_config", "split")


def files_read(recipe: Any) -> dict[str, list[str]]:
    """Source -> names of its local files, in the order in which they are read."""
    local = [source for source in recipe.sources if source.path is not None]
    return {source.name: [path.name for path in source_files(source, recipe.data_dir)] for source in local}


def check_data(checkpoint: str | None, recipe: Any):
    """Raises `RecipeError` if a checkpoint's place in the data is one in other data than the recipe's.

    Folders may change, since data may be moved; in stages II and III also weights, by which only what comes is drawn
    (a shuffle buffer is filled again by the draws of before). None passes, as does a checkpoint without its recipe.
    """
    if checkpoint is None or not (Path(checkpoint) / "recipe.yaml").is_file():
        return
    if (Path(checkpoint) / _FILES).is_file():
        read, files = json.loads((Path(checkpoint) / _FILES).read_text(encoding="utf-8")), files_read(recipe)
        for name, before in read.items():
            now = files.get(name, before)
            if now != before:
                other = sorted(set(before) ^ set(now)) or now
                raise RecipeError(
                    f"{checkpoint}: source {name} was read from {len(before)} files and has {len(now)} now (other "
                    f"ones: {', '.join(other[:3])}): texts would be left out or read twice. Resume with the files "
                    "that it began with, or begin a new run."
                )
    old = OmegaConf.to_container(OmegaConf.load(Path(checkpoint) / "recipe.yaml"))
    new = OmegaConf.to_container(OmegaConf.structured(recipe))
    before, now = _places(old), _places(new)
    for key, value in before.items():
        if key in now and now[key] != value:
            raise RecipeError(
                f"{checkpoint}: its place in the data is one with {key}={value!r}, the recipe has {now[key]!r}: texts "
                "would be left out or read twice. Resume as it began, or begin a new run."
            )


def _places(recipe: dict[str, Any]) -> dict[str, Any]:
    """What the places in a checkpoint count on."""
    long_documents = recipe.get("long_documents")
    found = {key: recipe[key] for key in _READ if key in recipe and (key != "max_length" or long_documents)}
    found["training.seed"] = recipe["training"].get("seed", 42)
    found["sources"] = [source["name"] for source in recipe["sources"]]
    mixed = "shuffle_buffer" in recipe and len(recipe["sources"]) > 1
    for source in recipe["sources"]:
        keys = (*_READ_OF_SOURCE, "weight") if mixed else _READ_OF_SOURCE
        found |= {f"sources.{source['name']}.{key}": source[key] for key in keys if key in source}
    return found


def exit_on_recipe_error(main):
    """Runs an entry point; what is wrong with the recipe ends it with one line and status 2, divergence with status 1.

    What this package logs (which checkpoint is taken, what is odd) goes to stderr.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        main()
    except RecipeError as error:
        # One that comes out of a data loader's worker carries its traceback before the message.
        print(f"error: {str(error).rpartition('RecipeError: ')[2].strip()}", file=sys.stderr)
        sys.exit(2)
    except TrainingDiverged as error:
        print(f"\nstopped: {error}", file=sys.stderr)  # below the progress bar
        sys.exit(1)
