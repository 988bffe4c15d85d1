"""`jina-bert search`: an index of texts on disk, and queries to it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..embedding.model_folder import Encoding, ModelFolder
from ..embedding.parts import Parts, batches
from ..embedding.search_index import Hit, SearchIndex, is_index, write_index
from ..embedding.text_input import STDIN, Reading, Row, TextInput
from ..embedding.vector_files import Layout
from . import options
from .chunk import chunks_of
from .run import open_input, to_file, utf8_stdout

BUILD_EXAMPLE = """Examples:

    jina-bert search build library.index --model hub_repo/tiny library/*.txt --chunks sentences

    jina-bert search build corpus.index --model hub_repo/tiny corpus.jsonl --id-column _id
"""
QUERY_EXAMPLE = """Examples:

    jina-bert search query library.index "Why is the door so low?"

    jina-bert search query corpus.index --json --top 100 < questions.txt > results.jsonl
"""
_SNIPPET = 240  # characters

Index = Annotated[Path, typer.Argument(help="Folder of the index.")]


def build(
    index: Index,
    files: Annotated[list[str], typer.Argument(help="Text, JSONL, CSV, TSV (also .gz, .zst) or parquet files.")],
    model: options.Model,
    chunks: Annotated[
        str | None,
        typer.Option(help='Late chunking: "sentences", or a number of tokens; else a text is one vector.'),
    ] = None,
    column: options.Column = "text",
    id_column: options.IdColumn = None,
    format_: options.InputFormat = None,
    whole_files: options.Whole = True,
    lenient: options.Lenient = False,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = None,
    truncate_dim: options.TruncateDim = None,
    model_dtype: options.ModelDtype = None,
    device: options.Device = None,
    part_rows: options.PartRows = options.DEFAULT_PART_ROWS,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
):
    """Embed files and write an index of them.

    A text file is one text. The index keeps texts, identifiers and paths; it is exact (every vector is compared).
    """
    if index.exists() and not is_index(index) and not (index.is_dir() and not any(index.iterdir())):
        raise ValueError(f"{index} exists and is no index, or holds other files too: it is left alone.")
    if not index.absolute().parent.is_dir():
        raise ValueError(f"{index}: there is no folder {index.parent}.")
    encoding = Encoding(
        device, model_dtype and model_dtype.value, batch_size, max_length, truncate_dim=truncate_dim,
        chunks=None if chunks is None else chunks_of(chunks, "--chunks"),
    )  # fmt: skip
    source = open_input(files, None, Reading(format_ and format_.value, column, id_column, whole_files, lenient))
    folder = ModelFolder(model, encoding)
    places = () if chunks is None else ("chunk", "start", "end")
    layout = Layout(("file", "row", *(("id",) if id_column else ()), *places, "text"), folder.dimensions)
    description = {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "model_sha256": folder.sha256,
        "truncate_dim": truncate_dim,
        "chunks": encoding.chunks,
    }
    parts = Parts(index, folder.job(), layout, suffix=".parquet", part_rows=part_rows)
    with parts.opened(resume=resume, overwrite=overwrite):
        to_file(source, folder, parts, quiet=quiet, join=lambda paths, to: write_index(paths, to, layout, description))


def query(
    index: Index,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Queries; without any, the lines of the standard input.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Results of a query.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a query.")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Where the model of the index is now; any other model is refused."),
    ] = None,
    device: options.Device = None,
):
    """Search an index.

    Results come best first with the cosine to the query. Several queries at once load the model once.
    """
    found = SearchIndex(index)
    description = found.description
    name = description.model if model is None else model
    source = (
        TextInput([], texts) if texts else open_input([STDIN] if not sys.stdin.isatty() else None, None, Reading())
    )
    folder = ModelFolder(name, Encoding(device, truncate_dim=description.truncate_dim))
    found.check_model(name, folder.sha256)
    embed = folder.embedder(Layout((), description.dimensions))
    for batch in batches(source):
        for row, hits in zip(batch, found.search(embed(batch).embeddings.vectors, top), strict=True):
            _print_json(row, hits) if as_json else _print(row, hits)


def _print_json(row: Row, hits: list[Hit]):
    utf8_stdout()
    results = [{"rank": hit.rank, "score": round(hit.score, 6), **hit.document} for hit in hits]
    print(json.dumps({"query": row.text, "results": results}, ensure_ascii=False))


def _print(row: Row, hits: list[Hit]):
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(_shown(row.text), style="bold"))
    for hit in hits:
        document = hit.document
        place = document.get("id") or f"{document['file']}, text {document['row']}"
        if "start" in document:
            place += f", characters {document['start']}-{document['end']}"
        console.print(Text.assemble(f"{hit.rank:>3}  {hit.score:.3f}  ", (_shown(place), "cyan")))
        console.print(Text(f"            {_shown(document['text'])}"))


def _shown(text: str) -> str:
    """One line of a text, without what a terminal would obey."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * _SNIPPET]).split())
    return line if len(text) <= 2 * _SNIPPET and len(line) <= _SNIPPET else line[:_SNIPPET] + " ..."
