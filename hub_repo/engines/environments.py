"""Environments of the engines whose packages clash with ours: made once, with pinned versions, in the caller's folder.

Law: an environment is whole or it is made anew: the stamp that names its packages is written last, so an installation
that was killed, or one of other pins, is never taken for a ready one. Nothing is installed into the running Python.

COST: each of those with torch takes about 1 GB and some minutes, once.
"""

import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger(__name__)

_STAMP = "requirements.txt"
_TIME_LIMIT = 1800  # seconds; of one installation


@dataclass(frozen=True)
class Environment:
    """A set of packages that is installed by itself.

    Attributes:
        name: Of its folder.
        requirements: Pinned, as the installer writes them.
        installer: "pip" or "npm".
    """

    name: str
    requirements: tuple[str, ...]
    installer: str = "pip"

    @property
    def stamp(self) -> str:
        """What the stamp of a ready environment says."""
        return "\n".join(self.requirements) + "\n"


_TORCH = ("torch==2.13.0", "transformers==5.23.0", "sentence-transformers==6.2.0")
FASTEMBED = Environment("fastembed", ("fastembed==0.9.1",))
LANGCHAIN = Environment("langchain", (*_TORCH, "langchain-huggingface==1.2.3"))
LLAMA_INDEX = Environment("llama-index", (*_TORCH, "llama-index-embeddings-huggingface==0.8.0"))
NODE = Environment("node", ("node-llama-cpp@3.22.1", "@huggingface/transformers@4.3.1"), "npm")
"""NOTE: torch's wheels of PyPI bring gigabytes of CUDA on Linux; PIP_EXTRA_INDEX_URL with the CPU index avoids it."""


def prepared(environment: Environment, cache: Path) -> Path:
    """The environment's folder, made if it is not there or has other packages.

    Args:
        environment: Which.
        cache: Folder of all environments.

    Raises:
        RuntimeError: It cannot be installed; what the installer said last.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder = (cache / environment.name).absolute()
    with FileLock(cache / f"{environment.name}.lock"):
        stamp = folder / _STAMP
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == environment.stamp:
            return folder
        logger.info("installing %s into %s", ", ".join(environment.requirements), folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (_install_npm if environment.installer == "npm" else _install_pip)(environment, folder)
        stamp.write_text(environment.stamp, encoding="utf-8")
    return folder


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _install_pip(environment: Environment, folder: Path):
    _call([sys.executable, "-m", "venv", str(folder)], folder)
    options = ["--quiet", "--disable-pip-version-check", "--no-input"]
    _call([str(python_of(folder)), "-m", "pip", "install", *options, *environment.requirements], folder)


def _install_npm(environment: Environment, folder: Path):
    # A package.json of its own: without one npm installs into the next folder above that has one.
    (folder / "package.json").write_text('{"private": true, "type": "module"}\n', encoding="utf-8")
    # Install scripts would download or build binaries; those in the packages are all that is needed on a CPU.
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    _call(["npm", "install", *options, *environment.requirements], folder)


def _call(command: list[str], folder: Path):
    """Runs a step of an installation.

    Raises:
        RuntimeError: It failed, took too long, or its program is not there.
    """
    try:
        process = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIME_LIMIT
        )
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the installation took more than {_TIME_LIMIT} seconds") from None
    if process.returncode:
        said = (process.stderr.strip() or process.stdout.strip()).splitlines()
        errors = [line for line in said if "error" in line.lower()] or said
        raise RuntimeError(" ".join(errors[-1].split()) if errors else f"{command[0]} failed")
