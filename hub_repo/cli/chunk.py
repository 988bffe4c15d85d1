"""`jina-bert chunk`: late chunking, a vector for each sentence, run of tokens or given span, in its context."""

from typing import Annotated

import typer

from ..embedding.model_folder import GIVEN_SPANS, Encoding, ModelFolder
from ..embedding.text_input import Reading
from . import options
from .run import Writing, open_input, write

EXAMPLE = """Examples:

    jina-bert chunk --model hub_repo/tiny book.txt -o book.parquet

    jina-bert chunk --model hub_repo/tiny --by 128 articles.jsonl --column body -o chunks.jsonl

    jina-bert chunk --model hub_repo/tiny sections.parquet --spans-column spans -o sections.jsonl
"""

By = Annotated[str | None, typer.Option("--by", help='"sentences", or a number of tokens; sentences by default.')]
SpansColumn = Annotated[
    str | None,
    typer.Option(help="JSONL field or parquet column of the chunks: a list of [start, end], characters of the text."),
]
Overlap = Annotated[
    int, typer.Option(min=0, help="Tokens that a window repeats of the one before, in texts of several windows.")
]
_PART_ROWS = 64


def chunks_of(by: str, option: str = "--by") -> str | int:
    """What `--by`, or an option of another name, says.

    Raises:
        ValueError: Neither "sentences" nor a positive number.
    """
    if by == "sentences":
        return by
    if by.isdecimal() and int(by):
        return int(by)
    raise ValueError(f"{option} {by}: give sentences, or a number of tokens.")


def chunk(
    model: options.Model,
    files: options.Files = None,
    output: options.Output = None,
    by: By = None,
    spans_column: SpansColumn = None,
    column: options.Column = "text",
    id_column: options.IdColumn = None,
    format_: options.InputFormat = None,
    whole_files: options.Whole = True,
    lenient: options.Lenient = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens that are read together; longer texts in overlapping windows. The model's by default."
        ),
    ] = None,
    overlap: Overlap = 256,
    normalize: Annotated[bool, typer.Option(help="Scale vectors to length 1.")] = True,
    truncate_dim: options.TruncateDim = None,
    dtype: options.VectorDtype = options.Numbers.float32,
    model_dtype: options.ModelDtype = None,
    device: options.Device = None,
    part_rows: options.PartRows = _PART_ROWS,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
):
    """Embed the chunks of texts, each in the context of its whole text (late chunking).

    A row is a chunk: file, row (number of the text in the file), id, chunk (from 0), start and end (its characters in
    the text), first_token and end_token (its tokens, counted with special ones), text, embedding; each end is not
    included. Without FILES, the standard input. A text file is one text; a text without a word has no chunk.
    """
    if by is not None and spans_column is not None:
        raise ValueError("--by and --spans-column both say what a chunk is: give one of them.")
    encoding = Encoding(
        device, model_dtype and model_dtype.value, max_length=max_length, normalize=normalize,
        truncate_dim=truncate_dim, overlap=overlap,
        chunks=chunks_of(by or "sentences") if spans_column is None else GIVEN_SPANS,
    )  # fmt: skip
    if output is not None and output.suffix == ".npy":
        raise ValueError(f"{output} would hold vectors without their chunks: take .parquet or .jsonl.")
    how = Writing(output, dtype.value, part_rows, resume, overwrite, quiet)
    reading = Reading(format_ and format_.value, column, id_column, whole_files, lenient, spans_column)
    source = open_input(files, None, reading)
    places = ("chunk", "start", "end", "first_token", "end_token")
    columns = ("file", "row", *(("id",) if id_column else ()), *places, "text")
    write(source, ModelFolder(model, encoding), columns, how)
