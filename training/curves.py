"""Curves of training logs: loss and held-out accuracy by tokens seen, and tokens by hours, of any stage.

    python -m training.curves runs/tiny-mlm/log.jsonl runs/control/log.jsonl --plot curves.png

Law: a run that was resumed is one curve. What it trained again after a kill counts once, as it was trained last; the
hours of its processes are added up.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

Points = list[tuple[float, float]]


@dataclass
class Curves:
    """What a log says, in order of its steps.

    Attributes:
        name: Of the run: its folder's, or the file's where that is not called log.
        loss: (tokens, nats).
        accuracy: (tokens, share) of the held-out tokens or, in stages II and III, of the held-out queries whose first
            result is right, the mean over sources.
        tokens: (hours, tokens).
    """

    name: str
    loss: Points = field(default_factory=list)
    accuracy: Points = field(default_factory=list)
    tokens: Points = field(default_factory=list)


def read_log(path: Path) -> Curves:
    """The curves of one log.jsonl.

    Raises:
        ValueError: A line that is no entry of a log; no entry with a loss and the tokens seen.
        OSError: The file cannot be read.
    """
    kept: list[dict[str, Any]] = []
    hours, seconds = 0.0, 0.0  # of the processes before, and of the running one so far
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            step, now = entry["step"], entry["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no entry of a training's log.") from error
        if now < seconds:  # another process began
            hours += seconds / 3600
        seconds = now
        if "loss" in entry:
            kept = [other for other in kept if other["step"] < step]
        kept.append({**entry, "hours": hours + now / 3600})
    curves = Curves(path.parent.name if path.stem == "log" else path.stem)
    tokens = 0
    for entry in kept:
        if "loss" in entry and "tokens" in entry:
            tokens = entry["tokens"]
            curves.loss.append((tokens, entry["loss"]))
            curves.tokens.append((entry["hours"], tokens))
        elif (accuracy := _accuracy(entry)) is not None and tokens:
            curves.accuracy.append((tokens, accuracy))
    if not curves.loss:
        raise ValueError(f"{path}: no entry has both a loss and the tokens seen.")
    return curves


def _accuracy(entry: dict[str, Any]) -> float | None:
    found = [value for name, value in entry.items() if name == "eval_accuracy" or name.endswith("_accuracy@1")]
    return fmean(found) if found else None


def plot(runs: list[Curves], file: Path):
    """Draws a panel each for loss, accuracy (if any run has it twice) and tokens.

    Args:
        runs: Curves, a colour each.
        file: Ends in .png, .svg or another format of matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: A format that matplotlib does not have.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install -e ".[evaluate]".') from error
    panels = [("loss", "training loss (nats)"), ("accuracy", "held-out accuracy"), ("tokens", "tokens")]
    if not any(len(run.accuracy) > 1 for run in runs):
        panels.pop(1)
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, run in enumerate(runs):
            if points := getattr(run, name):
                few = len(points) < 20
                axes.plot(*zip(*points, strict=True), color=f"C{number}", label=run.name, marker="." if few else None)
        axes.set_ylabel(label)
        axes.set_xlabel("hours" if name == "tokens" else "tokens")
        if name != "tokens":
            axes.set_xscale("log")  # a loss falls by about as much whenever the tokens double
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m training.curves", description="Draws loss, held-out accuracy and tokens of training logs."
    )
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.jsonl of a run")
    parser.add_argument("--plot", required=True, type=Path, metavar="FILE", help=".png or .svg")
    arguments = parser.parse_args()
    try:
        plot([read_log(path) for path in arguments.logs], arguments.plot)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(arguments.plot)


if __name__ == "__main__":
    main()
