"""`jina-bert train`, `evaluate` and `benchmark`: the entry points of those packages, with their own arguments.

Law: `jina-bert train NAME ARGUMENTS` is `python -m training.NAME ARGUMENTS`, in this process, so that signals and the
status are those of the program itself. Nothing of the packages is imported before.
"""

import importlib.util
import pkgutil
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..requirements import install_command
from .group import ProgramFailure

PASS_THROUGH = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""Settings of the commands: what follows the name belongs to the program, `--help` included."""
EXAMPLES = {
    "train": "jina-bert train mlm --config training/recipes/tiny-mlm.yaml data_dir=DATA output_dir=runs/mlm",
    "evaluate": "jina-bert evaluate local --model hub_repo/tiny --baseline bm25 --data DATA --output tiny.json",
    "benchmark": "jina-bert benchmark speed --shape small --output NEW",
}
_EXTRAS = {"training": "train", "evaluation": "evaluate", "benchmarks": "benchmarks"}

Name = Annotated[str | None, typer.Argument(help="Which program; without it, they are listed.")]
Arguments = Annotated[list[str] | None, typer.Argument(help="Its arguments; --help shows them.")]


def train(name: Name = None, arguments: Arguments = None):
    """Train a model: a stage, or the preparation of a corpus (python -m training.NAME)."""
    return run_program("training", name, arguments or [])


def evaluate(name: Name = None, arguments: Arguments = None):
    """Evaluate models (python -m evaluation.NAME)."""
    return run_program("evaluation", name, arguments or [])


def benchmark(name: Name = None, arguments: Arguments = None):
    """Measure speed and memory (python -m benchmarks.NAME)."""
    return run_program("benchmarks", name, arguments or [])


def programs(package: str) -> list[str]:
    """Names of the modules of a package that can be run; none of them is imported.

    Raises:
        ModuleNotFoundError: The package is not there.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package} is not installed: run this from the project's repository.")
    names = []
    for module in pkgutil.iter_modules(spec.submodule_search_locations):
        source = Path(module.module_finder.path) / f"{module.name}.py"
        if source.is_file() and '__name__ == "__main__"' in source.read_text(encoding="utf-8"):
            names.append(module.name)
    return names


def run_program(package: str, name: str | None, arguments: list[str]) -> int:
    """Runs a program as `python -m` does.

    Args:
        package: "training", "evaluation" or "benchmarks".
        name: Of the module; None lists the modules.
        arguments: Its arguments.

    Returns:
        The status; a program that leaves with one does so by SystemExit.

    Raises:
        ValueError: There is no such program.
        ImportError: A package that it needs is missing; with the extra.
        ProgramFailure: It ended with an error.
    """
    names = programs(package)
    if name is None:
        print("\n".join(names))
        return 0
    if name.replace("-", "_") not in names:
        raise ValueError(f"{package} has no program {name!r}; it has {', '.join(names)}.")
    module = f"{package}.{name.replace('-', '_')}"
    argv, sys.argv = sys.argv, [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in _EXTRAS or not missing:
            raise
        extra = _EXTRAS[package]
        raise ImportError(f"{module} needs {missing}: {install_command(extra)}") from None
    except ImportError:
        raise
    except Exception as error:
        message = f"{module} failed (jina-bert --traceback shows where): {type(error).__name__}: {error}"
        raise ProgramFailure(message) from error
    finally:
        sys.argv = argv
    return 0
