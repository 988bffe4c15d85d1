"""Robustness on real text: the figures are those of the vectors, and what must not matter does not."""

import json

import numpy as np
import pytest
import torch
import zstandard
from conftest import REPOSITORY, SHIPPED

from evaluation.loading import weights_sha256
from evaluation.robustness import agreement, main, measure, padded, ranking_scores, table_rows
from evaluation.set_types import RetrievalSet
from modeling_jina_bert import JinaBertModel


@pytest.fixture(scope="module")
def dataset():
    lines = (REPOSITORY / "tests" / "data" / "pairs.jsonl").read_text().splitlines()[:12]
    pairs = {str(i): json.loads(line) for i, line in enumerate(lines)}
    queries = {name: pair["query"] for name, pair in pairs.items()}
    documents = {name: pair["positive"] for name, pair in pairs.items()}
    return RetrievalSet("ir/mine", queries, documents, {name: {name: 1} for name in pairs})


def test_agreement_by_hand():
    # Two queries, three documents; the second query's first two documents change places.
    reference = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    other = reference.copy()
    other[3], other[4] = [0.6, 0.8], [0, 1]
    found = agreement(reference, other, queries=2, cutoff=1)
    assert found["cosine_min"] == pytest.approx(0.8)
    assert found["cosine_mean"] == pytest.approx((1 + 1 + 1 + 0.8 + 0.8) / 5)
    assert found["top_1"] == found["top_k_overlap"] == 0.5
    assert agreement(reference, other, queries=2, cutoff=3)["top_k_overlap"] == 1.0
    assert agreement(reference, np.ones((5, 1), np.float32), queries=2)["cosine_min"] is None


def test_a_ranking_is_scored_by_the_cosine():
    dataset = RetrievalSet("ir/two", {"q": "?"}, {"a": "", "b": ""}, {"q": {"b": 1}})
    vectors = np.array([[1, 0], [9, 9], [0.1, 0]], dtype=np.float32)  # b is shorter, and nearer
    assert ranking_scores(vectors, dataset)["ndcg_at_10"] == 1.0
    assert ranking_scores(vectors[[0, 2, 1]], dataset)["ndcg_at_10"] == pytest.approx(1 / np.log2(3))


def test_the_shipped_model(dataset):
    measured = measure(str(SHIPPED), dataset)
    assert measured["settings"]["dtype"] == "float32"
    assert measured["settings"]["weights_sha256"] == weights_sha256(JinaBertModel.from_pretrained(SHIPPED))
    found = {record["variation"]: record for record in measured["records"]}
    assert found["reference"]["cosine_min"] == pytest.approx(1.0, abs=1e-6)
    for name in ("each text alone", "order of the texts reversed", "64 tokens of padding", "lower case"):
        assert found[name]["cosine_min"] > 1 - 1e-5, name  # the tokenizer takes lower case of everything
        assert found[name]["top_k_overlap"] == 1.0, name
    for name in ("bfloat16", "float16"):
        assert 0.99 < found[name]["cosine_min"] < 1, name
        assert found[name]["ndcg_at_10"] == pytest.approx(found["reference"]["ndcg_at_10"], abs=0.1)
    assert found["full stop added at the end"]["cosine_min"] < 0.9999
    assert found["first 32 of 256 dimensions"]["cosine_min"] is None
    header, rows = table_rows(list(found.values()))
    assert {len(row) for row in rows} == {len(header)}


def test_padding_would_be_seen(dataset):
    """The control of the padding row: a model that attends to padding gives other vectors."""
    model = JinaBertModel.from_pretrained(SHIPPED)
    texts = list(dataset.documents.values())[:3]
    right = padded(model, texts)
    forward = model.forward
    model.forward = lambda input_ids, attention_mask: forward(input_ids, torch.ones_like(attention_mask))
    wrong = padded(model, texts)
    assert agreement(right, wrong, queries=1)["cosine_min"] < 0.999


@pytest.mark.parametrize(
    ("change", "message"),
    [({"--set": "ir/nothing"}, "nothing"), ({"--set": "STS"}, "no retrieval set"), ({"--onnx": "no.onnx"}, "no.onnx")],
)
def test_wrong_input_is_named(tmp_path, capsys, change, message):
    folder = tmp_path / "eval" / "STS"
    folder.mkdir(parents=True)
    rows = '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "sentence2": "c", "score": 2}\n'
    (folder / "test.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    folder = tmp_path / "eval" / "ir" / "one"
    folder.mkdir(parents=True)
    (folder / "corpus.jsonl.zst").write_bytes(zstandard.compress(b'{"_id": "d", "title": "", "text": "a text"}\n'))
    (folder / "queries.jsonl.zst").write_bytes(zstandard.compress(b'{"_id": "q", "text": "a question"}\n'))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    arguments = {"--model": str(SHIPPED), "--data": str(tmp_path), "--set": "ir/one"}
    arguments |= {"--output": str(tmp_path / "x.json")} | change
    with pytest.raises(SystemExit) as error:
        main([word for pair in arguments.items() for word in pair])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
