"""The options that several verbs of `jina-bert` share, each declared once."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..embedding.parts import PART_ROWS
from ..embedding.text_input import FORMATS
from ..embedding.vector_files import DTYPES

Format = Enum("Format", {name: name for name in FORMATS}, type=str)
Numbers = Enum("Numbers", {name: name for name in DTYPES}, type=str)
Precision = Enum("Precision", {name: name for name in ("float32", "float16", "bfloat16")}, type=str)

_MODEL = "The model"
_INPUT = "The input"
_OUTPUT = "The output"

Files = Annotated[
    list[str] | None,
    typer.Argument(help="Text, JSONL, CSV, TSV (also .gz, .zst) or parquet files; - is the standard input."),
]
Model = Annotated[
    str,
    typer.Option("--model", "-m", envvar="JINA_BERT_MODEL", help="Folder or Hub repository.", rich_help_panel=_MODEL),
]
Device = Annotated[
    str | None,
    typer.Option(help="As cpu or cuda:1; the first GPU if there is one.", rich_help_panel=_MODEL),
]
ModelDtype = Annotated[
    Precision | None,
    typer.Option(help="What the model computes in; as config.json says by default.", rich_help_panel=_MODEL),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts computed together at most.", rich_help_panel=_MODEL)]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens of a text at most, the two special ones included; the rest is cut off and counted. "
        "8192 in the released models by default.",
        rich_help_panel=_MODEL,
    ),
]
NoTruncation = Annotated[
    bool, typer.Option("--no-truncation", help="Embed texts whole, however long.", rich_help_panel=_MODEL)
]
TruncateDim = Annotated[
    int | None, typer.Option(min=1, help="Keep the first dimensions only.", rich_help_panel=_MODEL)
]
InputFormat = Annotated[
    Format | None,
    typer.Option("--format", help="Of the input, where the names of files do not say it.", rich_help_panel=_INPUT),
]
Column = Annotated[
    str, typer.Option(help="JSONL field, or CSV or parquet column, of the texts.", rich_help_panel=_INPUT)
]
IdColumn = Annotated[
    str | None,
    typer.Option(help="Field or column of identifiers, which go with the rows.", rich_help_panel=_INPUT),
]
Whole = Annotated[
    bool,
    typer.Option(
        "--whole-files/--lines", help="A text file is one text, or each line is one.", rich_help_panel=_INPUT
    ),
]
Lenient = Annotated[
    bool,
    typer.Option(
        "--lenient",
        help="Take bytes that are not UTF-8 as U+FFFD and null as the empty text; without it they are errors.",
        rich_help_panel=_INPUT,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="File to write, .npy, .parquet or .jsonl; without it JSON lines go to the standard output.",
        rich_help_panel=_OUTPUT,
    ),
]
VectorDtype = Annotated[
    Numbers, typer.Option("--dtype", help="Of the numbers that are written.", rich_help_panel=_OUTPUT)
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with an interrupted run, given the same input.", rich_help_panel=_OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an output that exists, and drop what an interrupted run left.",
        rich_help_panel=_OUTPUT,
    ),
]
PartRows = Annotated[
    int,
    typer.Option(min=1, help="Texts that are kept at a time; an interruption loses fewer.", rich_help_panel=_OUTPUT),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Errors and warnings only.", rich_help_panel=_OUTPUT),
]
DEFAULT_PART_ROWS = PART_ROWS
