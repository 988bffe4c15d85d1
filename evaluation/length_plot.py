"""Accuracy by length, from the records of `evaluation.mlm`: bootstrap intervals, the table and the figure.

Law: everything here is computed from the counts per document in the records; the resamples are the same at every
length, so that a ratio of two lengths is a paired comparison.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .records import of_last_weights

TRAINED_LENGTH = 512
"""Tokens; the reference of a command that names no other."""
RESAMPLES = 10_000
LEVEL = 0.95  # of the intervals
_SEED = 0
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, safe for the colour-blind; lines differ in marker and dash as well."""
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")

SHUFFLED = "shuffled"
"""The positions of a record whose words stand in random order: those of the model itself, see `mlm_texts.shuffled`."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One system at one length.

    Attributes:
        system: As in the figure.
        model: Name of the model; its systems differ in the positions.
        is_reference: Whether it is a single point, not one of a line over lengths.
        length: Tokens of a window.
        accuracy: Share of the targets that are predicted, over all documents.
        interval: Of the accuracy; None for a single document.
        ratio: Accuracy over that of the same model at the trained length; None where that is 0.
        ratio_interval: Of the ratio, paired; None where it is undefined.
        loss: Mean cross entropy of the targets, in nats.
    """

    system: str
    model: str
    is_reference: bool
    length: int
    accuracy: float
    interval: Interval | None
    ratio: float | None
    ratio_interval: Interval | None
    loss: float


def resampled_documents(documents: int) -> np.ndarray:
    """How often each document is in each resample: `(RESAMPLES, documents) int64`, rows sum to `documents`."""
    generator = np.random.default_rng(_SEED)
    return generator.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)


def percentile_interval(values: np.ndarray) -> Interval | None:
    """The central `LEVEL` of resampled values `(RESAMPLES,)`; None where one is undefined."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def system_name(record: dict[str, Any]) -> str:
    """The model, and how its table of positions was extended, or that the words were shuffled."""
    positions = record["positions"]
    return f"{record['model']} {positions}" if positions in ("interpolated", "repeated", SHUFFLED) else record["model"]


def _counts(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Right predictions and targets of each document, `(documents,) int64` both."""
    rows = record["documents"]
    return np.array([row["correct"] for row in rows]), np.array([row["targets"] for row in rows])


def _reference(record: dict[str, Any], records: Sequence[dict[str, Any]], length: int) -> dict[str, Any]:
    """The record of the same model at the trained length: its table as it is, or the same extension of it.

    What has no positions is at one length only, and its own reference.
    """
    if record["positions"] is None:
        return record
    for positions in ("alibi" if record["positions"] == SHUFFLED else record["positions"], "table"):
        for other in records:
            if (other["model"], other["positions"], other["length"]) == (record["model"], positions, length):
                return other
    raise ValueError(f"no record of {record['model']} at {length} tokens.")


def one_run(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that were asked the same as the last one, of the last weights of each model."""

    def asked(record: dict[str, Any]) -> tuple:
        settings = [record["settings"][name] for name in ("data_sha256", "seed", "mlm_probability", "tokens")]
        return (*settings, len(record["documents"]))

    return of_last_weights([record for record in records if asked(record) == asked(records[-1])])


def trained_length(records: Sequence[dict[str, Any]]) -> int:
    """Tokens of the length that the last record's command compares with."""
    found = re.search(r"--trained-length[ =](\d+)", records[-1].get("command", ""))
    return int(found[1]) if found else TRAINED_LENGTH


def points(records: Sequence[dict[str, Any]], trained_length: int) -> list[Point]:
    """Accuracies with intervals, and their ratios to the accuracy at the trained length.

    Args:
        records: Of one run of `evaluation.mlm`: all lengths of every model, over the same documents.
        trained_length: Tokens; one of the lengths.
    """
    found = []
    for record in records:
        (correct, targets), (base, _) = _counts(record), _counts(_reference(record, records, trained_length))
        drawn = resampled_documents(len(targets))
        with np.errstate(divide="ignore", invalid="ignore"):
            accuracies = (drawn @ correct) / (drawn @ targets)
            ratios = (drawn @ correct) / (drawn @ base)  # the targets are the same
        several = len(targets) > 1
        found.append(
            Point(
                system=system_name(record),
                model=record["model"],
                is_reference=record["positions"] in (SHUFFLED, None),
                length=record["length"],
                accuracy=float(correct.sum() / targets.sum()),
                interval=percentile_interval(accuracies) if several else None,
                ratio=float(correct.sum() / base.sum()) if base.sum() else None,
                ratio_interval=percentile_interval(ratios) if several else None,
                loss=sum(row["loss"] for row in record["documents"]) / int(targets.sum()),
            )
        )
    return found


def table_rows(found: Sequence[Point], trained_length: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; "-" where something is undefined."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    def interval(value: Interval | None) -> str:
        return "-" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"

    header = ["system", "tokens", "accuracy", "95 % interval", f"ratio to {trained_length}", "95 % interval", "loss"]
    rows = [
        [
            point.system,
            f"{point.length:,}",
            cell(point.accuracy),
            interval(point.interval),
            cell(point.ratio),
            interval(point.ratio_interval),
            cell(point.loss),
        ]
        for point in found
    ]
    return header, rows


def caption(records: Sequence[dict[str, Any]]) -> str:
    """What the figures of a run are of, in a few sentences."""
    record = records[0]
    settings, documents = record["settings"], record["documents"]
    text = (
        f"Accuracy and mean loss (nats) on the same {sum(row['targets'] for row in documents):,} masked tokens of "
        f"{len(documents)} documents, the first {settings['tokens']:,} tokens of each, in windows of each length. "
        f"Whole words are chosen, {settings['mlm_probability']:.0%} of them; of their tokens 80 % become [MASK], 10 % "
        "a random token, 10 % stay. Intervals: bootstrap over the documents; the ratio is paired."
    )
    for model, table in {other["model"]: other["position_table"] for other in records}.items():
        if table is not None:
            text += f" {model} has {table} positions: for longer windows they are interpolated, or repeated."
    if any(other["positions"] is None for other in records):
        text += " Without context: the best answer to the token in the place and the frequencies of words alone."
    if any(other["positions"] == SHUFFLED for other in records):
        text += " Shuffled: what is not masked stands in random order within a window."
    if len({other["settings"]["masks_sha256"] for other in records}) > 1:
        text += " The models have different tokenizers: compare their ratios, not their accuracies."
    return text


def markdown(records: Sequence[dict[str, Any]], trained_length: int, *, command: str) -> str:
    """The table in Markdown, the caption and the command above it."""
    header, rows = table_rows(points(records, trained_length), trained_length)
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return f"{caption(records)}\n\n```bash\n{command}\n```\n\n" + "\n".join(lines) + "\n"


def curves(found: Sequence[Point]) -> dict[str, list[Point]]:
    """System -> its points by length; an extended table goes on from the last length that the table itself covers."""
    lines: dict[str, list[Point]] = {}
    for point in sorted(found, key=lambda point: point.length):
        if point.system not in lines and not point.is_reference:
            own = [other for other in found if other.model == point.model and not other.is_reference]
            before = [other for other in own if other.length < point.length]
            lines[point.system] = [max(before, key=lambda other: other.length)] if before else []
        lines.setdefault(point.system, []).append(point)
    return lines


def matplotlib_figure() -> type:
    """matplotlib's `Figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("evaluation.length_plot needs: pip install -e '.[evaluate]'") from error
    return Figure


def figure_of(records: Sequence[dict[str, Any]], trained_length: int) -> Any:
    """The figure: accuracy against the length, a band for the interval, a line at the trained length.

    Args:
        records: See `points`.
        trained_length: Tokens; where the vertical line stands.

    Returns:
        matplotlib's `Figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = matplotlib_figure()(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    found = points(records, trained_length)
    for number, (system, line) in enumerate(curves(found).items()):
        colour = COLOURS[number % len(COLOURS)]
        lengths = [point.length for point in line]
        style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[number % len(DASHES)]}
        axis.plot(lengths, [point.accuracy for point in line], color=colour, label=system, markersize=5, **style)
        if all(point.interval for point in line):
            low, high = zip(*(point.interval or () for point in line), strict=True)
            axis.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axvline(trained_length, color="#555555", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    ticks = sorted({point.length for point in found})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    top = max(point.interval[1] if point.interval else point.accuracy for point in found)
    axis.set_ylim(0, 1.12 * top if top > 0 else 1)
    place = {"xy": (trained_length, 0.99), "xycoords": ("data", "axes fraction"), "va": "top", "fontsize": 9}
    axis.annotate(f" trained at {trained_length}", **place)
    documents = records[0]["documents"]
    title = f"The same {sum(row['targets'] for row in documents):,} masked tokens at every length"
    bands = f"; bands: 95 % over {len(documents)} documents" if len(documents) > 1 else ""
    axis.set_title(title + bands, fontsize=10)
    axis.set(xlabel="tokens of the input", ylabel="MLM accuracy")
    axis.grid(alpha=0.3)
    axis.legend(loc="best", frameon=False, fontsize=9)
    return figure


def write_plot(path: Path, records: Sequence[dict[str, Any]], trained_length: int):
    """Writes the figure (.png, .svg or .pdf, by the name); see `figure_of`."""
    figure_of(records, trained_length).savefig(path, dpi=150)
