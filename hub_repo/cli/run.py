"""One run over an input: into parts and a file, or as JSON lines to the standard output; with progress on a terminal.

Law: the standard output carries data only. Progress, the last line and warnings go to the standard error.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..embedding.model_folder import ModelFolder
from ..embedding.parts import PART_ROWS, Part, Parts, batches
from ..embedding.text_input import STDIN, InputError, Reading, TextInput
from ..embedding.vector_files import Layout, check_output, json_lines


@dataclass
class Totals:
    """What a run has gone through: texts and rows, those of them done before, and what was truncated."""

    texts: int = 0
    texts_before: int = 0
    rows: int = 0
    rows_before: int = 0
    cut_texts: int = 0
    cut_tokens: int = 0

    def add(self, part: Part, *, before: bool = False):
        """Counts a part."""
        self.texts += part.texts
        self.texts_before += part.texts if before else 0
        self.rows += part.rows
        self.rows_before += part.rows if before else 0
        self.cut_texts += part.cut_texts
        self.cut_tokens += part.cut_tokens


@dataclass(frozen=True)
class Writing:
    """Where rows go; see `options` for each. `output` None is JSON lines to the standard output.

    Raises:
        ValueError: A name that cannot be written, or options that contradict each other.
    """

    output: Path | None
    dtype: str = "float32"
    part_rows: int = PART_ROWS
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self):
        if self.output is not None:
            check_output(self.output)
        elif self.resume or self.overwrite:
            raise ValueError("--resume and --overwrite are for an output that is a file: give --output.")


def write(source: TextInput, model: ModelFolder, columns: Sequence[str], how: Writing):
    """Embeds the texts and writes their rows.

    Args:
        source: The texts.
        model: What embeds them.
        columns: Of `vector_files.COLUMNS`, in formats that have columns.
        how: Where the rows go.
    """
    if how.output is None:
        layout = Layout(tuple(columns), model.dimensions, how.dtype)
        rows = model.encoding.batch_size if model.encoding.chunks is None else 1
        to_stdout(source, model, layout, batch_rows=rows)
        return
    if any(Path(file).resolve() == how.output.resolve() for file in source.files):
        raise ValueError(f"{how.output} is an input: name another output.")
    suffix = how.output.suffix
    layout = Layout(() if suffix == ".npy" else tuple(columns), model.dimensions, how.dtype)
    parts = Parts(how.output, model.job(), layout, suffix=suffix, part_rows=how.part_rows)
    with parts.opened(resume=how.resume, overwrite=how.overwrite):
        to_file(source, model, parts, quiet=how.quiet)


def open_input(files: list[str] | None, texts: list[str] | None, reading: Reading) -> TextInput:
    """The input of a command: arguments and files, or else what is piped into it.

    Raises:
        InputError: There is none.
    """
    if not files and not texts:
        if sys.stdin.isatty():
            raise InputError("no input: name FILES, or pipe texts into the command.")
        files = [STDIN]
    return TextInput(files or [], texts or [], reading)


def to_file(
    source: TextInput,
    model: ModelFolder,
    parts: Parts,
    *,
    join: Callable[[list[Path], Path], None] | None = None,
    quiet: bool = False,
) -> Totals:
    """Writes the output of `parts`, which are open.

    Args:
        source: The texts.
        model: What embeds them; loaded here.
        parts: See `Parts`.
        join: See `Parts.finish`.
        quiet: Whether to say nothing but warnings.

    Returns:
        What was done.
    """
    totals, embed = Totals(), model.embedder(parts.layout)
    start = time.monotonic()
    try:
        with _progress(source, quiet=quiet) as update:
            for part, before in parts.run(source, embed):
                totals.add(part, before=before)
                update(totals)
    except BaseException:
        if parts.done:
            kept = sum(part.texts for part in parts.done)
            without = " in place of --overwrite" if parts.overwritten else ""
            say(
                f"{kept:,} texts are done and kept in {parts.folder}: the same command with --resume{without} goes on."
            )
        raise
    parts.finish(join)
    warn(source, model, totals)
    if not quiet:
        new, seconds = totals.rows - totals.rows_before, time.monotonic() - start
        before = f" ({totals.texts_before:,} of them before)" if totals.texts_before else ""
        say(
            f"{parts.output}: {totals.rows:,} vectors of {parts.layout.dimensions} dimensions from {totals.texts:,} "
            f"texts{before}; {seconds:.1f} s, {new / max(seconds, 1e-9):,.0f} vectors/s"
        )
    return totals


def to_stdout(source: TextInput, model: ModelFolder, layout: Layout, *, batch_rows: int) -> Totals:
    """Writes JSON lines as they come; see `to_file`."""
    totals = Totals()
    embed = model.embedder(layout)
    utf8_stdout()
    for batch in batches(source, batch_rows):
        result = embed(batch)
        for line in json_lines(result.embeddings, layout):
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
        totals.add(Part(len(batch), len(result.embeddings), "", result.cut_texts, result.cut_tokens))
    warn(source, model, totals)
    return totals


def utf8_stdout():
    """Data on the standard output are UTF-8 with line feeds, as in a file, whatever the locale is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")


def warn(source: TextInput, model: ModelFolder, totals: Totals):
    """Says what is not in the vectors."""
    if totals.cut_texts:
        limit = model.encoding.max_length
        say(
            f"warning: {totals.cut_texts:,} of {totals.texts:,} texts are longer than "
            f"{'the limit of the model' if limit is None else f'--max-length {limit}'}; {totals.cut_tokens:,} tokens "
            "are not embedded. A larger --max-length embeds them."
        )
    if source.lenient_count:
        say(f"warning: {source.lenient_count:,} texts were not UTF-8 or null and taken leniently.")
    if not totals.texts:
        say("warning: the input holds no text.")


def say(message: str):
    """One line on the standard error."""
    print(message, file=sys.stderr)


@contextmanager
def _progress(source: TextInput, *, quiet: bool) -> Iterator[Callable[[Totals], None]]:
    """A bar of the bytes read, where the standard error is a terminal."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("0 texts", total=source.total_bytes or None)

        def update(totals: Totals):
            progress.update(task, description=f"{totals.texts:,} texts", completed=source.bytes_read)

        yield update
