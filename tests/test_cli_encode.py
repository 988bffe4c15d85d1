"""`jina-bert encode`: every text of every input once, or one line that names the place.

Pins: each text of each kind of input is embedded once, in order, as `model.encode` does; bad input is one line that
names the place, status 2, and leaves nothing behind; an interrupted run, killed or not, ends in the bytes of an
uninterrupted one and embeds nothing twice; memory does not grow with the rows.
"""

import csv
import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from cli_runs import (  # noqa: F401  pytest finds the fixtures by name
    MULTILINE,
    TEXTS,
    Interrupt,
    in_a_folder,
    last_line,
    loaded_once,
    refuse,
    rows_of,
    run,
    succeed,
    write,
)
from conftest import REPOSITORY, SHIPPED
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub_repo.embedding.parts import Parts, PartsError, Result, batches
from hub_repo.embedding.text_input import InputError, Reading, Row, TextInput
from hub_repo.embedding.vector_files import Embeddings, Layout
from modeling_jina_bert import JinaBertModel


@pytest.fixture(scope="module")
def model():
    return JinaBertModel.from_pretrained(SHIPPED)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst", "a.jsonl", "a.jsonl.zst", "a.csv", "a.tsv.gz", "a.parquet"])
def test_every_text_of_every_kind_of_file_once_and_in_order(tmp_path, name, model):
    texts = TEXTS if ".txt" in name else MULTILINE
    has_ids = ["--id-column", "name"] if ".txt" not in name else []
    write(tmp_path / name, texts)
    succeed("encode", name, "-o", "out.parquet", "--keep-text", "--part-rows", 4, *has_ids)
    table = pq.read_table("out.parquet")
    assert table.column("text").to_pylist() == texts
    assert table.column("row").to_pylist() == list(range(len(texts)))
    assert set(table.column("file").to_pylist()) == {name}
    if has_ids:
        assert table.column("id").to_pylist() == [f"t{number}" for number in range(len(texts))]
    vectors = np.array(table.column("embedding").to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, model.encode(texts, normalize_embeddings=True), atol=1e-6)
    assert os.listdir() == [name, "out.parquet"] or sorted(os.listdir()) == [name, "out.parquet"]


def test_a_tsv_without_quotes_loses_no_row(tmp_path):
    """A text that begins with a quotation mark would take the next rows in."""
    (tmp_path / "a.tsv").write_text('name\ttext\n1\t"Hello\n2\tworld"\n')
    assert "a.tsv, line 3: line breaks and tabs within quotes" in refuse("encode", "a.tsv", "-o", "out.parquet")


def test_arguments_standard_input_and_several_files_in_their_order(tmp_path, model):
    (tmp_path / "b.txt").write_text("in b\n")
    stdout, _ = succeed("encode", "-", "b.txt", "--text", "said", "--keep-text", stdin=b"piped\nno line feed")
    rows = rows_of(stdout)
    found = [(row["text"], row["file"], row["row"]) for row in rows]
    assert found == [("said", None, 0), ("piped", "-", 0), ("no line feed", "-", 1), ("in b", "b.txt", 0)]
    expected = model.encode(["said", "piped", "no line feed", "in b"], normalize_embeddings=True)
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)


def test_the_three_outputs_hold_the_same_numbers(tmp_path):
    write(tmp_path / "a.txt", TEXTS)
    for name in ("out.npy", "out.jsonl", "out.parquet"):
        succeed("encode", "a.txt", "-o", name, "--part-rows", 4)
    vectors = np.load("out.npy")
    assert vectors.dtype == np.float32
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert (np.array([json.loads(line)["embedding"] for line in lines], np.float32) == vectors).all()
    assert (np.array(pq.read_table("out.parquet").column("embedding").to_pylist(), np.float32) == vectors).all()
    succeed("encode", "a.txt", "-o", "half.parquet", "--dtype", "float16")
    half = pq.read_table("half.parquet").column("embedding")
    assert half.type.value_type == pa.float16()
    np.testing.assert_array_equal(np.array(half.to_pylist(), np.float16), vectors.astype(np.float16))


def test_options_reach_the_model(tmp_path, model):
    text = "word " * 40
    short = np.array(rows_of(succeed("encode", "-t", text, "--max-length", 12)[0])[0]["embedding"])
    np.testing.assert_allclose(short, model.encode(text, max_length=12, normalize_embeddings=True), atol=1e-6)
    raw, _ = succeed("encode", "-t", text, "--no-normalize", "--truncate-dim", 7)
    np.testing.assert_allclose(rows_of(raw)[0]["embedding"], model.encode(text)[:7], rtol=1e-5)
    (tmp_path / "long.txt").write_text(f"{text}\nshort\n{text}\n")
    _, stderr = succeed("encode", "long.txt", "-o", "x.npy", "--max-length", 12, "--part-rows", 1)
    assert "2 of 3 texts are longer than --max-length 12; 60 tokens are not embedded" in stderr
    assert stderr.count("longer than") == 1
    _, stderr = succeed("encode", "long.txt", "-o", "y.npy", "--no-truncation")
    assert "longer" not in stderr
    assert not np.allclose(np.load("x.npy")[0], np.load("y.npy")[0], atol=1e-3)


BAD = {
    "invalid.txt": (b"good\nbad \xff byte\n", "invalid.txt, line 2: not UTF-8: byte 0xff at position 4"),
    "utf16.txt": ("ab\n".encode("utf-16"), "utf16.txt, line 1: not UTF-8"),
    "no-column.csv": (b"title,body\na,b\n", "no-column.csv: no column 'text'; it has title, body"),
    "empty.csv": (b"", "empty.csv: no column 'text'; it has none"),
    "ragged.csv": (b"text,n\nfine,1\nx,2,3\n", "ragged.csv, line 3: 3 fields, the header has 2"),
    "open-quote.csv": (b'text,n\n"fine",1\n"never closed,2\n', "open-quote.csv, line 3: no CSV"),
    "twice.csv": (b"text,text\na,b\n", "column 'text' is there 2 times"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "cut.jsonl, line 2: no JSON"),
    "array.jsonl": (b'["text"]\n', "array.jsonl, line 1: ['text'] (list) is no JSON object"),
    "missing.jsonl": (b'{"text": "a"}\n{"txt": "b"}\n', "missing.jsonl, line 2: no field 'text'; it has txt"),
    "number.jsonl": (b'{"text": 12}\n', "number.jsonl, line 1: 'text' is 12 (int), not a text"),
    "null.jsonl": (b'{"text": null}\n', "null.jsonl, line 1: 'text' is null"),
    "nan.jsonl": (b'{"text": NaN}\n', "nan.jsonl, line 1: 'text' is NaN"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "surrogate.jsonl, line 1: 'text': not UTF-8"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1: no JSON"),
    "data.json": (b"{}", "data.json: .json may mean anything"),
    "fake.parquet": (b"PAR1 is not enough", "fake.parquet is no parquet file"),
    "fake.txt.gz": (b"not gzip", "fake.txt.gz cannot be read"),
    "fake.txt.zst": (b"not zstd", "fake.txt.zst cannot be read"),
    "cut.txt.zst": (zstandard.ZstdCompressor().compress(os.urandom(99_999))[:-9], "in the middle of a zstd frame"),
    "cut.txt.gz": (gzip.compress(b"a\n" * 999)[:-9], "cut.txt.gz cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_that_names_the_place(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    lenient = ["--lenient"] if name == "cut.txt.zst" else []  # random bytes: only the end is to be what is wrong
    assert message in refuse("encode", name, "-o", "out.npy", *lenient)
    assert os.listdir() == [name]


def test_bad_columns_of_parquet(tmp_path):
    invalid = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xfe"]).buffers())
    for name, column, message in (
        ("numbers", pa.array([1, 2]), "numbers.parquet: column 'text' is of type int64, not text"),
        ("null", pa.array(["a", None]), "null.parquet, row 1: 'text' is null"),
        ("invalid", invalid, "invalid.parquet, row 0: not UTF-8: byte 0xfe"),
    ):
        pq.write_table(pa.table({"text": column}), f"{name}.parquet")
        assert message in refuse("encode", f"{name}.parquet", "-o", "out.npy")
    assert "no column 'body'; it has text" in refuse("encode", "null.parquet", "--column", "body")
    whole = (tmp_path / "null.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cut.parquet is no parquet file" in refuse("encode", "cut.parquet")


def test_lenient_takes_the_nearest_text_and_counts(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"bad \xff\nfine\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": null}\n{"text": NaN}\n{"text": "\\ud800"}\n')
    stdout, stderr = succeed("encode", "a.txt", "b.jsonl", "--lenient", "--keep-text")
    assert [row["text"] for row in rows_of(stdout)] == ["bad \ufffd", "fine", "", "", "\ufffd" * 3]
    assert "4 texts were not UTF-8 or null" in stderr
    assert "is 12 (int), not a text" in refuse("encode", "-", "--format", "jsonl", "--lenient", stdin=b'{"text": 12}')


def test_progress_is_for_terminals_and_data_alone_for_the_standard_output(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", TEXTS)
    _, quiet = succeed("encode", "a.txt", "-o", "out.npy", "--quiet")
    assert quiet == ""
    _, plain = succeed("encode", "a.txt", "-o", "out.npy", "--overwrite")
    assert plain.count("\n") == 1
    monkeypatch.setenv("FORCE_COLOR", "1")  # as of a terminal
    monkeypatch.setenv("TERM", "xterm")
    stdout, shown = succeed("encode", "a.txt", "-o", "out.npy", "--overwrite")
    assert (stdout, "100%" in shown, f"{len(TEXTS)} texts" in shown) == ("", True, True)


def test_inputs_without_texts_give_outputs_without_rows(tmp_path):
    (tmp_path / "empty.txt").touch()
    for name in ("out.npy", "out.jsonl", "out.parquet"):
        _, stderr = succeed("encode", "empty.txt", "-o", name)
        assert "the input holds no text" in stderr
    assert np.load("out.npy").shape == (0, 256)
    assert pq.read_table("out.parquet").column_names == ["file", "row", "embedding"]
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert "gives no vector" in refuse("search", "build", "i", "--lines", "empty.txt").replace("warning", "")
    assert not (tmp_path / "i").exists()


@pytest.mark.slow
def test_a_text_of_one_word_of_ten_million_letters_and_100_000_empty_ones(tmp_path, model):
    (tmp_path / "a.txt").write_bytes(b"before\n" + b"a" * 10_000_000 + b"\n" + b"\n" * 100_000)
    succeed("encode", "a.txt", "-o", "out.npy")
    vectors = np.load("out.npy")
    assert len(vectors) == 100_002
    expected = model.encode(["before", "[UNK]", ""], normalize_embeddings=True)
    np.testing.assert_allclose(vectors[:3], expected, atol=1e-6)
    np.testing.assert_allclose(vectors[2:], np.broadcast_to(expected[2], (100_000, 256)), atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=12), max_size=8), st.booleans())
def test_any_bytes_are_their_lines_or_an_error_that_names_the_line(tmp_path_factory, lines, lenient):
    path = tmp_path_factory.getbasetemp() / "fuzz.txt"
    data = b"\n".join(lines)
    path.write_bytes(data)
    expected = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    expected = [*(line.removesuffix(b"\r") for line in expected[:-1]), *expected[-1:]] if expected else []
    if expected and data.endswith(b"\n"):
        expected[-1] = expected[-1].removesuffix(b"\r")
    bad = [number for number, line in enumerate(expected, 1) if not _is_utf8(line)]
    source = TextInput([str(path)], reading=Reading(lenient=lenient))
    if bad and not lenient:
        with pytest.raises(InputError, match=rf"fuzz.txt, line {bad[0]}: not UTF-8"):
            list(source)
    else:
        assert [row.text for row in source] == [line.decode(errors="replace") for line in expected]
        assert source.lenient_count == len(bad)


def _is_utf8(data):
    try:
        return data.decode() is not None
    except UnicodeDecodeError:
        return False


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.text(), max_size=2)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from(["text", "other"]), VALUES), max_size=5))
def test_any_json_rows_are_embedded_or_refused(rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    wrong = [number for number, row in enumerate(rows, 1) if not isinstance(row.get("text"), str)]
    if wrong:
        assert f"-, line {wrong[0]}: " in refuse(
            "encode", "--format", "jsonl", "-o", "o.npy", "--overwrite", stdin=data
        )
    else:
        found, _ = succeed("encode", "--format", "jsonl", "--keep-text", stdin=data)
        assert [row["text"] for row in rows_of(found)] == [row["text"] for row in rows]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=6))
def test_any_table_comes_back_from_csv_and_parquet(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    with (folder / "fuzz.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("id", "text"), *rows])
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], []]
    table = pa.table({"id": pa.array(columns[0], pa.string()), "text": pa.array(columns[1], pa.large_string())})
    pq.write_table(table, folder / "fuzz.parquet")
    for name in ("fuzz.csv", "fuzz.parquet"):
        found = [(row.id, row.text) for row in TextInput([str(folder / name)], reading=Reading(id_column="id"))]
        assert found == rows


@pytest.mark.parametrize("name", ["out.npy", "out.jsonl", "out.parquet"])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, name, monkeypatch):
    write(tmp_path / "a.csv", [f"text number {number}" for number in range(23)])
    command = ("encode", "a.csv", *(() if name.endswith("npy") else ("--id-column", "name")), "--part-rows", 5)
    succeed(*command, "-o", "whole" + name)
    with monkeypatch.context() as patch:
        Interrupt(patch, calls=3)
        status, _, stderr = run(*command, "-o", name)
    assert status == 130
    assert "15 texts are done and kept" in stderr
    assert not (tmp_path / name).exists()
    assert "--resume goes on" in refuse(*command, "-o", name)
    with monkeypatch.context() as patch:
        count = Interrupt(patch, calls=99)
        _, stderr = succeed(*command, "-o", name, "--resume")
    assert count.calls == 2
    assert "from 23 texts (15 of them before)" in stderr
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole{name}").read_bytes()
    assert sorted(os.listdir()) == sorted(["a.csv", name, f"whole{name}"])


def test_resume_refuses_another_run_and_keeps_what_is_done(tmp_path, monkeypatch):
    texts = [f"text number {number}" for number in range(12)]
    write(tmp_path / "a.txt", texts)
    command = ("encode", "a.txt", "-o", "out.npy", "--part-rows", 5)
    with monkeypatch.context() as patch:
        Interrupt(patch, calls=2)
        run(*command)
    parts = tmp_path / ".out.npy.parts"
    assert "normalize was True, is False" in refuse(*command, "--resume", "--no-normalize")
    write(tmp_path / "a.txt", [*texts[:7], "changed", *texts[8:]])
    assert "between a.txt, text 5 and a.txt, text 9" in last_line(run(*command, "--resume"))
    write(tmp_path / "a.txt", texts[:3])
    assert "the input is not that of the interrupted run" in last_line(run(*command, "--resume"))
    write(tmp_path / "a.txt", texts[:5])
    assert "the input is shorter" in last_line(run(*command, "--resume"))
    write(tmp_path / "a.txt", texts)
    with FileLock(parts / "lock"):
        assert "another run is writing out.npy" in refuse(*command, "--resume")
    (parts / "000002.npy").write_bytes(b"half a part, without its description")
    succeed(*command, "--resume")
    assert np.load("out.npy").shape == (12, 256)
    assert "out.npy exists" in refuse(*command)


def test_an_output_is_replaced_at_the_end_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "out.npy").write_text("before")
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 9 + b"\xff\n")
    command = ("encode", "a.txt", "-o", "out.npy", "--part-rows", 4)
    assert "out.npy exists" in refuse(*command)
    (tmp_path / "own.jsonl").write_text('{"text": "fine"}')
    assert "own.jsonl is an input" in refuse("encode", "own.jsonl", "-o", "./own.jsonl", "--overwrite")
    assert "line 10: not UTF-8" in last_line(run(*command, "--overwrite"))
    assert (tmp_path / "out.npy").read_text() == "before"
    succeed(*command, "--resume", "--lenient")
    assert np.load("out.npy").shape == (10, 256)


def test_killed_and_interrupted_processes_end_in_the_same_bytes(tmp_path):
    """A real SIGINT, then a real SIGKILL in the middle of the resumed run, then to the end."""
    write(tmp_path / "a.txt", [f"{number} " + "words of the text " * (number % 20) for number in range(160)])
    command = ["encode", "a.txt", "-o", "out.jsonl", "--part-rows", "4", "--keep-text"]
    seen = 0
    for signal_, status, options in ((signal.SIGINT, 130, []), (signal.SIGKILL, -signal.SIGKILL, ["--resume"])):
        process = start([*command, *options])
        seen = wait_for_parts(tmp_path / ".out.jsonl.parts", seen + 2, process)
        process.send_signal(signal_)
        _, stderr = process.communicate()
        assert process.returncode == status, stderr
        assert ("interrupted" in stderr) == (signal_ == signal.SIGINT)
        assert not (tmp_path / "out.jsonl").exists()
    assert seen < 40, "the run was over before it could be killed"
    succeed(*command, "--resume")
    succeed("encode", "a.txt", "-o", "whole.jsonl", "--part-rows", "4", "--keep-text")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def start(arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    # A shell's background jobs ignore SIGINT, and so would what they start.
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict = {
        "preexec_fn": restore,
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "hub_repo.cli", *arguments], env=environment, **{**pipes, **options}
    )


def wait_for_parts(folder, number, process):
    while process.poll() is None and not (folder / f"{number:06d}.json").exists():
        time.sleep(0.01)
    return len(list(folder.glob("0*.json")))


def test_a_closed_pipe_ends_the_command_quietly(tmp_path):
    write(tmp_path / "a.txt", ["text"] * 2000)
    process = start(["encode", "a.txt"])
    assert json.loads(process.stdout.readline())["row"] == 0
    process.stdout.close()
    stderr = process.stderr.read()
    assert (process.wait(), stderr) == (141, "")


def test_a_pipe_in_place_of_a_file(tmp_path):
    """Of more texts than a part: it has no place to tell of."""
    os.mkfifo(tmp_path / "pipe.txt")
    writer = threading.Thread(target=write, args=(tmp_path / "pipe.txt", [f"text {i}" for i in range(70)]))
    writer.start()
    succeed("encode", "pipe.txt", "-o", "x.npy", "--part-rows", "32")
    writer.join()
    assert np.load(tmp_path / "x.npy").shape[0] == 70


def test_data_on_the_standard_output_are_utf_8_whatever_the_locale_is(tmp_path):
    write(tmp_path / "a.txt", ["Caf\u00e9 \u6f22"])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "hub_repo.cli", "encode", "a.txt", "--keep-text"]
    process = subprocess.run(command, env=environment, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.decode("utf-8"))["text"] == "Caf\u00e9 \u6f22"


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Through reading, parts and joining; the vectors of 20,000 rows alone would take 20 MB."""
    (tmp_path / "a.txt").write_bytes(b"a line of text\n" * 20_000)

    def embed(rows):
        return Result(Embeddings(np.ones((len(rows), 256), np.float32)))

    parts = Parts(tmp_path / "out.npy", {}, Layout((), 256), suffix=".npy")
    tracemalloc.start()
    with parts.opened():
        done = sum(part.rows for part, _ in parts.run(TextInput(["a.txt"]), embed))
        parts.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done == len(np.load("out.npy", mmap_mode="r")) == 20_000
    assert peak < 6_000_000, peak


def test_parts_close_at_rows_and_at_characters():
    rows = [Row("x" * size, None, number) for number, size in enumerate([600_000, 600_000, 1, 1, 1, 2_000_000])]
    assert [[row.row for row in batch] for batch in batches(rows, 2)] == [[0, 1], [2, 3], [4, 5]]
    assert [len(batch) for batch in batches(rows, 4)] == [2, 4]


def test_parts_of_another_process_are_locked(tmp_path):
    layout = Layout((), 2)
    with Parts(tmp_path / "o.npy", {}, layout, suffix=".npy").opened():
        with pytest.raises(PartsError, match="in use"), Parts(tmp_path / "o.npy", {}, layout, suffix=".npy").opened():
            pass
