"""Retrieval, sentence similarity, pair classification, clustering and classification on local files.

    python -m evaluation.local --model hub_repo/tiny --data DATA --baseline bm25 --output results.json

For embedding models and BM25; `evaluation.sets` says what DATA holds, `evaluation.compare` sets results side by side.

Laws: everything wrong with names and files is reported before the first text is embedded; a score already in the
output, of the same texts, model and settings, is not computed again; every score comes with its interval and,
beside the JSON in a .npz file, what it was computed from, item by item.
COST: all sets and models of a run are held in memory.
"""

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command_line import add_placement, ending, placement_of
from .records import (
    Samples,
    read_records,
    read_samples,
    samples_id,
    samples_path,
    versions,
    write_records,
    write_samples,
)
from .scoring import Protocol, Scored, score
from .sets import EvaluationError, EvaluationSet, available_sets, load_set, select_sets
from .significance import intervals
from .systems import System, load_system
from .tables import markdown_table, print_table, table_rows

logger = logging.getLogger(__name__)


class Results:
    """The records of an output file and their samples; what is added is on the disk at once.

    What another process has added meanwhile stays.

    Args:
        output: JSON file; need not exist.

    Raises:
        EvaluationError: It holds something else.
    """

    def __init__(self, output: Path):
        self.output = output
        self.records = read_records(output)
        self.samples: dict[str, Samples] = read_samples(samples_path(output))

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The record with that key, if it is whole: with the samples of its scores, or without scores."""
        for record in self.records:
            if key.items() <= record.items():
                identifier = record.get("samples")
                if identifier in self.samples or all(value is None for value in record["metrics"].values()):
                    return record
        return None

    def add(self, key: dict[str, Any], record: dict[str, Any], samples: Samples | None):
        """Adds a record in place of older ones of the same system, set and protocol."""
        same = {name: key[name] for name in ("model", "set", "settings")}

        def is_older(other: dict[str, Any]) -> bool:
            return same.items() <= other.items() and other.get("protocol", key["protocol"]) == key["protocol"]

        self.records = [other for other in read_records(self.output) if not is_older(other)] + [record]
        self.samples |= read_samples(samples_path(self.output))
        if samples is not None:
            self.samples[record["samples"]] = samples
        named = {other.get("samples") for other in self.records}
        self.samples = {name: arrays for name, arrays in self.samples.items() if name in named}
        write_samples(samples_path(self.output), self.samples)
        write_records(self.output, self.records)


def evaluate(
    systems: Sequence[System],
    datasets: Sequence[EvaluationSet],
    output: Path,
    *,
    command: str,
    protocol: Protocol | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Scores every system on every set, and writes `output` after each.

    Args:
        systems: What to evaluate.
        datasets: On what.
        output: JSON file; records of other systems, settings and sets in it are kept.
        command: Command line, for the records.
        protocol: How; None is the default one.
        force: Compute scores again that `output` has.

    Returns:
        The records of `systems` x `datasets`, set by set.

    Raises:
        EvaluationError: `output` holds something else, or a vector is not finite.
    """
    protocol = protocol or Protocol()
    held = Results(output)
    provenance = {"versions": versions(), "command": command}
    settings = [system.settings for system in systems]
    results = []
    for whole in datasets:
        dataset = protocol.cut(whole)
        of_set = {"set": whole.name, "protocol": protocol.of(whole), "data_sha256": dataset.sha256}
        for system, its_settings in zip(systems, settings, strict=True):
            key = {"model": system.name, "settings": its_settings, **of_set}
            known = None if force else held.find(key)
            if known is not None:
                logger.info("%s on %s: already scored", system.name, dataset.name)
                results.append(known)
                continue
            started = time.monotonic()
            scored = score(system, dataset, protocol)
            record = {**key, **_measured(dataset.task, scored, samples_id(key)), **system.placed, **provenance}
            record["seconds"] = round(time.monotonic() - started, 1)
            held.add(key, record, scored.samples)
            results.append(record)
            logger.info("%s on %s: %s (%.0f s)", system.name, dataset.name, _summary(record), record["seconds"])
    return results


def _measured(task: str, scored: Scored, identifier: str) -> dict[str, Any]:
    """What a record holds of the answers."""
    found = {"task": task, "metrics": scored.metrics, "sizes": scored.sizes}
    if scored.samples is not None:
        of_all = intervals(task, scored.samples)
        found |= {"intervals": {name: x and list(x) for name, x in of_all.items()}, "samples": identifier}
    return found


def _summary(record: dict[str, Any]) -> str:
    return ", ".join(f"{x} {'-' if y is None else format(y, '.4f')}" for x, y in record["metrics"].items())


def small_first(datasets: Sequence[EvaluationSet]) -> list[EvaluationSet]:
    """The sets by the characters to embed; those of one folder, which share texts, one after the other.

    Args:
        datasets: In any order.
    """

    def folder(dataset: EvaluationSet) -> str:
        kind, *rest = dataset.name.split("/")
        return f"texts/{rest[0]}" if kind in ("clustering", "classification") else "/".join([kind, *rest[:1]])

    cost: dict[str, int] = {}
    for dataset in datasets:
        cost[folder(dataset)] = max(cost.get(folder(dataset), 0), dataset.characters)
    return sorted(datasets, key=lambda dataset: (cost[folder(dataset)], folder(dataset)))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for an unknown option."""
    parser = argparse.ArgumentParser(prog="evaluation.local", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="sentence-transformers folder or Hub repository")
    parser.add_argument(
        "--baseline", action="append", default=[], help="bm25, all-MiniLM-L6-v2, or as --model; repeatable"
    )
    parser.add_argument("--data", required=True, type=Path, help="folder that has eval/")
    parser.add_argument(
        "--sets",
        nargs="+",
        help="names or patterns ('clustering/*'), separated by commas or spaces (default: all); small sets first",
    )
    parser.add_argument("--output", required=True, type=Path, help="JSON file; a run goes on from what it holds")
    parser.add_argument("--markdown", type=Path, help="file for the table in Markdown")
    parser.add_argument("--max-length", type=int, help="tokens a text is cut at (default: the model's own limit)")
    parser.add_argument(
        "--max-texts", type=int, help="queries, documents, pairs or texts that a set is cut to (default: whole sets)"
    )
    parser.add_argument("--runs", type=int, default=10, help="clusterings, and classifiers (default: %(default)s)")
    parser.add_argument(
        "--samples-per-label", type=int, default=8, help="texts a classifier learns from (default: %(default)s)"
    )
    add_placement(parser)
    parser.add_argument("--force", action="store_true", help="compute scores again that the output has")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace):
    """Reports what is wrong with them by themselves.

    Raises:
        EvaluationError: A number out of range, an output that cannot be written, or nothing to evaluate.
    """
    if arguments.model is None and not arguments.baseline:
        raise EvaluationError("nothing to evaluate: give --model, --baseline, or both.")
    if arguments.max_length is not None and arguments.max_length < 3:
        raise EvaluationError(
            f"--max-length {arguments.max_length}: the least is 3 tokens ([CLS], one of the text, [SEP])."
        )
    for name, least in (("max_texts", 10), ("runs", 1), ("samples_per_label", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise EvaluationError(f"--{name.replace('_', '-')} {value}: the least is {least}.")
    for path in filter(None, (arguments.output, arguments.markdown)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise EvaluationError(f"{path}: is a folder, or lies in none.")
    read_records(arguments.output)


def load_sets(data: Path, patterns: Sequence[str] | None) -> list[EvaluationSet]:
    """The sets that --sets names, in the order of the patterns, those of one pattern (or all) the small ones first.

    Raises:
        EvaluationError: One is missing or malformed, or there is none.
    """
    patterns = [x for y in patterns or ["*"] for x in y.split(",") if x]
    if not available_sets(data):
        raise EvaluationError(f"--data {data}: no sets in its folder eval.")
    select_sets(data, patterns)  # every name is checked before the first file is read
    found: dict[str, EvaluationSet] = {}
    for pattern in patterns:
        new = [load_set(data, name) for name in select_sets(data, [pattern]) if name not in found]
        found |= {dataset.name: dataset for dataset in small_first(new)}
    return list(found.values())


def run(arguments: argparse.Namespace, *, command: str) -> list[dict[str, Any]]:
    """Loads what the command line names and evaluates it.

    Raises:
        EvaluationError: Something it names is missing or malformed.
    """
    check_arguments(arguments)
    protocol = Protocol(arguments.max_texts, arguments.runs, arguments.samples_per_label)
    placement = placement_of(arguments)
    datasets = load_sets(arguments.data, arguments.sets)
    for dataset in datasets:
        protocol.cut(dataset)  # before the first text is embedded: it may leave too few texts
    baselines = [name for name in dict.fromkeys(arguments.baseline) if name != arguments.model]
    systems = [
        load_system(name, placement=placement, max_length=arguments.max_length, baseline=name != arguments.model)
        for name in filter(None, [arguments.model, *baselines])
    ]
    return evaluate(systems, datasets, arguments.output, command=command, protocol=protocol, force=arguments.force)


def main(argv: Sequence[str] | None = None):
    """Entry point; a wrong input ends it with one line and status 2, Ctrl-C with status 130."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    arguments = parse_arguments(argv)
    with ending(arguments.output):
        records = run(arguments, command=shlex.join(["python", "-m", "evaluation.local", *argv]))
    header, rows = table_rows(records)
    print_table(header, rows)
    if arguments.markdown:
        arguments.markdown.write_text(markdown_table(header, rows), encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
