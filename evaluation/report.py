"""All results in one page: static HTML that opens without a network, and the same in Markdown.

    python -m evaluation.report --results evaluation/results --output report/index.html --markdown report/report.md

Law: the page holds what the result files hold, and nothing else: each section is rendered from its JSON by the code of
the command that wrote it. A section without its file says which command makes it.
"""

import argparse
import base64
import functools
import html
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import glue_report, late_chunking, length_plot, long_report, mteb_run, needle, robustness
from .compare import Model, adjust, compare, legend, marks_of, read_models
from .loading import MINILM
from .records import of_last_weights, read_records, read_samples, samples_path
from .set_types import EvaluationError
from .systems import BM25
from .tables import markdown_table, table_rows

try:
    from markdown_it import MarkdownIt
except ImportError as error:
    raise ImportError("evaluation.report needs: pip install -e '.[evaluate]'") from error

PAGE = Path(__file__).parent / "templates" / "report.html"
_ENVIRONMENT = (
    "model", "weights", "python", "torch", "transformers", "sentence-transformers", "processor", "cores", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """What a section shows: Markdown, and figures by their titles as PNG."""

    markdown: str
    figures: dict[str, bytes]


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: Its heading.
        question: What it answers, one sentence.
        files: Patterns of its result files, below the results folder.
        command: What makes them.
        render: Files -> what is shown.
    """

    title: str
    question: str
    files: tuple[str, ...]
    command: str
    render: Callable[[list[Path]], Rendered]


def own_first(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records in their order, those of all-MiniLM-L6-v2 and then of BM25 behind those of other models."""
    places = {MINILM: 1, BM25.name: 2}
    return sorted(records, key=lambda record: places.get(record.get("model"), 0))


def _local(files: list[Path]) -> Rendered:
    """A table for the files of each folder, which hold whole sets or samples of them."""
    folders: dict[Path, list[Path]] = {}
    for file in files:
        if file.name != "comparison.json":  # what evaluation.compare wrote
            folders.setdefault(file.parent, []).append(file)
    return Rendered("\n".join(map(_local_table, folders.values())), {})


def _local_table(files: list[Path]) -> str:
    records = own_first([record for file in files for record in of_last_weights(read_records(file))])
    limits = {record["protocol"]["max_texts"] for record in records if "max_texts" in record.get("protocol", {})}
    commands = dict.fromkeys(record["command"] for record in records if "command" in record)
    lines = [f"# Sets cut to {max(limits):,} texts at most" if limits else "# Whole sets", ""]
    header, rows = table_rows(records)
    found_models = (model for file in files if samples_path(file).exists() for model in read_models(file))
    models: list[Model] = [model for model in found_models if model.records[0] in records]
    models.sort(key=lambda model: header.index(model.title))
    if len(models) > 1:
        found = adjust([row for other in models[1:] for row in compare(models[0], other)])
        marks = marks_of(found)
        rows = [
            [*row[:3], *(x + marks.get((row[0], row[2], y), "") for x, y in zip(row[3:], header[3:], strict=True))]
            for row in rows
        ]
        lines += [*legend(models[0], found), ""]
    # The size of a set comes last: on a phone the first columns are what is seen.
    header, *rows = ([row[0], *row[2:], row[1]] for row in (header, *rows))
    table = markdown_table(header, rows, names=2)
    return "\n".join([*lines, *(f"    {command}" for command in commands), "", table])


def _late_chunking(files: list[Path]) -> Rendered:
    return Rendered("\n".join(late_chunking.markdown(of_last_weights(read_records(file))) for file in files), {})


def _long(files: list[Path]) -> Rendered:
    records = own_first([record for file in files for record in read_records(file, ())])
    samples = {name: found for file in files for name, found in read_samples(samples_path(file)).items()}
    figure = _png(lambda path: long_report.write_figure(path, records))
    return Rendered(long_report.markdown(records, samples), {"Score by maximum length": figure})


def _needle(files: list[Path]) -> Rendered:
    records = [record for file in files for record in read_records(file, ())]
    samples = {name: found for file in files for name, found in read_samples(samples_path(file)).items()}
    figure = _png(lambda path: needle.write_figure(path, records))
    return Rendered(needle.markdown(records, samples), {"Score by depth and length": figure})


def _mteb(files: list[Path]) -> Rendered:
    return Rendered(mteb_run.markdown([record for file in files for record in read_records(file, ())]), {})


def _masked_words(files: list[Path]) -> Rendered:
    """Each file has documents of its own, and so a table and a figure of its own."""
    pieces, figures = [], {}
    for file in files:
        records = length_plot.one_run(read_records(file, ()))
        trained = length_plot.trained_length(records)
        command = "; ".join(dict.fromkeys(record["command"] for record in records if "command" in record))
        pieces.append(length_plot.markdown(records, trained, command=command))
        name = "Accuracy and loss by length" + (f" {file.stem}" if len(files) > 1 else "")
        figures[name] = _png(functools.partial(length_plot.write_plot, records=records, trained_length=trained))
    return Rendered("\n\n".join(pieces), figures)


def _glue(files: list[Path]) -> Rendered:
    return Rendered("\n".join(glue_report.markdown(_content(file)) for file in files), {})


def _robustness(files: list[Path]) -> Rendered:
    pieces = []
    for file in files:
        content = _content(file)
        sizes = " x ".join(f"{size:,} {name}" for name, size in content["sizes"].items())
        table = markdown_table(*robustness.table_rows(content["records"]), names=1)
        pieces.append(f"{content['model']} on {content['set']} ({sizes}).\n\n    {content['command']}\n\n{table}")
    return Rendered("\n".join(pieces), {})


def _environment(files: list[Path]) -> Rendered:
    """One row for each model, its weights, and versions and machine that results of it were computed with."""
    found: dict[tuple[str, ...], list[str]] = {}
    for file in files:
        content = _content(file)
        for record in own_first([_with_head(content, record) for record in content["records"]]):
            row = _environment_row(record)
            name = f"{file.parent.name}/{file.name}"
            if row is not None and name not in found.setdefault(row, []):
                found[row].append(name)
    rows = [[*row, ", ".join(names)] for row, names in found.items()]
    text = (
        "Weights: the first digits of a SHA-256 of names and values, as the records have it; the same weights in "
        'sentence-transformers have other names and so another hash than alone. "-": not recorded.'
    )
    return Rendered(f"{text}\n\n{markdown_table([*_ENVIRONMENT, 'results'], rows, names=len(_ENVIRONMENT) + 1)}", {})


def _with_head(content: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """A record with what its file says once for all of them."""
    return {**{name: value for name, value in content.items() if name != "records"}, **record}


def _environment_row(record: dict[str, Any]) -> tuple[str, ...] | None:
    """None for a record that nothing was computed for."""
    settings, machine = record.get("settings", {}), record.get("environment", {})
    versions = {**machine, **record.get("versions", machine.get("versions", {}))}
    if not versions:
        return None
    weights = settings.get("weights_sha256", settings.get("backbone_sha256", "-"))[:12]
    return (record["model"], weights, *(str(versions.get(name, "-")) for name in _ENVIRONMENT[2:]))


SECTIONS = (
    Section(
        "Local sets",
        "How good is the model beside all-MiniLM-L6-v2 and BM25 on retrieval, similarity, clustering, classification?",
        ("tiny.json", "local/*.json"),
        "python -m evaluation.local --model hub_repo/tiny --data DATA --output evaluation/results/tiny.json",
        _local,
    ),
    Section(
        "Masked words by length",
        "Is a masked word predicted as well in 8,192 tokens as at the trained length, and by absolute positions?",
        ("mlm-length*.json",),
        "python -m evaluation.mlm --model JinaBERT=FOLDER --model BERT=FOLDER --data BOOKS.jsonl.zst "
        "--output evaluation/results/mlm-length.json",
        _masked_words,
    ),
    Section(
        "Long documents",
        "Is one vector of the whole document worth it, or is its start, or are its chunks, as good?",
        ("long/records*.json",),
        "python -m evaluation.long_documents --model hub_repo/tiny --data DATA --output evaluation/results/long",
        _long,
    ),
    Section(
        "Depth of the relevant passage",
        "Where in a long document may the relevant passage be?",
        ("long/needle*.json",),
        "python -m evaluation.needle --model hub_repo/tiny --data DATA --output evaluation/results/long",
        _needle,
    ),
    Section(
        "Late chunking",
        "Are passages found better if their document is read as a whole?",
        ("late-chunking*.json",),
        "python -m evaluation.late_chunking --model hub_repo/tiny --data DATA --sets ir/NAME "
        "--output evaluation/results/late-chunking.json",
        _late_chunking,
    ),
    Section(
        "MTEB",
        "The paper's tasks, beside its published rows.",
        ("mteb/scores*.json",),
        "python -m evaluation.mteb_run --model hub_repo/tiny --output evaluation/results/mteb",
        _mteb,
    ),
    Section(
        "GLUE",
        "How good is the backbone on language understanding, beside the paper's rows?",
        ("glue*.json",),
        "python -m evaluation.glue --model FOLDER --config evaluation/recipes/glue-tiny.yaml --data DATA/eval/glue "
        "--output evaluation/results/glue-tiny.json",
        _glue,
    ),
    Section(
        "Robustness of the embedding",
        "What changes a vector that should not: the batch, padding, precision, case, white space?",
        ("robustness*.json",),
        "python -m evaluation.robustness --model hub_repo/tiny --data DATA --set ir/NAME "
        "--output evaluation/results/robustness.json",
        _robustness,
    ),
    Section(
        "Environment",
        "Which weights, versions and machine do the scores come from?",
        ("*.json", "*/*.json"),
        "the commands above",
        _environment,
    ),
)


def _content(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}).") from None


def _png(write: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figure.png"
        write(path)
        return path.read_bytes()


def found_files(section: Section, results: Path) -> list[Path]:
    """The result files of a section, by pattern and name; none if it was not measured."""
    return [file for pattern in section.files for file in sorted(results.glob(pattern))]


def rendered(section: Section, results: Path) -> Rendered:
    """What a section shows; how it is made, if its files are not there.

    Raises:
        EvaluationError: A file is there and is not one of ours.
    """
    files = found_files(section, results)
    if not files:
        return Rendered(f"Not measured. `{results / section.files[0]}` is written by\n\n    {section.command}\n", {})
    try:
        return section.render(files)
    except EvaluationError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        names = ", ".join(map(str, files))
        raise EvaluationError(
            f"{names}: not the results of this version ({type(error).__name__}: {error})."
        ) from error


def lowered(markdown: str) -> str:
    """Headings one or two steps down, below that of the section.

    Example:
        >>> lowered("# GLUE\\ntext # 1\\n## Every score")
        '### GLUE\\ntext # 1\\n#### Every score'
    """
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in markdown.splitlines())


def markdown_page(shown: Sequence[tuple[Section, Rendered]], title: str, figures: Path | None) -> str:
    """The report in Markdown; figures are written beside it, into the folder `figures`, or left out for None."""
    pieces = [f"# {title}"]
    for section, content in shown:
        pieces += [f"## {section.title}", section.question, lowered(content.markdown)]
        for name, png in content.figures.items():
            if figures is not None:
                figures.mkdir(parents=True, exist_ok=True)
                path = figures / f"{_anchor(name)}.png"
                path.write_bytes(png)
                pieces.append(f"![{name}]({figures.name}/{path.name})")
    return "\n\n".join(piece.strip("\n") for piece in pieces) + "\n"


def html_page(shown: Sequence[tuple[Section, Rendered]], title: str) -> str:
    """The report as one HTML file: no script, no address of another file."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    body, contents = [], []
    for section, content in shown:
        anchor = _anchor(section.title)
        contents.append(f'<li><a href="#{anchor}">{html.escape(section.title)}</a></li>')
        text = parser.render(lowered(content.markdown))
        text = text.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
        body.append(f'<section id="{anchor}"><h2>{html.escape(section.title)}</h2>')
        body.append(f'<p class="question">{html.escape(section.question)}</p>{text}')
        for name, png in content.figures.items():
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            alt = html.escape(name)
            body.append(f'<figure><img src="{source}" alt="{alt}"><figcaption>{alt}</figcaption></figure>')
        body.append("</section>")
    page = PAGE.read_text(encoding="utf-8")
    values = {"TITLE": html.escape(title), "CONTENTS": "\n".join(contents), "SECTIONS": "\n".join(body)}
    for name, value in values.items():
        page = page.replace(f"<!-- {name} -->", value)
    return page


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def main(argv: Sequence[str] | None = None):
    """Entry point; a wrong input ends it with one line and status 2."""
    parser = argparse.ArgumentParser(prog="evaluation.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", required=True, type=Path, help="folder of the result files")
    parser.add_argument("--output", required=True, type=Path, help="HTML file")
    parser.add_argument("--markdown", type=Path, help="the same in Markdown, its figures beside it")
    parser.add_argument("--title", default="JinaBERT: what was measured", help="of the page")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.results.is_dir():
            raise EvaluationError(f"--results {arguments.results}: is no folder.")
        shown = [(section, rendered(section, arguments.results)) for section in SECTIONS]
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for path in filter(None, (arguments.output, arguments.markdown)):
        path.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(html_page(shown, arguments.title), encoding="utf-8")
    if arguments.markdown:
        figures = arguments.markdown.parent / "figures"
        arguments.markdown.write_text(markdown_page(shown, arguments.title, figures), encoding="utf-8")
    missing = [section.title for section in SECTIONS if not found_files(section, arguments.results)]
    print(f"wrote {arguments.output}" + (f"; not measured: {', '.join(missing)}" if missing else ""))


if __name__ == "__main__":
    main()
