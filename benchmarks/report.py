"""Tables, Markdown and plot of a results file.

    python -m benchmarks.report benchmarks/results/speed-small-cpu.json

Law: everything here is derived from the JSON document and from nothing else; a system that could not be measured has
its place and its reason. Medians are over the rounds; a ratio is the median of the ratios within each round.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .results import BenchmarkError, find_record, read_results
from .workloads import MIX

MIB = 2**20
DISTURBED = 0.1
"""Cores that other processes may take, on average over the rounds, before the report warns."""
_ROUNDING_S = 0.02  # of the processor time of others, in every call


@dataclass
class Table:
    """A table with a sentence above it; the first column is text, the others are figures."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def tokens_per_second(record: dict[str, Any]) -> float:
    """At the median of the rounds."""
    return record["tokens"] / median(record["seconds"])


def ratio(record: dict[str, Any]) -> float | None:
    """How many times as many tokens per second as the reference: the median over the rounds that have both.

    Example:
        >>> ratio({"seconds": [1.0, 2.0, 9.0], "reference_seconds": [2.0, 5.0, None]})
        2.25
    """
    pairs = zip(record["reference_seconds"], record["seconds"], strict=True)
    ratios = [reference / seconds for reference, seconds in pairs if reference is not None]
    return median(ratios) if ratios else None


def peak_bytes(record: dict[str, Any]) -> int | None:
    """The largest over the rounds; None if it was not measured."""
    known = [value for value in record["peak_bytes"] if value is not None]
    return max(known, default=None)


def lengths_of(results: dict[str, Any]) -> list[int | str]:
    """The lengths that were measured, in ascending order of the longest sequence."""
    longest = {record["length"]: record["longest"] for record in results["records"]}
    return sorted(longest, key=longest.__getitem__)


def length_title(results: dict[str, Any], length: int | str) -> str:
    """Length and batch: "512 x 8"; of a mix its range."""
    record = next(record for record in results["records"] if record["length"] == length)
    if isinstance(length, int):
        return f"{length} x {record['batch']}"
    if length != MIX:
        return f"{length}: up to {record['longest']} x {record['batch']}"
    mix = results["settings"]["mix"]
    return f"{length}: {min(mix)}-{max(mix)} x {len(mix)}"


def _matrix(results: dict[str, Any], cell: Callable[[dict[str, Any]], str | None]) -> list[list[str]]:
    """Rows of systems, columns of lengths; where there is no figure, the status."""
    rows = []
    for name, system in results["systems"].items():
        row = [name if system["dtype"] in name else f"{name} ({system['dtype']})"]
        for length in lengths_of(results):
            record = find_record(results, name, length)
            if record is None:
                row.append("")
            elif record["status"] == "ok":
                row.append(cell(record) or "-")
            else:
                row.append(record["status"])
        rows.append(row)
    return rows


def speed_tables(results: dict[str, Any]) -> list[Table]:
    """Tokens per second with their ratios, and their spread."""
    settings = results["settings"]
    header = ["system", *(length_title(results, length) for length in lengths_of(results))]

    def speed(record: dict[str, Any]) -> str:
        times = ratio(record)
        speed = f"{tokens_per_second(record):,.0f}"
        return speed if times is None else f"{speed} ({times:.2f})"

    def spread(record: dict[str, Any]) -> str:
        slowest, fastest = (record["tokens"] / pick(record["seconds"]) for pick in (max, min))
        return f"{slowest:,.0f} - {fastest:,.0f}"

    note = (
        f"Median of {settings['rounds']} rounds; in brackets times the speed of {settings['reference']}, median "
        "of the ratios within each round. Columns: tokens a sequence x sequences a call. Padding does not count."
    )
    return [
        Table("Tokens per second", note, header, _matrix(results, speed)),
        Table("Spread of tokens per second", "Slowest and fastest round.", header, _matrix(results, spread)),
    ]


def memory_table(results: dict[str, Any]) -> Table:
    """Peak memory of a call, and what is resident after loading."""
    header = ["system", *(length_title(results, length) for length in lengths_of(results)), "loaded"]

    def cell(record: dict[str, Any]) -> str | None:
        peak = peak_bytes(record)
        return None if peak is None else f"{peak / MIB:,.0f}"

    rows = _matrix(results, cell)
    for row, system in zip(rows, results["systems"].values(), strict=True):
        loaded = system.get("loading", {}).get("loaded_bytes")
        row.append("-" if loaded is None else f"{loaded / MIB:,.0f}")
    # The memory of bare products says nothing.
    kinds = [system["kind"] for system in results["systems"].values()]
    rows = [row for row, kind in zip(rows, kinds, strict=True) if kind != "ceiling"]
    note = (
        "MiB during a call above what is in memory after loading, largest of the rounds; last column: the "
        "whole process after loading (on CUDA: the weights)."
    )
    return Table("Peak memory", note, header, rows)


def skipped_table(results: dict[str, Any]) -> Table | None:
    """Share of the attention scores that ours left out; None if nothing counted it."""
    if not any(record.get("skipped_share") is not None for record in results["records"]):
        return None

    def cell(record: dict[str, Any]) -> str | None:
        share = record.get("skipped_share")
        return None if share is None else f"{share:.1%}"

    header = ["system", *(length_title(results, length) for length in lengths_of(results))]
    rows = [row for row in _matrix(results, cell) if any(value.endswith("%") for value in row)]
    note = (
        "Share of the attention scores that is proven to be below rounding and not computed, counted in the call. "
        f"Random weights, standard deviation {results['settings']['initializer_range']}: trained ones differ."
    )
    return Table("Left out of attention", note, header, rows)


def ceiling_table(results: dict[str, Any]) -> Table | None:
    """What the matrix products alone would allow, and how much of it ours reach; None if it was not measured."""
    lengths, rows = lengths_of(results), []
    for name, system in results["systems"].items():
        if system["kind"] != "ceiling":
            continue
        records = [find_record(results, name, length) for length in lengths]
        bounds = [_bounds(record) if record and record["status"] == "ok" else None for record in records]
        if not any(bounds):
            continue
        dtype = system["dtype"]
        rows.append([f"linear layers, {dtype}", *(f"{bound[0]:,.0f}" if bound else "-" for bound in bounds)])
        rows.append([f"and all scores, {dtype}", *(f"{bound[1]:,.0f}" if bound else "-" for bound in bounds)])
        for ours, other in results["systems"].items():
            if other["kind"] == "ours" and other["dtype"] == dtype:
                found = [find_record(results, ours, length) for length in lengths]
                shares = [_shares(record, bound) for record, bound in zip(found, bounds, strict=True)]
                if any(share != "-" for share in shares):
                    rows.append([ours, *shares])
    note = (
        "Tokens per second if nothing but the matrix products of the linear layers took time, then also those of "
        "attention over all scores; below, the share of either that ours reach. Above 100% of the second: skipping."
    )
    header = ["bound", *(length_title(results, length) for length in lengths)]
    return Table("Ceiling of the matrix products", note, header, rows) if rows else None


def _bounds(record: dict[str, Any]) -> tuple[float, float]:
    with_attention = median(record["seconds"]) + record["attention_seconds"]
    return tokens_per_second(record), record["tokens"] / with_attention


def _shares(record: dict[str, Any] | None, bounds: tuple[float, float] | None) -> str:
    if record is None or record["status"] != "ok" or bounds is None:
        return "-"
    speed = tokens_per_second(record)
    return f"{speed / bounds[0]:.0%} / {speed / bounds[1]:.0%}"


def utilisation_table(results: dict[str, Any]) -> Table | None:
    """TFLOP/s on a GPU and, if the peak is known, the share of it."""
    if results["settings"]["device"] != "cuda":
        return None
    peaks = [run["peak_tflops"] for run in results["runs"]]

    def cell(record: dict[str, Any]) -> str:
        tflops = record["operations"] / median(record["seconds"]) / 1e12
        peak = peaks[record["run"]]
        return f"{tflops:.1f}" if peak is None else f"{tflops:.1f} ({tflops / peak:.0%})"

    header = ["system", *(length_title(results, length) for length in lengths_of(results))]
    # The ceiling does not compute attention: the operations of a model are not its own.
    kinds = {name: system["kind"] for name, system in results["systems"].items()}
    rows = [row for row, kind in zip(_matrix(results, cell), kinds.values(), strict=True) if kind != "ceiling"]
    note = "TFLOP/s, all scores of attention counted whether computed or not; in brackets the share of --peak-tflops."
    return Table("Achieved operations", note, header, rows)


def disturbance(results: dict[str, Any]) -> str | None:
    """A warning if other processes computed during the calls; threads that wait for one another then lose most."""
    worst: tuple[float, str] = (0.0, "")
    for record in results["records"]:
        others = [value for value in record["others_cpu_seconds"] if value is not None]
        if record["seconds"] and len(others) == len(record["seconds"]):
            share = (sum(others) - _ROUNDING_S * len(others)) / sum(record["seconds"])
            worst = max(worst, (share, f"{record['system']} at {record['length']}"))
    if worst[0] <= DISTURBED:
        return None
    return f"DISTURBED: other processes took up to {worst[0]:.2f} cores during the calls ({worst[1]}); measure again."


def make_tables(results: dict[str, Any]) -> list[Table]:
    """All tables that the document has figures for."""
    optional = (utilisation_table(results), skipped_table(results), ceiling_table(results))
    return [*speed_tables(results), memory_table(results), *(table for table in optional if table is not None)]


def reasons(results: dict[str, Any]) -> list[str]:
    """One line for every system and reason why something was not measured."""
    found: dict[tuple[str, str], list[str]] = {}
    for length in lengths_of(results):
        for name in results["systems"]:
            record = find_record(results, name, length)
            if record is not None and record["status"] != "ok":
                message = " ".join((record["message"] or "").split())
                found.setdefault((name, f"{record['status']}: {message}"), []).append(str(length))
    return [f"{name} at {', '.join(lengths)}: {reason}" for (name, reason), lengths in found.items()]


def run_lines(results: dict[str, Any]) -> list[str]:
    """Command, commit and machine of every run, one line each."""
    lines = []
    for run in results["runs"]:
        machine = run["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        commit = (machine["git_commit"] or "unknown")[:12] + (" with changes" if machine["git_changes"] else "")
        memory = "unknown" if machine["memory_bytes"] is None else f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        sets = ", ".join(machine["instruction_sets"]) or "instruction sets unknown"
        load = "unknown" if machine["load_average"] is None else f"{machine['load_average'][0]:.1f}"
        lines.append(
            f"`{run['command']}`, {run['started']}, commit {commit}; {machine['cpu']}, {machine['physical_cores']} "
            f"cores, {sets}, memory {memory}, load before the run {load}; {versions}"
        )
    for name, system in results["systems"].items():
        if "gpu" in system.get("loading", {}):
            return [*lines, f"{system['loading']['gpu']}, CUDA {system['loading']['cuda']} (as {name} sees it)"]
    return lines


def system_lines(results: dict[str, Any]) -> list[str]:
    """One line a system: what it is, and what it says about itself."""
    lines = []
    for name, system in results["systems"].items():
        loading = system.get("loading", {})
        said = [f"computes in {loading['precision']}"] if "precision" in loading else []
        if "largest_difference_to_torch" in loading:
            said.append(f"largest difference of a hidden state to torch {loading['largest_difference_to_torch']:.1g}")
        lines.append("; ".join((f"{name}: {system['description']}", *said)))
    return lines


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    settings = results["settings"]
    shape = settings["shape"]
    parts = [
        f"# Speed and memory, {shape['name']} on {settings['device']}",
        f"{shape['layers']} layers, {shape['hidden']} hidden, {shape['heads']} heads, {shape['intermediate']}"
        f" intermediate; {settings['threads']} threads; random weights and tokens; written by benchmarks.report.",
        "\n".join(f"- {line}" for line in run_lines(results)),
    ]
    warning = disturbance(results)
    if warning is not None:
        parts.append(f"**{warning}**")
    for table in make_tables(results):
        rule = "|---|" + "---:|" * (len(table.header) - 1)
        rows = [f"| {' | '.join(row)} |" for row in (table.header, *table.rows)]
        parts += [f"## {table.title}", table.note, "\n".join([rows[0], rule, *rows[1:]])]
    parts += ["## Systems", "\n".join(f"- {line}" for line in system_lines(results))]
    if reasons(results):
        parts += ["## Not measured", "\n".join(f"- {line}" for line in reasons(results))]
    return "\n\n".join(parts) + "\n"


def print_report(results: dict[str, Any]):
    """Prints the tables."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable
    except ImportError as error:
        raise ImportError("benchmarks.report needs: pip install -e '.[benchmarks]'") from error
    console = Console()
    for table in make_tables(results):
        printed = RichTable(title=table.title, caption=table.note)
        for position, name in enumerate(table.header):
            printed.add_column(escape(name), justify="right" if position else "left", overflow="fold")
        for row in table.rows:
            printed.add_row(*map(escape, row))
        console.print(printed)
    for line in filter(None, (*reasons(results), disturbance(results))):
        console.print(escape(line), highlight=False)


def write_report(path: Path, results: dict[str, Any]) -> list[Path]:
    """Writes Markdown and plot beside the results file.

    Args:
        path: Of the JSON document.
        results: The document.

    Returns:
        The files that were written.
    """
    from .plot import write_plot

    text, image = path.with_suffix(".md"), path.with_suffix(".png")
    text.write_text(markdown(results), encoding="utf-8")
    write_plot(image, results)
    return [text, image]


def main(argv: Sequence[str] | None = None):
    """Entry point; a file that is not ours ends it with one line and status 2."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON file of benchmarks.speed")
    path = parser.parse_args(argv).results
    try:
        results = read_results(path)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print_report(results)
    for written in write_report(path, results):
        print(f"wrote {written}")


if __name__ == "__main__":
    main()
