"""`jina-bert encode`: texts -> vectors, in files that can be resumed or as JSON lines."""

from typing import Annotated

import typer

from ..embedding.model_folder import Encoding, ModelFolder
from ..embedding.text_input import Reading
from . import options
from .run import Writing, open_input, write

EXAMPLE = """Examples:

    jina-bert encode --model hub_repo/tiny --text "How is the weather?"

    jina-bert encode --model hub_repo/tiny corpus.jsonl.zst --id-column _id -o corpus.parquet

    cat lines.txt | jina-bert encode --model hub_repo/tiny -o lines.npy
"""


def encode(
    model: options.Model,
    files: options.Files = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text itself; may be repeated.")] = None,
    output: options.Output = None,
    column: options.Column = "text",
    id_column: options.IdColumn = None,
    format_: options.InputFormat = None,
    whole_files: options.Whole = False,
    lenient: options.Lenient = False,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = None,
    no_truncation: options.NoTruncation = False,
    normalize: Annotated[bool, typer.Option(help="Scale vectors to length 1.")] = True,
    truncate_dim: options.TruncateDim = None,
    dtype: options.VectorDtype = options.Numbers.float32,
    model_dtype: options.ModelDtype = None,
    device: options.Device = None,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Write the texts beside the vectors.")] = False,
    part_rows: options.PartRows = options.DEFAULT_PART_ROWS,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
):
    """Embed texts: one vector a text, in the order of the input.

    Without FILES and --text, the lines of the standard input. A text file is one text a line, empty lines included.
    Texts are embedded as they are: these models have no prompts. An interrupted run is finished by the same command
    with --resume, to the same bytes.
    """
    encoding = Encoding(
        device, model_dtype and model_dtype.value, batch_size, max_length, not no_truncation, normalize, truncate_dim
    )
    if max_length is not None and no_truncation:
        raise ValueError("--max-length cuts texts and --no-truncation does not: give one of them.")
    if output is not None and output.suffix == ".npy" and (id_column or keep_text):
        raise ValueError(f"{output} holds vectors alone: take .parquet or .jsonl for --id-column and --keep-text.")
    how = Writing(output, dtype.value, part_rows, resume, overwrite, quiet)
    source = open_input(files, text, Reading(format_ and format_.value, column, id_column, whole_files, lenient))
    columns = ("file", "row", *(("id",) if id_column else ()), *(("text",) if keep_text else ()))
    write(source, ModelFolder(model, encoding), columns, how)
