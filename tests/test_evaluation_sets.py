"""Laws of the sets on disk: read whole, whichever way they are compressed, also in BEIR's own layout; cut to what a
score needs; a wrong row or file is named, and a file that was cut off is one.
"""

import gzip
import json
import random

import pytest
import zstandard
from toy_evaluation import (  # noqa: F401  pytest finds the fixtures by name
    DOCUMENTS,
    PAIRS,
    QRELS,
    QUERIES,
    write_rows,
    written_sets,
)

from evaluation.rows import read_rows
from evaluation.scoring import Protocol
from evaluation.sets import EvaluationError, available_sets, load_set, select_sets


def test_sets_are_read_whole(data):
    assert available_sets(data) == ["ir/Toy", "long/Toy", "STSB"]
    dataset = load_set(data, "ir/Toy")
    assert dataset.documents["d1"] == "Whales Whales are mammals of the sea."
    assert dataset.documents["d2"] == DOCUMENTS[1]["text"]
    assert dataset.documents["d4"] == ""
    assert list(dataset.queries) == ["q1", "q2", "q3"]
    assert dataset.qrels["q2"] == {"d2": 1, "d3": 1}
    assert load_set(data, "STSB").scores == [0.0, 1.5, 4, 5.0]


def test_parts_of_a_set_share_its_corpus(data, caplog):
    folder = data / "eval" / "long" / "Toy"
    write_rows(folder / "queries_early.jsonl.zst", QUERIES[:2])
    (folder / "qrels_early.tsv").write_text("\n".join([*QRELS[:2], "q2\td2\t0"]) + "\n")
    assert available_sets(data) == ["ir/Toy", "long/Toy", "long/Toy/early", "STSB"]
    assert select_sets(data, ["STSB", "long/*", "long/Toy"]) == ["STSB", "long/Toy", "long/Toy/early"]
    dataset = load_set(data, "long/Toy/early")
    assert list(dataset.queries) == ["q1"]
    # Odd but usable: counted, and said.
    assert dataset.oddities == {"empty_documents": 1, "unanswered_queries": 1}
    assert dataset.sizes == {"queries": 1, "documents": 4}
    assert "long/Toy/early: 1 empty documents, 1 unanswered queries." in caplog.text


def test_a_cut_set_keeps_what_a_score_needs(data):
    dataset = load_set(data, "ir/Toy")
    cut = dataset.cut(2)
    assert len(cut.queries) == 2
    assert {x for judged in cut.qrels.values() for x in judged} <= set(cut.documents)
    assert len(cut.documents) < 4
    assert cut.sha256 == dataset.cut(2).sha256 != dataset.sha256
    assert dataset.cut(4) is dataset
    assert Protocol(max_texts=2).of(dataset)["cut_from"]["queries"] == 3
    assert "cut_from" not in Protocol(max_texts=4).of(dataset)
    pairs = load_set(data, "STSB").cut(3)
    rows = [(row["sentence1"], row["sentence2"], row["score"]) for row in PAIRS]
    assert [rows.index(row) for row in zip(pairs.first, pairs.second, pairs.scores, strict=True)] == sorted(
        rows.index(row) for row in zip(pairs.first, pairs.second, pairs.scores, strict=True)
    )
    assert len(pairs.scores) == 3


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("qrels.tsv", [*QRELS, "q1\td9\t1"], r"qrels.tsv:6: there is no document 'd9'"),
        ("qrels.tsv", [*QRELS, "q9\td1\t1"], r"qrels.tsv:6: there is no query 'q9'"),
        ("qrels.tsv", [*QRELS, QRELS[1]], r"qrels.tsv:6: query 'q1' and document 'd1' are judged twice"),
        ("qrels.tsv", QRELS[1:], r"qrels.tsv:1: the header"),
        ("qrels.tsv", [*QRELS, "q1\td2\tyes"], r"qrels.tsv:6: 'q1\\td2\\tyes'"),
        ("qrels.tsv", QRELS[:1], r"qrels.tsv: no judgements"),
        ("qrels.tsv", [QRELS[0], "q1\td1\t0"], r"qrels.tsv: no query has a relevant document"),
        ("corpus.jsonl.zst", [*DOCUMENTS, DOCUMENTS[0]], r"corpus.jsonl.zst:5: the id 'd1' is used twice"),
        ("corpus.jsonl.zst", [{"_id": "d1"}], r"corpus.jsonl.zst:1: no field 'text'"),
        ("qrels.tsv", [*QRELS, "q1\td2\t0.5"], r"qrels.tsv:6: 'q1\\td2\\t0.5' is not an id, an id and an integer"),
        ("qrels.tsv", [*QRELS, "q1\td2\tinf"], r"qrels.tsv:6: "),
        ("qrels.tsv", [], r"qrels.tsv:1: the header"),
        ("queries.jsonl.zst", [QUERIES[0], "{"], r"queries.jsonl.zst:2: not JSON"),
        ("queries.jsonl.zst", [QUERIES[0], "[]"], r"queries.jsonl.zst:2: not a JSON object"),
        (
            "queries.jsonl.zst",
            ['{"_id": "q1", "text": "a \\uD800"}'],
            r"queries.jsonl.zst:1: 'text' holds \\ud800, half",
        ),
        (
            "corpus.jsonl.zst",
            [{**DOCUMENTS[0], "title": "\ude00"}],
            r"corpus.jsonl.zst:1: 'title' holds \\ude00, half",
        ),
        ("corpus.jsonl.zst", [{"_id": True, "text": ""}], r"corpus.jsonl.zst:1: no field '_id', or"),
        ("corpus.jsonl.zst", [{"_id": 1, "text": ""}, {"_id": "1", "text": ""}], r"zst:2: the id '1' is used twice"),
        ("corpus.jsonl.zst", [{"_id": "d1", "title": [1], "text": ""}], r"zst:1: the title \[1\] is not a text"),
        ("corpus.jsonl.zst", [], r"corpus.jsonl.zst: is empty"),
    ],
)
def test_wrong_rows_are_named(data, file, rows, message):
    path = data / "eval" / "ir" / "Toy" / file
    if file.endswith(".tsv"):
        path.write_text("\n".join(rows) + "\n")
    else:
        write_rows(path, rows)
    with pytest.raises(EvaluationError, match=message):
        load_set(data, "ir/Toy")


def test_missing_and_broken_files_are_named(data):
    folder = data / "eval" / "ir" / "Toy"
    (folder / "queries.jsonl.zst").write_bytes(b"not zstd")
    with pytest.raises(EvaluationError, match=r"queries.jsonl.zst: cannot be read"):
        load_set(data, "ir/Toy")
    (folder / "queries.jsonl.zst").unlink()
    with pytest.raises(EvaluationError, match=r"queries.jsonl: there is no such file, nor with .zst or .gz"):
        load_set(data, "ir/Toy")
    write_rows(folder / "queries.jsonl.zst", QUERIES)
    (folder / "queries.jsonl").write_text("{}")
    with pytest.raises(EvaluationError, match=r"queries.jsonl.zst: queries.jsonl lies beside it; keep one of them"):
        load_set(data, "ir/Toy")
    (folder / "queries.jsonl").unlink()
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("")
    with pytest.raises(EvaluationError, match=r"qrels.tsv: qrels/test.tsv lies beside it; keep one of them"):
        load_set(data, "ir/Toy")
    (folder / "qrels" / "test.tsv").unlink()
    (folder / "qrels.tsv").unlink()
    with pytest.raises(EvaluationError, match=r"ir/Toy: has no qrels.tsv or qrels/test.tsv or qrels/dev.tsv"):
        load_set(data, "ir/Toy")


def beir(folder, suffix, pack):
    """The toy set as BEIR has its sets, with what people's files have: a byte order mark, Windows' line ends, a blank
    last line, a float for a relevance, a number for an id.
    """
    folder.joinpath("qrels").mkdir(parents=True)
    rows = {"corpus": [*DOCUMENTS, {"_id": 5, "title": None, "text": "a U+2028:\u2028 no line end \U0001f40b"}]}
    rows["queries"] = [*QUERIES, {"_id": 7, "text": "emoji"}]
    for name, of_file in rows.items():
        text = "\r\n".join(json.dumps(row, ensure_ascii=name == "queries") for row in of_file)
        folder.joinpath(f"{name}.jsonl{suffix}").write_bytes(pack(f"\ufeff{text}\r\n\r\n".encode()))
    qrels = "\n".join([*(f"{row}.0" for row in QRELS[1:]), "7\t5\t2"])
    folder.joinpath(f"qrels/test.tsv{suffix}").write_bytes(pack(f"{QRELS[0]}\n{qrels}\n\n".encode()))
    return folder


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_beirs_own_layout_is_read(data, suffix, pack):
    folder = beir(data / "eval" / "ir" / "Beir", suffix, pack)
    assert available_sets(data) == ["ir/Beir", "ir/Toy", "long/Toy", "STSB"]
    ours, theirs = load_set(data, "ir/Toy"), load_set(data, "ir/Beir")
    assert theirs.documents == {**ours.documents, "5": "a U+2028:\u2028 no line end \U0001f40b"}
    assert theirs.queries == {**ours.queries, "7": "emoji"}
    assert theirs.qrels == {**ours.qrels, "7": {"5": 2}}
    folder.joinpath(f"qrels/test.tsv{suffix}").rename(folder / f"qrels/dev.tsv{suffix}")
    assert load_set(data, "ir/Beir").sha256 == theirs.sha256


def frames(rows):
    """Rows that hardly compress, whole and as two zstd frames, the first of which ends in the middle of a row."""
    generator = random.Random(0)
    noise = ("".join(generator.choices("abcdefghijklmnopqrstuvwxyz ", k=200)) for _ in range(rows))
    text = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in noise)
    half = len(text) // 2 + 17
    return text, zstandard.compress(text[:half]), zstandard.compress(text[half:])


def test_files_of_several_frames_are_read_whole(tmp_path):
    text, first, second = frames(2000)
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(first + second)
    assert b"".join(json.dumps(row).encode() + b"\n" for _, row in read_rows(path, {"text": (str,)})) == text


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_cut_file_is_an_error_wherever_it_was_cut(tmp_path, suffix):
    text, first, second = frames(200)
    whole = first + second if suffix == ".zst" else gzip.compress(text)
    path = tmp_path / f"rows.jsonl{suffix}"
    expected = dict.fromkeys([*range(0, len(whole), 997), len(whole) - 1], "cannot be read") | {0: "is empty"}
    if suffix == ".zst":
        expected[len(first)] = "not JSON"  # a whole file of one frame, with half a row at its end
    for end, message in expected.items():
        path.write_bytes(whole[:end])
        with pytest.raises(EvaluationError, match=message):
            list(read_rows(path, {"text": (str,)}))


def test_a_cut_that_ends_with_a_line_is_an_error(tmp_path):
    """zstandard's own reader takes this file for a shorter one: what it decompresses ends with a line."""
    path = tmp_path / "rows.jsonl.zst"
    line = json.dumps({"text": "x" * 1011}).encode() + b"\n"
    compressor = zstandard.ZstdCompressor().compressobj()
    path.write_bytes(compressor.compress(line * 128) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    with zstandard.open(path, "rt") as lines:
        assert [json.loads(line) for line in lines]  # control: no error
    with pytest.raises(EvaluationError, match=r"cannot be read \(the file ends in the middle of a zstd frame\)"):
        list(read_rows(path, {"text": (str,)}))
