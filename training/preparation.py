"""The command of a preparation, of the corpus or of pairs: what it is told, and what it prints.

Law: this module imports no transformers. Tasks in processes of their own import the module of their command, hence
this one, too.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import override

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor


def command_line(module: str, *, description: str, contents: str) -> argparse.Namespace:
    """Parses `--config RECIPE [--dry-run] [key=value ...]`.

    Args:
        module: Of the command, for example "training.corpus".
        description: What it does, a sentence.
        contents: What lies in the output folder besides removed/ and logs/, for the end of the help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"{description} The same command again goes on where the last one stopped.",
        epilog=f"In output_dir: {contents}, report.md what was removed and why, removed/ has examples, logs/ every "
        "task's log. Slurm: run this where sbatch is, with executor.kind=slurm.",
    )
    parser.add_argument("--config", required=True, help="recipe, a YAML file; training/recipes holds ours")
    parser.add_argument("--dry-run", action="store_true", help="check everything and show the stages, run nothing")
    parser.add_argument(
        "overrides", nargs="*", type=override, metavar="key=value", help="for example executor.workers=8"
    )
    return parser.parse_args()


def show(chain: dict[str, "PipelineExecutor"]):
    """Prints the stages, a line each: the tasks and the steps of its pipeline.

    Args:
        chain: See `executors`.
    """
    for name, executor in chain.items():
        print(f"{name} ({executor.world_size} tasks): {' | '.join(step.name for step in executor.pipeline)}")


def announce(recipe: Any, folder: Path, *, job: str, results: str):
    """Prints where the results are or, on Slurm, will be.

    Args:
        recipe: Its `executor` says where the stages run.
        folder: Of the results.
        job: What was prepared: "corpus".
        results: What lies in the folder: "shards".
    """
    submitted = recipe.executor.kind == "slurm"
    print(f"jobs submitted, {results} will be in" if submitted else f"{job} finished:", folder)
