"""Results on disk: a JSON file of records, and beside it what the scores were computed from, item by item (.npz).

Laws: a file is replaced at once, so that an interrupted run leaves a whole one; the samples of a record are written
before the record, so that a record never names samples that are not there. COST: a file is written whole each time.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .sets import EvaluationError

FIELDS = ("model", "set", "settings", "metrics", "sizes")  # of a record of evaluation.local
_PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "numpy",
    "scipy",
    "scikit-learn",
    "bm25s",
    "pytrec-eval-terrier",
)

Samples = dict[str, np.ndarray]  # name -> array; see `evaluation.metrics`


def versions() -> dict[str, str | int]:
    """Versions of Python and of the packages that decide the scores; processor, its cores, and threads in use."""
    machine = {"processor": _processor(), "cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, **machine}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_records(path: Path, fields: Collection[str] = FIELDS) -> list[dict[str, Any]]:
    """The records of an earlier run; none if there is no such file.

    Args:
        path: JSON file.
        fields: What every record has to have.

    Raises:
        EvaluationError: The file is not one of ours.
    """
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        if not all(set(record) >= set(fields) for record in records):
            raise KeyError("a field is missing")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(f"{path}: exists and holds no results of this program; name another file.") from error
    return records


def of_last_weights(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without those of what a model of the same name was before, as the last record tells."""
    last = {record["model"]: model_of(record) for record in records}
    return [record for record in records if model_of(record) == last[record["model"]]]


def model_of(record: dict[str, Any]) -> tuple[str | None, str | None]:
    """The hashes of weights and pipeline; None for what a record does not say."""
    settings = record.get("settings", {})
    return settings.get("weights_sha256"), settings.get("pipeline_sha256")


def write_records(path: Path, records: list[dict[str, Any]]):
    """Replaces the file at once, so that an interrupted run leaves a whole one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"records": records}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def samples_path(path: Path) -> Path:
    """The file of the samples of the records in `path`: `results.json` -> `results.npz`."""
    return path.with_suffix(".npz") if path.suffix == ".json" else path.with_name(path.name + ".npz")


def samples_id(key: dict[str, Any]) -> str:
    """Name of the samples of a record: 16 hexadecimal digits that follow from what decides its scores."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def read_samples(path: Path) -> dict[str, Samples]:
    """The samples of every record by `samples_id`; none if there is no such file, or it cannot be read.

    Args:
        path: The .npz file.
    """
    found: dict[str, Samples] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                identifier, _, array = name.partition("/")
                found.setdefault(identifier, {})[array] = file[name]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return {}  # a damaged file costs the samples: their records are scored again
    return found


def write_samples(path: Path, samples: dict[str, Samples]):
    """Replaces the .npz file at once; arrays are compressed."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:  # a name would get the suffix .npz
        np.savez_compressed(
            file, **{f"{identifier}/{name}": x for identifier, arrays in samples.items() for name, x in arrays.items()}
        )
    os.replace(partial, path)
