"""Commands of `jina-bert` run in this process, for the tests of the command line; the shipped model is loaded once."""

import csv
import functools
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import REPOSITORY, SHIPPED
from typer.testing import CliRunner

from hub_repo.cli import application
from hub_repo.embedding import model_folder
from modeling_jina_bert import JinaBertModel

TEXTS = ["Berlin is in Germany.", "", 'a "quoted", text', "naïve Ωμέγα 漢字", "U+2028\u2028inside", " two  spaces "]
MULTILINE = [*TEXTS, "first line\nsecond line\r\nthird"]
LIBRARY = REPOSITORY / "evaluation" / "demo_library"


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The model of a folder is loaded by the first command that wants it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_folder, "load_model", functools.cache(model_folder.load_model))
        patch.setenv("JINA_BERT_MODEL", str(SHIPPED))
        yield


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


app = functools.cache(application)


def run(*arguments, stdin=b""):
    """Status, standard output and standard error of a command."""
    result = CliRunner().invoke(app(), [str(argument) for argument in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def succeed(*arguments, **options):
    status, stdout, stderr = run(*arguments, **options)
    assert status == 0, stderr
    return stdout, stderr


def refuse(*arguments, **options):
    """The one line that a wrong command gets."""
    status, stdout, stderr = run(*arguments, **options)
    assert status == 2, (status, stdout, stderr)
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert stdout == ""
    return stderr


def rows_of(stdout):
    return [json.loads(line) for line in stdout.split("\n")[:-1]]


def write(path, texts, more=None):
    """A file of the form that its name says, with the texts as "text" and identifiers t0, t1, ... as "name".

    `more` are further fields of JSON lines, a list of values each.
    """
    names = [f"t{number}" for number in range(len(texts))]
    if path.suffix == ".parquet":
        columns = {"name": names, "text": pa.array(texts).dictionary_encode(), "n": list(range(len(texts)))}
        pq.write_table(pa.table(columns), path, row_group_size=2)
        return path
    table = io.StringIO()
    if ".jsonl" in path.name:
        columns = {"name": names, "text": texts, **(more or {})}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        table.writelines(json.dumps(row) + "\n\n" for row in rows)
    elif path.suffix in (".csv", ".gz"):
        writer = csv.writer(table, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writerows([["name", "text"], *zip(names, texts, strict=True)])
    else:
        table.write("".join(f"{text}\r\n" for text in texts))
    data = table.getvalue().encode("utf-8-sig")
    compress = {".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    half = len(data) // 2
    path.write_bytes(compress(data[:half]) + compress(data[half:]))  # two frames, as of files that were appended
    return path


class Interrupt:
    """Lets `encode` of a model run so many times, then interrupts it as Ctrl-C does."""

    def __init__(self, monkeypatch, calls):
        self.calls = 0

        def encode(model, texts, **options):
            self.calls += 1
            if self.calls > calls:
                raise KeyboardInterrupt
            return before(model, texts, **options)

        before = JinaBertModel.encode
        monkeypatch.setattr(JinaBertModel, "encode", encode)


def last_line(result):
    status, _, stderr = result
    assert status == 2
    return stderr.splitlines()[-1]
