"""Laws of the sets on disk: read whole, cut to what a score needs; a wrong row or file is named."""

import pytest
from toy_evaluation import (  # noqa: F401  pytest finds the fixtures by name
    DOCUMENTS,
    PAIRS,
    QRELS,
    QUERIES,
    write_rows,
    written_sets,
)

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
        ("queries.jsonl.zst", [QUERIES[0], "{"], r"queries.jsonl.zst:2: not JSON"),
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
    with pytest.raises(EvaluationError, match=r"queries.jsonl.zst: cannot be read"):
        load_set(data, "ir/Toy")
