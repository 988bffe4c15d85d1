"""What a GLUE evaluation says: the records, the tables beside the paper's rows, the files for the test server.

Laws: a grid point is chosen by its median on the development set, and the table says that its score is of that set; no
test label is looked at before; a task that was left out is named with its reason.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .glue_data import TaskData, baseline
from .glue_finetuning import Run
from .glue_tasks import LARGEST_SIMILARITY, TASKS, Part, Task, task_score
from .sets import EvaluationError

# Paper (arXiv 2310.19923), section 6.1, GLUE test, in percent; MNLI matched / mismatched. Remembered, not read again.
PAPER = {
    "JinaBERT small, paper": {
        "MNLI-m": 80.1, "MNLI-mm": 78.9, "QQP": 78.9, "QNLI": 86.0, "SST-2": 89.6, "CoLA": 28.2, "STS-B": 84.9,
        "MRPC": 84.1, "RTE": 68.5, "WNLI": 55.5,
    },
    "JinaBERT base, paper": {
        "MNLI-m": 85.7, "MNLI-mm": 85.4, "QQP": 80.7, "QNLI": 92.2, "SST-2": 94.5, "CoLA": 51.4, "STS-B": 89.5,
        "MRPC": 88.4, "RTE": 78.7, "WNLI": 65.1,
    },
}  # fmt: skip
_BASELINE = "most frequent label, or mean"
_NOT_IN_MEAN = "WNLI"  # as in the tables of BERT and of the paper: its development set contradicts its train split

_INTRODUCTION = f"""In percent: Matthews correlation for CoLA, the mean of Pearson and Spearman correlation for STS-B,
the mean of accuracy and F1 for MRPC and QQP, accuracy elsewhere. A row on `dev` is the median over the seeds of the
grid point that is best on that set, so it is optimistic; `test` is the best seed of that point, on test sets whose
labels are public. The paper's rows are from GLUE's own test sets (remembered, not read again; whether its columns
with two measures are means, too, is not known). The mean leaves out {_NOT_IN_MEAN}."""


def submission(task: Task, predictions: np.ndarray) -> str:
    r"""The file that the test server (gluebenchmark.com) reads, by the format of jiant's strict mode.

    Args:
        task: The task; AX is answered by MNLI.
        predictions: `(rows,)`, see `glue_tasks.decode`.

    Example:
        >>> submission(TASKS["RTE"], np.array([1, 0]))
        'index\tprediction\n0\tnot_entailment\n1\tentailment\n'
        >>> submission(TASKS["STS-B"], np.array([5.2, -0.1, 2.5]))
        'index\tprediction\n0\t5.000\n1\t0.000\n2\t2.500\n'
    """
    if task.is_regression:
        answers = [f"{min(max(0.0, value), LARGEST_SIMILARITY):.3f}" for value in predictions.tolist()]
    else:
        answers = [task.answers[label] for label in predictions.tolist()]
    return "index\tprediction\n" + "".join(f"{index}\t{answer}\n" for index, answer in enumerate(answers))


def select(runs: Sequence[Run]) -> Run:
    """The best run of the best grid point.

    Args:
        runs: The finished runs of a task.

    Returns:
        Of the point with the highest median over its seeds, the run with the highest score; ties go to the first.
    """
    best = max(grid_points(runs), key=lambda point: point["median"])
    return max((run for run in runs if run.point == best["point"]), key=lambda run: run.result()["score"])


def grid_points(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What each grid point scored on the development set, the points in their order.

    Returns:
        `point`, `runs` (seed and measures of each), `median`, `least` and `most` of the scores over the seeds, and
        `dev`, the median score of each part.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.point.values()), []).append(run)
    points = []
    for group in groups.values():
        results = [run.result() for run in group]
        scores = [result["score"] for result in results]
        points.append(
            {
                "point": group[0].point,
                "runs": [{"seed": run.seed, "dev": run.result()["dev"]} for run in group],
                "median": median(scores),
                "least": min(scores),
                "most": max(scores),
                "dev": {
                    part: median(task_score(result["dev"][part]) for result in results) for part in results[0]["dev"]
                },
            }
        )
    return points


def record_of(data: TaskData, runs: Sequence[Run], chosen: Run, test: dict[str, Any]) -> dict[str, Any]:
    """The results of one task, as JSON values.

    Args:
        data: The task.
        runs: All its runs, finished.
        chosen: See `select`.
        test: Part -> measures, of the parts whose labels are there.
    """
    task = data.task
    points = grid_points(runs)
    return {
        "task": task.name,
        "rows": {
            "train": len(data.train),
            "train_split": data.train_rows,
            **{f"dev {name}": len(split) for name, split in data.dev.items()},
            **{f"test {name}": len(split) for name, split in data.test.items()},
        },
        "settings": {key: value for key, value in chosen.identity.items() if key not in ("seed", *chosen.point)},
        "grid": points,
        "chosen": {"point": chosen.point, "seed": chosen.seed, "dev": chosen.result()["dev"]},
        "dev": next(point["dev"] for point in points if point["point"] == chosen.point),
        "test": test,
        "baseline": {
            "dev": {name: baseline(data.train, split, task) for name, split in data.dev.items()},
            "test": {name: baseline(data.train, data.test[name], task) for name in test},
        },
    }


def read_output(path: Path) -> dict[str, Any]:
    """The results of earlier runs, or none.

    Raises:
        EvaluationError: The file is not one of ours.
    """
    if not path.exists():
        return {"records": [], "left_out": []}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for record in content["records"]:
            if not {"model", "task", "rows", "grid", "chosen", "dev", "test", "baseline"} <= set(record):
                raise KeyError("records")
        if not all({"model", "task", "reason"} <= set(entry) for entry in content["left_out"]):
            raise KeyError("left_out")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(f"--output {path}: holds no results of evaluation.glue; name another file.") from error
    return content


def write_output(path: Path, content: dict[str, Any]):
    """Replaces the file at once, so that an interrupted run leaves a whole one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _parts(task: Task) -> list[Part]:
    return [part for part in task.parts if not part.diagnostic]


def _cells(values: dict[str, float]) -> list[str]:
    """One cell a task from the scores of its parts, in percent."""
    cells = []
    for task in TASKS.values():
        found = [f"{values[part.name]:.1f}" if part.name in values else "-" for part in _parts(task)]
        cells.append("/".join(found) if any(cell != "-" for cell in found) else "-")
    return cells


def _mean(values: dict[str, float], tasks: Sequence[Task]) -> str:
    """The mean over tasks, the parts of a task counted as one; nothing where a task is missing."""
    names = [[part.name for part in _parts(task)] for task in tasks]
    if not tasks or not all(name in values for group in names for name in group):
        return "-"
    return f"{sum(sum(values[name] for name in group) / len(group) for group in names) / len(tasks):.1f}"


def main_table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Models, baselines and the paper's rows against the tasks.

    Args:
        records: `record_of` with the `model`.

    Returns:
        The header, and the rows: who, on what, a score a task in percent ("-": none), their mean over the tasks that
        all models have.
    """
    models = list(dict.fromkeys(record["model"] for record in records))
    of = {model: [record for record in records if record["model"] == model] for model in models}
    shared = [
        task
        for task in TASKS.values()
        if task.name != _NOT_IN_MEAN and all(task.name in [r["task"] for r in group] for group in of.values())
    ]
    rows: list[tuple[str, str, dict[str, float]]] = []
    for kind in ("dev", "test"):
        measured = [record["baseline"][kind] for record in records]
        constant = {name: task_score(value) for parts in measured for name, value in parts.items() if value}
        rows += [(_BASELINE, kind, constant)] if constant else []
        for model, group in of.items():
            if kind == "dev":
                values = {name: value for record in group for name, value in record["dev"].items()}
            else:
                values = {name: task_score(value) for record in group for name, value in record["test"].items()}
            rows += [(model, kind, values)] if values else []
    rows = [(who, kind, {name: 100 * value for name, value in values.items()}) for who, kind, values in rows]
    rows += [(who, "GLUE test", values) for who, values in PAPER.items()]
    tasks = ["MNLI-m/mm" if task.name == "MNLI" else task.name for task in TASKS.values()]
    header = ["", "scored on", *tasks, f"mean of {len(shared)}"]
    return header, [[who, kind, *_cells(values), _mean(values, shared)] for who, kind, values in rows]


def task_table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """How each score came about: rows, start, grid, spread over the seeds, each measure."""
    header = ["model", "task", "train rows", "dev rows", "start", "chosen point", "dev: median (least to most)"]
    header += ["measures of the best seed", "baseline"]
    rows = []
    for record in sorted(records, key=lambda record: (record["model"], list(TASKS).index(record["task"]))):
        sizes, chosen = record["rows"], record["chosen"]
        train = f"{sizes['train']:,}"
        train += f" of {sizes['train_split']:,}" if sizes["train"] < sizes["train_split"] else ""
        point = next(entry for entry in record["grid"] if entry["point"] == chosen["point"])
        seeds = len(point["runs"])
        spread = f"{100 * point['median']:.1f}"
        spread += (
            f" ({100 * point['least']:.1f} to {100 * point['most']:.1f}), {seeds} seeds" if seeds > 1 else ", 1 seed"
        )
        rows.append(
            [
                record["model"],
                record["task"],
                train,
                " + ".join(f"{size:,}" for name, size in sizes.items() if name.startswith("dev ")),
                record["settings"]["start"].split()[0],
                f"{_point(chosen['point'])} of {len(record['grid'])}; {record['settings']['epochs']:g} epochs",
                spread,
                measures_text(chosen["dev"]),
                measures_text(record["baseline"]["dev"]),
            ]
        )
    return header, rows


def grid_table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Every grid point: the score on the development set of each seed, in percent."""
    rows = []
    for record in sorted(records, key=lambda record: (record["model"], list(TASKS).index(record["task"]))):
        for point in record["grid"]:
            scores = [(run["seed"], 100 * task_score(next(iter(run["dev"].values())))) for run in point["runs"]]
            cell = ", ".join(f"{score:.1f} (seed {seed})" for seed, score in scores)
            rows.append([record["model"], record["task"], _point(point["point"]), cell])
    return ["model", "task", "point", "dev"], rows


def _point(point: dict[str, Any]) -> str:
    return f"{point['learning_rate']:g} x {point['batch_size']}"


def measures_text(parts: dict[str, dict[str, float]]) -> str:
    """The measures of the parts of a task, in percent."""
    values = [f"{name} {100 * value:.1f}" for part in parts.values() for name, value in part.items()]
    return ", ".join(values)


def markdown(content: dict[str, Any]) -> str:
    """The whole report."""
    records = content["records"]
    pieces = [
        "# GLUE",
        _INTRODUCTION,
        markdown_table(*main_table(records), left=2),
        markdown_table(*task_table(records), left=9),
    ]
    if content["left_out"]:
        reasons = dict.fromkeys((entry["task"], entry["reason"]) for entry in content["left_out"])
        pieces.append("Left out:\n\n" + "\n".join(f"- {task}: {reason}." for task, reason in reasons))
    notes = dict.fromkeys(note for record in records for note in record.get("notes", []))
    if notes:
        pieces.append("Notes:\n\n" + "\n".join(f"- {note}" for note in notes))
    pieces += ["All grid points (learning rate x batch size):", markdown_table(*grid_table(records), left=4)]
    commands = dict.fromkeys(record["command"] for record in records)
    pieces.append("\n".join(["```bash", *commands, "```"]))
    return "\n\n".join(pieces) + "\n"


def markdown_table(header: list[str], rows: list[list[str]], *, left: int) -> str:
    """The columns after the first `left` are aligned to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(header) - left)
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])
