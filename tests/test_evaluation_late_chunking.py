"""Late against naive chunking: passages that belong together make a document, every chunk gets its own two vectors,
scores and interval are those computed by hand, and what is scored is not scored again.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import zstandard
from conftest import tiny_config

from evaluation import late_chunking
from evaluation.late_chunking import cut, documents_of, interval, main, ndcg, query_groups, rank, vectors_of
from evaluation.sets import RetrievalSet
from modeling_jina_bert import JinaBertModel

PASSAGES = [
    {"_id": "w1", "title": "Whales", "text": "Whales are mammals. They breathe air."},
    {"_id": "s#1", "title": "", "text": "There was a king."},
    {"_id": "w2", "title": "Whales", "text": "They are large."},
    {"_id": "s#2", "text": "He had gold."},
    {"_id": "b", "title": "Bread", "text": "Bread needs flour and salt."},
    {"_id": "empty", "title": "", "text": ""},
]
QUERIES = [{"_id": "q1", "text": "how large are whales"}, {"_id": "q2", "text": "what did the king have"}]
QRELS = {"q1": {"w2": 1}, "q2": {"s#2": 1, "s#1": 2}}
TITLES = {row["_id"]: row.get("title", "") for row in PASSAGES}


@pytest.fixture
def dataset():
    documents = {row["_id"]: f"{row.get('title') or ''} {row['text']}".lstrip() for row in PASSAGES}
    return RetrievalSet("ir/Toy", {row["_id"]: row["text"] for row in QUERIES}, documents, QRELS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config()).eval()
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def data(tmp_path):
    """Folder with the set ir/Toy."""
    folder = tmp_path / "data" / "eval" / "ir" / "Toy"
    folder.mkdir(parents=True)
    for name, rows in (("corpus", PASSAGES), ("queries", QUERIES)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    judged = [f"{query}\t{passage}\t{x}" for query, row in QRELS.items() for passage, x in row.items()]
    (folder / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return tmp_path / "data"


def test_passages_that_belong_together_are_a_document(dataset):
    documents = documents_of(dataset, TITLES)
    assert [document.text for document in documents] == [
        "Whales are mammals. They breathe air.\n\nThey are large.",
        "There was a king.\n\nHe had gold.",
        "Bread Bread needs flour and salt.",
        "",
    ]
    found = {name: document.text[slice(*span)] for document in documents for name, span in document.passages.items()}
    assert found == {**{row["_id"]: row["text"] for row in PASSAGES}, "b": documents[2].text}
    assert query_groups(dataset, documents).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("chunking", "chunks"),
    [
        ("whole", ["Whales are mammals. They breathe air.", "They are large."]),
        ("sentences", ["Whales are mammals. ", "They breathe air.", "They are large."]),
        ("4", ["Whales are mammals.", "They breathe air.", "They are large."]),
        ("3", ["Whales are mammals", ". They breathe", "air.", "They are large", "."]),
    ],
)
def test_no_chunk_crosses_the_end_of_a_passage(dataset, tokenizer, chunking, chunks):
    documents = documents_of(dataset, TITLES)
    found = cut(documents, chunking, tokenizer)
    assert [documents[0].text[slice(*span)] for span in found.spans[0]] == chunks
    assert found.spans[3] == []
    assert found.passages == ["w1", "w2", "s#1", "s#2", "b"]
    assert found.first[:2].tolist() == [
        0,
        sum(chunk not in chunks[-2 if chunking == "3" else -1 :] for chunk in chunks),
    ]


def test_both_vectors_are_those_of_the_chunk(dataset, model):
    documents = documents_of(dataset, TITLES)
    chunks = {chunking: cut(documents, chunking, model.tokenizer) for chunking in ("4", "sentences", "whole")}
    seen = []
    for chunking, naive, late in vectors_of(model, documents, chunks, max_length=8192, overlap=256):
        seen.append(chunking)
        row = 0
        for document, spans in zip(documents, chunks[chunking].spans, strict=True):
            for start, end in spans:
                alone = model.encode(document.text[start:end], normalize_embeddings=True)
                (chunk,) = model.encode_chunks(document.text, [(start, end)], normalize_embeddings=True)
                np.testing.assert_allclose(naive[row], alone, atol=1e-5)
                np.testing.assert_allclose(late[row], chunk.embedding, atol=1e-5)
                row += 1
        assert len(naive) == len(late) == row
        assert np.abs(naive - late)[:4].max() > 1e-2  # control: context counts
    assert seen == list(chunks)


def test_ranking_and_measure_by_hand(monkeypatch):
    chunks = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6]])
    queries = np.array([[1, 0], [0, 1], [0.6, 0.8]])
    expected = [{"a": 1.0, "b": 0.8}, {"b": 0.8, "a": 1.0}, {"a": 0.8, "b": 1.0}]
    for block in (1024, 2):
        monkeypatch.setattr(late_chunking, "QUERY_BLOCK", block)
        runs = rank(queries, chunks, ["a", "b"], np.array([0, 2]))
        assert runs == [pytest.approx(run) for run in expected]
    found = ndcg({"q1": runs[0], "q2": runs[1]}, {"q2": {"b": 1}, "q1": {"a": 1}, "q3": {"a": 1}})
    assert found == pytest.approx([1 / math.log2(3), 1, 0])


def test_the_interval_draws_documents_not_queries():
    differences = np.array([0.2] * 50 + [-0.1] * 50)
    of_two = interval(differences, np.repeat([0, 1], 50))
    assert of_two == pytest.approx((-0.1, 0.2))  # two documents: half of the draws hold one of them alone
    low, high = interval(differences, np.arange(100))
    error = differences.std() / 10
    assert (low, high) == pytest.approx((0.05 - 1.96 * error, 0.05 + 1.96 * error), abs=0.005)
    assert interval(differences, np.arange(100)) == (low, high)


def test_the_command_goes_on_from_its_output(data, model, tmp_path, capsys, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    output, table = tmp_path / "results.json", tmp_path / "table.md"
    arguments = ["--model", str(tmp_path / "model"), "--data", str(data), "--sets", "ir/Toy", "--output", str(output)]
    main([*arguments, "--chunks", "whole"])
    compare = late_chunking.compare
    asked = []
    monkeypatch.setattr(late_chunking, "compare", lambda *a, **k: asked.append(list(a[3])) or compare(*a, **k))
    main([*arguments, "--chunks", "whole", "4", "--markdown", str(table)])
    assert asked == [["4"]]
    records = json.loads(output.read_text())["records"]
    assert [record["settings"]["chunks"] for record in records] == ["whole", "4"]
    for record, chunks in zip(records, (5, 8), strict=True):
        assert record["sizes"] == {"queries": 2, "documents": 6, "contexts": 4, "chunks": chunks}
        metrics = record["metrics"]
        low, high = metrics["difference_95"]
        assert metrics["difference"] == pytest.approx(metrics["late_ndcg_at_10"] - metrics["naive_ndcg_at_10"])
        assert low <= metrics["difference"] <= high
        assert record["settings"]["max_length"] == 8192
    lines = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert lines[2].startswith("| ir/Toy | 2 x 6 (4) | passage | 5 | ")
    assert lines[3].startswith("| ir/Toy | 2 x 6 (4) | 4 tokens | 8 | ")
    for record in records:
        assert f"    {record['command']}\n" in table.read_text()
    assert table.read_text() in capsys.readouterr().out

    other = shutil.copytree(data, tmp_path / "other")
    corpus = next((other / "eval" / "ir" / "Toy").glob("corpus.jsonl*"))
    rows = [json.loads(line) for line in zstandard.decompress(corpus.read_bytes()).splitlines()]
    rows[0]["text"] += " And more."
    corpus.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    arguments[arguments.index("--data") + 1] = str(other)
    main([*arguments, "--chunks", "whole"])
    assert asked == [["4"], ["whole"]], "of other data the score is another"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunks", "words"], "--chunks words: is not whole, sentences, or a number of tokens."),
        (["--chunks", "0"], "--chunks 0: is not"),
        (["--overlap", "8192"], "--overlap 8192: is not in 0 ... 8191."),
        (["--sets", "ir/Nope"], "unknown set 'ir/Nope'; there are ir/Toy."),
        (["--model", "{tmp}/nowhere"], "model {tmp}/nowhere: no such folder."),
        (["--output", "{tmp}/no/results.json"], "{tmp}/no/results.json: is a folder, or lies in none."),
    ],
    ids=str,
)
def test_wrong_arguments_end_with_one_line(data, tmp_path, capsys, arguments, message):
    defaults = [
        "--model",
        str(tmp_path),
        "--data",
        str(data),
        "--sets",
        "ir/Toy",
        "--output",
        str(tmp_path / "x.json"),
    ]
    with pytest.raises(SystemExit) as exit_info:
        main([*defaults, *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: " + message.format(tmp=tmp_path))
