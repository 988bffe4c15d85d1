"""A corpus on an engine: every row once, whatever was killed, repeated or left behind.

Pins: the cut and the reader against the file's rows; a part is done only if it is whole, of this job and of these
bytes; columns, types and order of the input in the output, null and invalid texts by row; wrong inputs and outputs
refused in one line; and with Ray itself (slow, skipped without it) a killed driver, a killed worker and the same rows.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPOSITORY, SHIPPED

from hub_repo.corpus import parquet_parts as pp
from hub_repo.corpus import part_embedding as pe
from hub_repo.corpus.part_embedding import JobError, PartEmbedder, Settings
from hub_repo.embedding.model_folder import Encoding
from modeling_jina_bert import JinaBertModel

SETTINGS = Settings(str(SHIPPED), Encoding(device="cpu"), part_rows=3)
TIME_LIMIT = 240  # seconds; a Ray starts within 10 on a machine with nothing else to do


def corpus_table(first: int, rows: int) -> pa.Table:
    texts = ["", "Berlin is in Germany.", "Ein längerer Text, über 漢字. " * 9, "x"]
    numbers = range(first, first + rows)
    return pa.table(
        {
            "id": [f"doc-{number}" for number in numbers],
            "text": [f"{number}: {texts[number % 4]}" if number % 4 else "" for number in numbers],
            "tags": pa.array([["a"] * (number % 3) for number in numbers], pa.list_(pa.string())),
            "kind": pa.array([f"k{number % 2}" for number in numbers]).dictionary_encode(),
            "score": pa.array([None if number % 5 == 0 else number / 7 for number in numbers]),
        }
    ).replace_schema_metadata({"origin": "a test"})


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two files below a folder, row groups of 5 rows, and files that are none of its data."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    pq.write_table(corpus_table(0, 13), folder / "a.parquet", row_group_size=5)
    pq.write_table(corpus_table(13, 8), folder / "deep" / "b.parquet", row_group_size=5)
    (folder / "_SUCCESS.parquet").write_text("not data")
    (folder / "README.md").write_text("not data")
    return folder


def plan(corpus, output, settings=SETTINGS, **options):
    return pe.plan([str(corpus)], str(output), settings, **options)


def embed_all(corpus, output, settings=SETTINGS, **options):
    """What an engine does, in this process: the outcomes and the manifest."""
    job, description = plan(corpus, output, settings)
    pe.open_output(job, description, **options)
    embedder = PartEmbedder(job)
    outcomes = [embedder.make(part.number) for part in job.parts]
    assert [outcome.error for outcome in outcomes] == [""] * len(outcomes)
    return outcomes, pe.finish(job, description, id_column="id")


def vectors(table: pa.Table) -> np.ndarray:
    column = table.column("embedding").combine_chunks()
    return np.asarray(column.flatten()).reshape(len(table), column.type.list_size)


def test_output_is_the_input_with_its_vectors(corpus, tmp_path):
    _, manifest = embed_all(corpus, tmp_path / "out")
    output, expected = pq.read_table(tmp_path / "out"), corpus_table(0, 21)
    assert output.drop_columns(["embedding"]).to_pylist() == expected.to_pylist()
    fields = pq.read_schema(tmp_path / "out" / "part-000000.parquet")
    assert [fields.field(name).type for name in expected.schema.names] == expected.schema.types
    assert fields.metadata[b"origin"] == b"a test"
    assert fields.field("embedding").type == pa.list_(pa.float32(), 256)
    model = JinaBertModel.from_pretrained(SHIPPED)
    found = vectors(output)
    direct = model.encode(expected["text"].to_pylist(), normalize_embeddings=True)
    assert np.abs(found - direct).max() < 1e-5
    assert np.abs(found[1] - direct[2]).max() > 0.1  # the comparison above tells texts apart
    assert manifest["rows"] == 21
    assert [(part["source"], part["row_group"], part["first"], part["rows"]) for part in manifest["parts"]] == [
        (0, 0, 0, 3), (0, 0, 3, 2), (0, 1, 0, 3), (0, 1, 3, 2), (0, 2, 0, 3), (1, 0, 0, 3), (1, 0, 3, 2), (1, 1, 0, 3),
    ]  # fmt: skip


def test_options_of_the_output(corpus, tmp_path, monkeypatch):
    settings = replace(
        SETTINGS, dtype="float16", keep_text=False, encoding=Encoding(device="cpu", truncate_dim=8, max_length=6)
    )
    logger = logging.getLogger("modeling_jina_bert.encoding")
    monkeypatch.setattr(logger, "disabled", True)  # silenced is not uncounted
    _, manifest = embed_all(corpus, tmp_path / "out", settings)
    output = pq.read_table(tmp_path / "out")
    assert output.schema.names == ["id", "tags", "kind", "score", "embedding"]
    assert output.schema.field("embedding").type == pa.list_(pa.float16(), 8)
    assert np.allclose(np.linalg.norm(vectors(output).astype(np.float32), axis=1), 1, atol=2e-3)
    assert manifest["cut_texts"] == 10  # of 21, number % 4 == 1 or 2
    assert manifest["cut_tokens"] > 100


def test_the_reader_gives_the_rows_in_any_order(corpus):
    sources = pp.find_sources([str(corpus)], "elsewhere")
    parts = pp.cut((source.groups for source in sources), 2)
    expected = corpus_table(0, 21).to_pylist()
    starts = [0, 13]
    for order in (parts, parts[::-1], parts[::2] + parts[1::2]):
        reader = pp.PartReader(sources)
        for part in order:
            first = starts[part.source] + part.file_row
            assert reader.rows(part).to_pylist() == expected[first : first + part.rows]
            assert reader.rows(part).num_rows == part.rows  # once more


def test_what_is_done_is_not_done_again_and_what_is_damaged_is(corpus, tmp_path):
    out = tmp_path / "out"
    first, _ = embed_all(corpus, out)
    before = {path.name: path.read_bytes() for path in out.glob("part-*")}
    (out / "part-000001.parquet").write_bytes(before["part-000001.parquet"][:-40])  # a disk that was full
    (out / "part-000004.parquet").write_bytes(before["part-000003.parquet"])  # a part of this job, at another's place
    (out / "part-000006.parquet").unlink()
    (out / ".part-000002.parquet.0a1b").write_bytes(b"of a killed worker")
    again, manifest = embed_all(corpus, out)
    assert not any(outcome.before for outcome in first)
    assert [outcome.part for outcome in again if not outcome.before] == [1, 4, 6]
    assert {path.name: path.read_bytes() for path in out.glob("part-*")} == before
    assert not list(out.glob(".part-*"))
    assert manifest["rows"] == pq.read_table(out).num_rows == 21


def test_a_file_that_changes_within_its_size_is_read_again(tmp_path):
    """Neither the footer nor the size tells; the stored bytes do, of a column that is only carried along, too."""
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False, "row_group_size": 3}
    columns = {"id": ["a", "b", "c", "d"], "text": ["one", "two", "three", "four"], "note": ["-", "-", "-", "old"]}
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.parquet"
    pq.write_table(pa.table(columns), path, **plain)
    embed_all(tmp_path / "in", tmp_path / "out")
    size = path.stat().st_size
    for change in ({"note": ["-", "-", "-", "new"]}, {"text": ["one", "two", "three", "five"]}):
        columns |= change
        pq.write_table(pa.table(columns), path, **plain)
        assert path.stat().st_size == size
        again, _ = embed_all(tmp_path / "in", tmp_path / "out")
        assert [outcome.part for outcome in again if not outcome.before] == [1]
        assert pq.read_table(tmp_path / "out").drop_columns(["embedding"]).to_pydict() == columns


def test_finish_counts_for_itself(corpus, tmp_path):
    out = tmp_path / "out"
    embed_all(corpus, out)
    job, description = plan(corpus, out)
    pe.open_output(job, description)
    assert not (out / pe.MANIFEST).exists()
    part = out / "part-000002.parquet"
    data = part.read_bytes()
    table = pq.read_table(part)
    for wrong, message in (
        (lambda: part.unlink(), "missing"),
        (lambda: pq.write_table(pa.concat_tables([table, table]), part), "damaged"),
        (lambda: pq.write_table(table.slice(1), part), "damaged"),
        (lambda: part.write_bytes((out / "part-000003.parquet").read_bytes()), "damaged or not of this job"),
    ):
        wrong()
        with pytest.raises(RuntimeError, match=f"part-000002.parquet is {message}"):
            pe.finish(job, description)
        part.write_bytes(data)
    (out / "part-000099.parquet").write_bytes(data)
    with pytest.raises(RuntimeError, match=r"part-000099.parquet is not of this job"):
        pe.finish(job, description)
    (out / "part-000099.parquet").unlink()
    assert pe.finish(job, description)["rows"] == 21


def test_a_folder_has_one_job(corpus, tmp_path):
    out = tmp_path / "out"
    embed_all(corpus, out)
    other = replace(SETTINGS, dtype="float16")
    with pytest.raises(JobError, match=r"another job: dtype was 'float32', is 'float16'.*--overwrite"):
        embed_all(corpus, out, other)
    (out / "notes.txt").write_text("mine")
    outcomes, _ = embed_all(corpus, out, other, overwrite=True)
    assert not any(outcome.before for outcome in outcomes)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(JobError, match="is not empty and holds no job"):
        embed_all(corpus, tmp_path / "mine")


def write(folder: Path, **columns) -> Path:
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return folder


@pytest.mark.parametrize(("value", "message"), [(None, "null"), (b"a\xff", "not UTF-8 at byte 1")])
def test_a_text_that_is_none(tmp_path, value, message):
    texts = pa.array([b"one", b"two", b"three", b"four", value], pa.binary()).view(pa.string())
    folder = write(tmp_path / "in", text=texts, id=list(range(5)))
    job, description = plan(folder, tmp_path / "out")
    pe.open_output(job, description)
    outcome = PartEmbedder(job).make(1)
    assert outcome.error.startswith(f"{folder / 'x.parquet'}, row 4: 'text' is {message}")
    assert not (tmp_path / "out" / "part-000001.parquet").exists()
    _, manifest = embed_all(folder, tmp_path / "lenient", replace(SETTINGS, lenient=True))
    assert (manifest["rows"], manifest["lenient_texts"]) == (5, 1)


def test_wrong_inputs(corpus, tmp_path):
    def refused(message, names, output="out", settings=SETTINGS, **options):
        with pytest.raises(ValueError, match=message) as error:
            pe.plan([str(name) for name in names], str(tmp_path / output), settings, **options)
        assert "\n" not in str(error.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "no.parquet").write_text("text")
    refused("there is no such file or folder", [tmp_path / "missing"])
    refused("empty: no file named", [tmp_path / "empty"])
    refused("is no parquet file", [tmp_path / "no.parquet"])
    refused("is there twice", [corpus, corpus / "a.parquet"])
    refused("lies in .*: its parts would be input", [corpus], "corpus/deep/out")
    refused("cannot be reached", ["nowhere://bucket/corpus"])
    refused("no column 'body'; it has id, text, tags", [corpus], settings=replace(SETTINGS, column="body"))
    refused("no column '_id'", [corpus], id_column="_id")
    refused("column 'score' is of type double, not text", [corpus], settings=replace(SETTINGS, column="score"))
    refused("column 'kind' holds 'k0' 11 times", [corpus], id_column="kind")
    refused("'text' is the id and the text", [corpus], settings=replace(SETTINGS, keep_text=False), id_column="text")
    refused("has other columns or types", [corpus, write(tmp_path / "other", text=["a"])])
    refused("has a column 'embedding' already", [write(tmp_path / "again", text=["a"], embedding=[1.0])])
    refused("neither a folder nor", [corpus], settings=replace(SETTINGS, model=str(tmp_path / "none")))


def test_files_on_another_file_system(corpus, tmp_path):
    """By URI, through pyarrow's own and through fsspec's file system: the same parts, the same rows."""
    embed_all(corpus, tmp_path / "plain")
    for scheme in ("file://", "fsspec+file://"):
        out = tmp_path / scheme[:4]
        outcomes, manifest = embed_all(f"{scheme}{corpus}", f"{scheme}{out}")
        assert len(outcomes) == 8
        assert manifest["rows"] == 21
        assert pq.read_table(out).equals(pq.read_table(tmp_path / "plain"))


def test_an_empty_corpus(tmp_path):
    folder = write(tmp_path / "in", id=pa.array([], pa.string()), text=pa.array([], pa.string()))
    outcomes, manifest = embed_all(folder, tmp_path / "out")
    assert (outcomes, manifest["rows"]) == ([], 0)


class Driver:
    """The command in a process of its own, whose lines are read as they come."""

    def __init__(self, corpus: Path, output: Path, *options: str):
        command = [sys.executable, "-m", "hub_repo.ray_embedding", corpus, "--output", output, "--model", SHIPPED]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # A machine whose memory others fill up must not lose the workers of a test.
        environment = {**os.environ, **threads, "RAY_memory_monitor_refresh_ms": "0", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [str(x) for x in (*command, *options)], stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment
        )
        self.lines: list[str] = []
        self.watch = threading.Timer(TIME_LIMIT, self.process.kill)
        self.watch.start()

    def part_line(self) -> str:
        """The next line about a part."""
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("part-"):
                return line
        raise AssertionError("".join(self.lines[-20:]))

    def end(self) -> int:
        self.lines += self.process.stderr.readlines()
        self.process.stderr.close()
        status = self.process.wait()
        self.watch.cancel()
        return status

    def pids(self) -> list[int]:
        """Of the workers, once for each part that was made."""
        words = [line.split("by process ")[1].split(";")[0] for line in self.lines if "by process" in line]
        return [int(word) for word in words]


def wait_until_gone(pid: int):
    """Until the process has ended; that nobody has asked for its status (Z) does not matter."""
    deadline = time.monotonic() + 60
    with contextlib.suppress(FileNotFoundError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, f"process {pid} outlived its driver"
            time.sleep(0.2)


@pytest.mark.slow
def test_ray_with_a_killed_driver_and_a_killed_worker(tmp_path):
    pytest.importorskip("ray.data", reason="pip install -e '.[ray]'")
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    table = corpus_table(0, 600)
    pq.write_table(table, corpus / "x.parquet", row_group_size=100)
    options = ("--workers", "2", "--part-rows", "10", "--id-column", "id")

    killed = Driver(corpus, out, *options)
    for _ in range(3):
        killed.part_line()
    killed.process.send_signal(signal.SIGKILL)
    assert killed.end() == -signal.SIGKILL
    wait_until_gone(killed.pids()[0])
    done = len(list(out.glob("part-*")))
    assert 3 <= done < 60
    assert not (out / pe.MANIFEST).exists()

    driver = Driver(corpus, out, *options)
    while not driver.pids():
        driver.part_line()
    os.kill(driver.pids()[0], signal.SIGKILL)
    assert driver.end() == 0, "".join(driver.lines)
    assert len(set(driver.pids())) >= 2
    assert driver.pids()[-1] != driver.pids()[0]
    assert sum("was there" in line for line in driver.lines) + len(driver.pids()) == 60
    assert sum("was there" in line for line in driver.lines) >= done
    assert driver.lines[-1].startswith(f"{out}: 600 rows of 600, 'id' distinct, in 60 parts")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        embed_all(corpus, tmp_path / "undisturbed", replace(SETTINGS, part_rows=10))
    finally:
        torch.set_num_threads(threads)
    found, expected = pq.read_table(out), pq.read_table(tmp_path / "undisturbed")
    assert found["id"].to_pylist() == table["id"].to_pylist()
    assert np.array_equal(vectors(found), vectors(expected))
    assert json.loads((out / pe.MANIFEST).read_text())["rows"] == 600


@pytest.mark.slow
def test_ray_says_what_is_wrong_in_one_line(tmp_path):
    pytest.importorskip("ray.data", reason="pip install -e '.[ray]'")
    folder = write(tmp_path / "in", text=["one", None])
    driver = Driver(folder, tmp_path / "out", "--workers", "1")
    assert driver.end() == 2
    place = folder / "x.parquet"
    assert driver.lines[-1] == f"error: {place}, row 1: 'text' is null; --lenient takes it as the empty text\n"
