"""What the commands that compare readers of long documents share: options, records on disk, how they begin and end.

Law: a record is on disk as soon as its way is scored.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .command_line import add_placement, ending
from .records import Samples, read_records, read_samples, samples_id, samples_path, write_records, write_samples
from .sets import EvaluationError


class Store:
    """Records and their samples, on disk after every addition.

    Args:
        path: JSON file of the records, whether it exists or not; the samples are beside it.

    Raises:
        EvaluationError: The records are not ours.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records = read_records(self.path)
        self.samples = read_samples(samples_path(self.path))

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The record of `model`, `set` and `settings`, if its samples are there, too."""
        known = [record for record in self.records if key.items() <= record.items()]
        return known[0] if known and samples_id(key) in self.samples else None

    def add(self, record: dict[str, Any], samples: Samples):
        """Adds a record, or takes the place of that of the same model, set and settings."""
        key = {name: record[name] for name in ("model", "set", "settings")}
        self.samples[samples_id(key)] = samples
        write_samples(samples_path(self.path), self.samples)
        self.records = [other for other in self.records if not key.items() <= other.items()]
        self.records.append({**record, "samples": samples_id(key)})
        write_records(self.path, self.records)


@dataclass(frozen=True)
class Answer:
    """The files in the folder of a command, and what makes those for people.

    Attributes:
        records: Name of the JSON file.
        table: Name of the Markdown file.
        figure: Name of the image.
        markdown: The table, from records and samples.
        write_figure: Draws records into a file.
    """

    records: str
    table: str
    figure: str
    markdown: Callable[[Sequence[dict[str, Any]], dict[str, Samples]], str]
    write_figure: Callable[[Path, Sequence[dict[str, Any]]], None]

    def store(self, folder: Path) -> Store:
        """The records of a folder, which is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        return Store(folder / self.records)


def reader_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options --model, --baseline, --output and those of `add_placement`.

    Args:
        module: Of the command, for example "evaluation.needle".
        description: The docstring of that module; its first line is shown.
    """
    parser = argparse.ArgumentParser(prog=module, description=(description or "").splitlines()[0])
    parser.add_argument("--model", action="append", default=[], help="JinaBERT folder or Hub repository; repeatable")
    parser.add_argument(
        "--baseline", action="append", default=[], help="all-MiniLM-L6-v2 or a sentence-transformers model; repeatable"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder; a run goes on from what it holds")
    add_placement(parser)
    return parser


def check_readers(arguments: argparse.Namespace):
    """Raises `EvaluationError` where the options of `reader_parser` name no model, or a file to write into."""
    if not arguments.model and not arguments.baseline:
        raise EvaluationError("nothing to evaluate: give --model, --baseline, or both.")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise EvaluationError(f"--output {arguments.output}: is a file.")


def run_command(
    argv: Sequence[str] | None,
    *,
    module: str,
    logger: logging.Logger,
    parse: Callable[[Sequence[str]], argparse.Namespace],
    run: Callable[..., Store],
    answer: Answer,
):
    """Runs a command, writes its answer and prints the table; it ends as `evaluation.command_line` says.

    Args:
        argv: Words after the name of the command; None takes those of this process.
        module: Of the command, for the records.
        logger: Of that module, which says how far the command is.
        parse: Reads the words.
        run: Scores what they name, called with them and `command`, the command line.
        answer: The files of the command.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    arguments = parse(argv)
    with ending(arguments.output):
        store = run(arguments, command=shlex.join(["python", "-m", module, *argv]))
    table = answer.markdown(store.records, store.samples)
    (arguments.output / answer.table).write_text(table, encoding="utf-8")
    answer.write_figure(arguments.output / answer.figure, store.records)
    print(table, end="")
    print(f"wrote {arguments.output / answer.records}, {answer.table} and {answer.figure}")
