"""`jina-bert`: its verbs, but for `encode`, which has tests of its own.

Pins: an index answers with exact scores, refuses another model and damage, and an interrupted build goes on; chunks
are those of `encode_chunks`; a wrong command is one line and status 2; the other verbs reach what they stand for, and
name the extra that is missing; help loads no torch (what it says: test_cli_help.py).
"""

import importlib.abc
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import (  # noqa: F401  pytest finds the fixtures by name
    LIBRARY,
    Interrupt,
    in_a_folder,
    loaded_once,
    refuse,
    rows_of,
    run,
    succeed,
    write,
)
from conftest import GOLDEN, REPOSITORY, SHIPPED
from safetensors.torch import load_file, save_file

from modeling_jina_bert import JinaBertModel


@pytest.fixture(scope="module")
def model():
    return JinaBertModel.from_pretrained(SHIPPED)


def test_wrong_commands_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "mine").mkdir()
    for name in ("index.json", "vectors.faiss", "documents.parquet", "thesis.txt"):
        (tmp_path / "mine" / name).write_text("{}")
    for arguments, message in (
        (["encode", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["encode", "."], ". is a folder"),
        (["encode", "-", "-"], "read only once"),
        (["encode", "a.txt", "-o", "out.bin"], "out.bin: the name of an output ends with .npy, .parquet, .jsonl"),
        (["encode", "a.txt", "-o", "no/out.npy"], "there is no folder no"),
        (["encode", "a.txt", "--resume"], "give --output"),
        (["encode", "a.txt", "--id-column", "_id"], "a.txt is read as text, without columns: no '_id'"),
        (["encode", "-", "--column", "body"], "- is read as text, without columns: no 'body'"),
        (["encode", "a.txt", "--keep-text", "-o", "o.npy"], "o.npy holds vectors alone"),
        (["chunk", "a.txt", "-o", "o.npy"], "o.npy would hold vectors without their chunks"),
        (["encode", "a.txt", "-o", "o.npy", "--resume", "--overwrite"], "give one of them"),
        (["encode", "a.txt", "--max-length", "9", "--no-truncation"], "give one of them"),
        (["encode", "a.txt", "--truncate-dim", "999"], "--truncate-dim 999 is more than the 256 dimensions"),
        (["encode", "a.txt", "--batch-size", "0"], "greater than or equal to 1"),
        (["encode", "a.txt", "--device", "abacus"], "--device abacus cannot be used"),
        (["encode", "a.txt", "--model", "nowhere"], "nowhere is neither a folder nor the name of a Hub repository"),
        (["encode", "a.txt", "--model", "."], ". has no weights"),
        (["encode", "a.txt", "--frmat", "csv"], "No such option: --frmat"),
        (["encode", "a.txt", "--column", "a", "--column", "b"], "--column is there 2 times: give it once"),
        (["encode", "a.txt", "--normalize", "--no-normalize"], "--normalize is there 2 times"),
        (["encde"], "No such command 'encde'. Did you mean 'encode'?"),
        (["chunk", "a.txt", "--by", "pages"], "--by pages: give sentences, or a number of tokens"),
        (["chunk", "a.txt", "--max-length", "5", "--overlap", "9"], "overlap=9 tokens is not at least 0 and less"),
        (["chunk", "a.txt", "--by", "9", "--spans-column", "s"], "give one of them"),
        (["chunk", "a.txt", "--spans-column", "s"], "a.txt is read as text, which has no lists of spans"),
        (["search", "query", "nowhere", "text"], "nowhere is no index"),
        (["search", "build", "a.txt", "a.txt"], "a.txt exists and is no index"),
        (["search", "build", "mine", "a.txt", "--overwrite"], "mine exists and is no index, or holds other files"),
        (["convert", str(SHIPPED), "out", "--revision", "v1"], "is a folder here, which has no revision 'v1'"),
        (["export", str(SHIPPED), "out", "--tei", "out"], "out is named for two forms"),
        (["info", "nowhere"], "nowhere is neither a folder nor the name of a Hub repository"),
        (["convert", "nowhere", "out"], "nowhere is neither a folder"),
        (["export", str(SHIPPED), "out", "--gguf", "q2"], "GGUF type 'q2' is not one of"),
        (["push", str(SHIPPED), "no-owner"], "no-owner"),
        (["push", "nowhere", "me/model"], "'nowhere' does not exist"),
        (["verify", "nowhere"], "'nowhere' does not exist"),
        (["card", "a.txt", "--model", "x"], "--results and --model belong together"),
        (["train", "nothing"], "training has no program 'nothing'; it has"),
    ):  # fmt: skip
        assert message in refuse(*arguments)
    assert sorted(os.listdir()) == ["a.txt", "mine"]


def test_an_error_of_any_kind_is_one_line_and_traceback_shows_where(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a\n")

    def fail(*arguments, **options):
        raise KeyError("a\nkey")

    with monkeypatch.context() as patch:
        patch.setattr(JinaBertModel, "encode", fail)
        assert refuse("encode", "a.txt") == "error: KeyError: 'a\\nkey'\n"
        for options, variable in ((["--traceback"], ""), ([], "1")):
            patch.setenv("JINA_BERT_TRACEBACK", variable)
            with pytest.raises(AssertionError, match="key"):  # of `run`, that an exception came out
                run(*options, "encode", "a.txt")


def test_the_version_is_that_of_the_package():
    assert succeed("--version")[0] == f"jina-bert {version('modeling-jina-bert')}\n"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Three documents of the library by sentences: the folder of the index."""
    folder = tmp_path_factory.mktemp("index") / "library.index"
    files = [LIBRARY / f"{name}.txt" for name in ("pep-print", "speech-lincoln", "pep-underscores")]
    succeed("search", "build", folder, *files, "--chunks", "sentences")
    return folder


def test_an_index_answers_with_texts_and_places(index):
    queries = (
        "How can underscores group the digits of a number?\nWhat did the fathers bring forth on this continent?\n"
    )
    stdout, _ = succeed("search", "query", index, "--json", "--top", 3, stdin=queries.encode())
    first, second = rows_of(stdout)
    assert first["query"] == queries.split("\n")[0]
    for answer, name in ((first, "pep-underscores.txt"), (second, "speech-lincoln.txt")):
        assert answer["results"][0]["file"].endswith(name)
        assert [hit["rank"] for hit in answer["results"]] == [1, 2, 3]
        for hit in answer["results"]:
            text = (LIBRARY / hit["file"]).read_text(encoding="utf-8")
            assert hit["text"] == text[hit["start"] : hit["end"]]
    text, _ = succeed("search", "query", index, "How can underscores group the digits of a number?", "--top", 1)
    assert "pep-underscores.txt, text 0, characters" in text


def test_scores_are_the_cosines_of_all_vectors(index, model):
    """Exact, also where the index has several row groups and fewer vectors than were asked for."""
    rows = pq.read_table(index / "documents.parquet").to_pylist()
    query = "a print statement"
    texts = {row["file"]: (LIBRARY / row["file"]).read_text(encoding="utf-8") for row in rows}
    chunks = [c for text in texts.values() for c in model.encode_chunks(text, normalize_embeddings=True)]
    cosines = np.array([chunk.embedding for chunk in chunks]) @ model.encode(query, normalize_embeddings=True)
    stdout, _ = succeed("search", "query", index, query, "--json", "--top", 10_000)
    hits = rows_of(stdout)[0]["results"]
    np.testing.assert_allclose([hit["score"] for hit in hits], -np.sort(-cosines), atol=2e-6)
    assert hits[0]["text"] == chunks[int(cosines.argmax())].text


def test_an_index_refuses_another_model_and_takes_a_renamed_one(tmp_path, index):
    same = shutil.copytree(SHIPPED, tmp_path / "renamed")
    succeed("search", "query", index, "text", "--model", same)
    weights = load_file(same / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.bias"][0] += 1
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    assert "is another model" in refuse("search", "query", index, "text", "--model", same)


def test_a_damaged_index_is_refused(tmp_path, index):
    for name, damage in (
        ("vectors.faiss", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("documents.parquet", lambda path: pq.write_table(pq.read_table(path).slice(1), path)),
        ("documents.parquet", lambda path: path.unlink()),
        ("index.json", lambda path: path.write_text("{}")),
    ):
        folder = shutil.copytree(index, tmp_path / "damaged")
        damage(folder / name)
        assert "damaged is a damaged index" in refuse("search", "query", "damaged", "text")
        shutil.rmtree(folder)


def test_an_interrupted_build_goes_on_and_replaces_an_index_at_the_end(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", [f"text number {number}" for number in range(12)])
    command = ("search", "build", "i", "a.jsonl", "--id-column", "name", "--part-rows", 5)
    succeed(*command)
    answer, _ = succeed("search", "query", "i", "text number 7", "--json")
    assert rows_of(answer)[0]["results"][0]["id"] == "t7"
    assert rows_of(answer)[0]["results"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert "i exists" in refuse(*command)
    with monkeypatch.context() as patch:
        Interrupt(patch, calls=2)
        assert run(*command, "--overwrite")[0] == 130
    assert succeed("search", "query", "i", "text number 7", "--json")[0] == answer
    succeed(*command, "--resume")
    assert succeed("search", "query", "i", "text number 7", "--json")[0] == answer
    assert sorted(os.listdir()) == ["a.jsonl", "i"]


def test_chunks_are_those_of_encode_chunks(tmp_path, model):
    texts = ["One sentence. And a second one! A third?", "", "Another text. It has two sentences."]
    write(tmp_path / "a.jsonl", texts)
    stdout, _ = succeed("chunk", "a.jsonl", "--id-column", "name")
    succeed("chunk", "a.jsonl", "--id-column", "name", "-o", "out.parquet")
    rows = rows_of(stdout)
    assert [(row["id"], row["chunk"]) for row in rows] == [("t0", 0), ("t0", 1), ("t0", 2), ("t2", 0), ("t2", 1)]
    expected = [chunk for text in texts for chunk in model.encode_chunks(text, normalize_embeddings=True)]
    for row, chunk in zip(rows, expected, strict=True):
        assert (row["start"], row["end"]) == chunk.span
        assert (row["first_token"], row["end_token"]) == chunk.tokens
        assert texts[row["row"]][row["start"] : row["end"]] == row["text"]
        np.testing.assert_allclose(row["embedding"], chunk.embedding, atol=1e-6)
    table = pq.read_table("out.parquet")
    assert table.drop_columns("embedding").to_pylist() == [
        {name: value for name, value in row.items() if name != "embedding"} for row in rows
    ]
    stdout, _ = succeed("chunk", "--by", 4, stdin=b"one two three four five\nsix")
    assert [row["text"] for row in rows_of(stdout)] == ["one two three four", "five\nsix"]


SPANS = [[[0, 13], [14, 31], [4, 12]], [], [[0, 11]]]


def test_chunks_of_given_spans_are_those_of_encode_chunks(tmp_path, model):
    texts = ["One sentence. And a second one!", "", "Hello world"]
    write(tmp_path / "a.jsonl", texts, {"parts": SPANS})
    pq.write_table(pa.table({"text": texts, "parts": pa.array(SPANS, pa.list_(pa.list_(pa.int32())))}), "a.parquet")
    expected = model.encode_chunks(texts, SPANS, normalize_embeddings=True)
    for name in ("a.jsonl", "a.parquet"):
        rows = rows_of(succeed("chunk", name, "--spans-column", "parts")[0])
        assert [(row["row"], row["chunk"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (2, 0)]
        for row, chunk in zip(rows, [chunk for chunks in expected for chunk in chunks], strict=True):
            assert ((row["start"], row["end"]), (row["first_token"], row["end_token"])) == (chunk.span, chunk.tokens)
            np.testing.assert_allclose(row["embedding"], chunk.embedding, atol=1e-6)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (None, "a.jsonl, line 3: 'parts' is None (NoneType), not a list of [start, end]"),
        ([[0, 1], 7], "a.jsonl, line 3: parts[1] is 7 (int), not [start, end]"),
        ([[0, True]], "a.jsonl, line 3: parts[0] is [0, True] (list), not [start, end]"),
        ([[0, 9]], "a.jsonl, line 3: parts[0] is [0, 9], not 0 <= start < end <= 4"),
        ([[2, 2]], "a.jsonl, line 3: parts[0] is [2, 2], not 0 <= start"),
        ([[0, 1], [1, 2]], "a.jsonl, text 1: spans[1] is (1, 2), where no token begins: ' '"),
    ],
)
def test_a_bad_span_is_one_line_that_names_the_place(tmp_path, spans, message):
    write(tmp_path / "a.jsonl", ["fine", "a  b"], {"parts": [[[0, 4]], spans]})
    assert message in refuse("chunk", "a.jsonl", "--spans-column", "parts", "-o", "out.jsonl")
    pq.write_table(pa.table({"text": ["a"], "parts": [1]}), "b.parquet")
    assert "b.parquet, row 0: 'parts' is 1 (int)" in refuse("chunk", "b.parquet", "--spans-column", "parts")


def test_folder_verbs_run_the_functions_of_the_package(tmp_path):
    found = json.loads(succeed("info", SHIPPED, "--json")[0])
    assert (found["kind"], found["loads"], found["shape"]["hidden"]) == ("ours", True, 256)
    report, _ = succeed("convert", GOLDEN / "A-small4h", "ours")
    assert "largest difference of the embeddings" in report
    assert json.loads(succeed("info", "ours", "--json")[0])["kind"] == "ours"
    (tmp_path / "ours" / "weights.bin").write_bytes(b"\x80\x04")
    status, stdout, _ = run("verify", "ours", "--json")
    assert status == 1
    assert ("weights.bin", "error") in [(f["file"], f["severity"]) for f in json.loads(stdout)["findings"]]


@pytest.mark.slow
def test_export_and_verify_for_real(tmp_path):
    stdout, _ = succeed("export", SHIPPED, "out", "--dtype", "float32", "--onnx", "fp32")
    assert "model.onnx" in stdout
    assert "verified" in succeed("verify", "out")[1]


class Missing(importlib.abc.MetaPathFinder):
    """A package that is not installed."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_delegating_verbs_pass_everything_through(tmp_path, monkeypatch):
    assert "mlm" in succeed("train")[0].split()
    assert "--config" in succeed("train", "mlm", "--help")[0]
    assert "speed" in succeed("benchmark")[0].split()
    status, _, stderr = run("evaluate", "demo", "--library", "nowhere")
    assert status != 0
    assert "no library folder at nowhere" in stderr
    for module in [name for name in sys.modules if name.split(".")[0] in ("training", "omegaconf")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing("omegaconf"), *sys.meta_path])
    message = refuse("train", "mlm", "--help")
    assert message == 'error: training.mlm needs omegaconf: pip install -e ".[train]" in a clone of the project\n'


def test_a_delegated_program_that_fails_is_one_line_and_status_1(tmp_path):
    """A recipe of the repository, which names its tokenizer from there, in another folder."""
    (tmp_path / "data").mkdir()
    recipe = REPOSITORY / "training" / "recipes" / "tiny-mlm.yaml"
    status, stdout, stderr = run("train", "mlm", "--config", recipe, "data_dir=data")
    assert (status in (1, 2), stdout) == (True, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr


def test_a_program_that_breaks_ends_with_1(monkeypatch):
    def broken(*arguments, **options):
        raise IndexError("of the program,\nnot the input")

    monkeypatch.setattr("runpy.run_module", broken)
    status, _, stderr = run("train", "mlm")
    assert status == 1
    shows = "(jina-bert --traceback shows where)"
    assert stderr == f"error: training.mlm failed {shows}: IndexError: of the program, not the input\n"
    with pytest.raises(AssertionError, match="the program"):  # of `run`, that an exception came out
        run("--traceback", "train", "mlm")


def test_help_loads_neither_torch_nor_the_other_packages():
    program = (
        "import sys\nfrom hub_repo.cli import main\nsys.argv = ['jina-bert', 'encode', '--help']\n"
        "try: main()\nfinally: print('LOADED', *{name.split('.')[0] for name in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    loaded = set(result.stdout.partition("LOADED")[2].split())
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "training", "evaluation", "benchmarks", "faiss"}
