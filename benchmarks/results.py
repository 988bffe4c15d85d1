"""The results of a benchmark as one JSON document, the only source of tables and plots.

Law: it holds what was measured (seconds of every round, bytes), and nothing derived from it. It is replaced whole, so
an interrupted run leaves a whole file. A record is self-contained: it has the seconds of the reference in its own
rounds, so that a resumed run compares within its own rounds too.

    settings  what has to be equal for figures to stand side by side, and the mix
    runs      command, time, machine and commit of every run that added to the document
    systems   name -> kind, dtype, longest length, description, what loading reported
    records   one for each system and length: `status`, `message`, `batch`, `tokens`, `longest`, `operations`,
              `seconds` (one a round), `reference_seconds` (of the same rounds), `peak_bytes` and `others_cpu_seconds`
              (one a round), and what the system reported (`skipped_share`, `attention_seconds`)
"""

import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
FINAL = ("ok", "out of memory", "time limit")
"""Statuses that a resumed run does not measure again, but see `is_settled`."""
LIMITS = ("out of memory", "time limit")
"""Statuses after which longer texts are not tried."""
MACHINE = ("cpu", "instruction_sets", "logical_cores", "physical_cores")
"""Of `machine.describe_machine`, what has to be equal for figures to stand side by side, beside the versions."""


class BenchmarkError(ValueError):
    """Something that the command line or a results file says is wrong; one line for the user."""


def new_results(settings: dict[str, Any]) -> dict[str, Any]:
    """An empty document."""
    return {"format": FORMAT, "settings": settings, "runs": [], "systems": {}, "records": []}


def read_results(path: Path) -> dict[str, Any]:
    """Reads a document.

    Raises:
        BenchmarkError: The file is missing or not one of ours.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["format"] != FORMAT or not {"settings", "runs", "systems", "records"} <= set(results):
            raise KeyError("format")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BenchmarkError(f"{path}: holds no results of benchmarks.speed ({error!r}).") from error
    return results


def write_results(path: Path, results: dict[str, Any]):
    """Replaces the file at once."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def check_settings(results: dict[str, Any], settings: dict[str, Any]):
    """Whether new figures may stand beside those of `results`.

    Raises:
        BenchmarkError: A setting differs; names it.
    """
    for name, value in settings.items():
        known = results["settings"].get(name)
        if known != value:
            raise BenchmarkError(f"--resume: {name} was {known!r} and is {value!r} now; take another --output.")


def check_machine(results: dict[str, Any], machine: dict[str, Any]):
    """Whether figures of this machine, with these versions, may stand beside those of `results`.

    Args:
        results: A document.
        machine: Of `machine.describe_machine`.

    Raises:
        BenchmarkError: The machine of an earlier run or a version there differs; names the first that does.
    """
    now = {**{name: machine[name] for name in MACHINE}, **machine["versions"]}
    for run in results["runs"]:
        then = {**run["machine"], **run["machine"]["versions"]}
        for name, value in now.items():
            if then.get(name) != value:
                raise BenchmarkError(
                    f"--resume: {name} was {then.get(name)!r} and is {value!r} now; take another --output."
                )


def find_record(results: dict[str, Any], system: str, length: int | str) -> dict[str, Any] | None:
    """The record of a system at a length, if there is one."""
    records = (x for x in results["records"] if x["system"] == system and x["length"] == length)
    return next(records, None)


def put_record(results: dict[str, Any], record: dict[str, Any]):
    """Adds a record in place of an earlier one of the same system and length."""
    same = find_record(results, record["system"], record["length"])
    results["records"] = [other for other in results["records"] if other is not same] + [record]


def is_settled(results: dict[str, Any], record: dict[str, Any], time_limit_s: float) -> bool:
    """Whether a record need not be measured again: a limit of time counts only if this run has no larger one."""
    if record["status"] != "time limit":
        return record["status"] in FINAL
    return results["runs"][record["run"]]["time_limit_s"] >= time_limit_s


def limit_below(results: dict[str, Any], system: str, longest: int, time_limit_s: float) -> str | None:
    """Why texts of `longest` tokens need not be tried: memory or time ran out on shorter ones. None if not."""
    for record in results["records"]:
        fixed = isinstance(record["length"], int)  # the mix is a large batch and says little of a long text
        limited = record["status"] in LIMITS and is_settled(results, record, time_limit_s)
        if fixed and record["system"] == system and limited and record["longest"] < longest:
            return f"{record['status']} at {record['length']} tokens"
    return None
