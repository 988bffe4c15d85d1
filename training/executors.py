"""Running the stages of a preparation through datatrove: on this machine, on Slurm or on Ray.

Law: a stage is cut into tasks; a task that has finished is not run again, one that was interrupted is run again from
its start, and a stage begins when all tasks of the one before have finished. An output folder belongs to one recipe.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from .recipe import RecipeError, save_recipe

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep

_EXECUTORS = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
# tasks_per_job: a job of several tasks runs them on one pipeline, whose statistics then count the first task twice.
_DECIDED = ("pipeline", "tasks", "workers", "depends", "logging_dir", "skip_completed", "job_name", "tasks_per_job")


@dataclass
class Stage:
    """One pipeline of datatrove and the number of its tasks."""

    name: str
    pipeline: list["PipelineStep"]
    tasks: int


def executors(recipe: Any, stages: Sequence[Stage], *, job: str) -> dict[str, "PipelineExecutor"]:
    """The executor of each stage, in order; those of Slurm depend on the one before.

    Args:
        recipe: Its `executor` (a `corpus_recipe.Executor`) says where the stages run, its `output_dir` where logs go.
        stages: What runs.
        job: Jobs on Slurm are named JOB-STAGE.

    Raises:
        RecipeError: `executor.kind` is none of ours, its options are not those of datatrove's class, or Ray is not
            installed.
    """
    kind = recipe.executor.kind
    if kind not in _EXECUTORS:
        raise RecipeError(f"executor.kind={kind!r} is none of {', '.join(_EXECUTORS)}.")
    if kind == "ray" and find_spec("ray") is None:
        raise RecipeError('executor.kind=ray needs Ray: pip install "ray[default]".')
    for name in recipe.executor.stages or ():
        if name not in [stage.name for stage in stages]:
            raise RecipeError(f"executor.stages: {name!r} is none of {', '.join(stage.name for stage in stages)}.")
    if kind == "local":  # Slurm and Ray know which of their tasks still run
        from .corpus_steps import Hold

        for stage in stages:
            stage.pipeline.insert(0, Hold(str(_lock(recipe))))
    chain: dict[str, PipelineExecutor] = {}
    for stage in stages:
        chain[stage.name] = _executor(recipe, stage, job, previous=next(reversed(chain.values()), None))
    return chain


def _executor(recipe: Any, stage: Stage, job: str, previous: "PipelineExecutor | None") -> "PipelineExecutor":
    kind = recipe.executor.kind
    cls = getattr(import_module(f"datatrove.executor.{kind}"), _EXECUTORS[kind])
    given = {**(recipe.executor.options or {}), **(recipe.executor.stages or {}).get(stage.name, {})}
    options = {key: value for key, value in given.items() if value is not None}  # null takes back what was said
    for key in options:
        if key in _DECIDED or key not in inspect.signature(cls).parameters:
            raise RecipeError(f"executor: {key} is not an option of datatrove's {cls.__name__} that can be set.")
    if kind == "slurm":
        options |= {"job_name": f"{job}-{stage.name}", "depends": previous}
    logs = str(Path(recipe.output_dir).resolve() / "logs" / stage.name)
    workers = min(recipe.executor.workers or stage.tasks, stage.tasks)
    try:
        return cls(stage.pipeline, tasks=stage.tasks, workers=workers, logging_dir=logs, **options)
    except TypeError as error:  # what Slurm cannot do without: time, partition
        raise RecipeError(f"executor.options: {error}.") from error


def run(recipe: Any, chain: dict[str, "PipelineExecutor"]) -> Iterator[str]:
    """Runs the stages, or goes on where an earlier call with the same recipe stopped.

    Yields:
        The name of each stage that has finished. On Slurm none: its jobs are submitted, not finished.

    Raises:
        RecipeError: Tasks of another run are still at work in the output folder.
        RuntimeError: A stage did not finish.
    """
    save_recipe(recipe, recipe.output_dir)
    if recipe.executor.kind == "local":
        from .corpus_steps import hold

        hold(str(_lock(recipe)), alone=True)
    for name, executor in chain.items():
        executor.run()
        if recipe.executor.kind == "slurm":
            continue
        if incomplete := executor.get_incomplete_ranks(skip_completed=True):
            logs = Path(recipe.output_dir).resolve() / "logs" / name
            raise RuntimeError(f"{len(incomplete)} tasks of {name} did not finish; logs: {logs}.")
        yield name


def _lock(recipe: Any) -> Path:
    return Path(recipe.output_dir).resolve() / ".lock"


def check_output(recipe: Any, *, what: str):
    """An output folder is new, or begun with this recipe; the executor may differ in all but its tasks.

    Args:
        recipe: Has `output_dir` and `executor`.
        what: Was begun there, for the message: "corpus preparation".

    Raises:
        RecipeError: The folder holds something else, or results of another recipe.
    """
    root = Path(recipe.output_dir)
    if not root.exists() or not any(root.iterdir()):
        return
    if not (root / "recipe.yaml").is_file():
        raise RecipeError(f"output_dir={root} is not empty and holds no {what}; name another folder.")
    began = _identity(OmegaConf.to_container(OmegaConf.load(root / "recipe.yaml")))
    ours = _identity(OmegaConf.to_container(OmegaConf.structured(recipe)))
    for key, old, new in _differences(began, ours):
        raise RecipeError(
            f"output_dir={root} holds results of another recipe: there {key} is {old!r}, here {new!r}; "
            "name another folder."
        )


def _identity(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe = {key: value for key, value in recipe.items() if key != "output_dir"}
    return {**recipe, "executor": {"tasks": recipe.get("executor", {}).get("tasks")}}


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys, dotted, where two recipes differ."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield key, old, new
        return
    for name in [*old, *(name for name in new if name not in old)]:
        yield from _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
