"""Laws of long documents: each way gives the vectors that it says, all ways see the same documents, a needle lies
where the cell says in a document of the length that it says, what is scored is not scored again, a wrong input is one
line.
"""

import json

import numpy as np
import pytest
import torch
import zstandard
from conftest import REPOSITORY, SHIPPED, tiny_config
from sentence_transformers import SentenceTransformer

from evaluation import document_vectors as document_vectors_module
from evaluation import long_documents, needle
from evaluation.document_vectors import (
    DocumentVectors,
    JinaReader,
    SentenceReader,
    Way,
    chunk_spans,
    document_vectors,
    ways_of,
)
from evaluation.long_documents import Store, sample, score_retrieval, useful_ways
from evaluation.long_report import answers, figure_of, markdown, sign
from evaluation.needle import Haystack, Needle, pick_haystacks, pick_needles
from evaluation.sets import EvaluationError, RetrievalSet, TextSet
from evaluation.significance import Difference
from evaluation.systems import EmbeddingModel
from modeling_jina_bert import JinaBertModel

TEXTS = [json.loads(line)["text"] for line in (REPOSITORY / "tests/data/corpus.jsonl").read_text().splitlines()]
PAIRS = [json.loads(line) for line in (REPOSITORY / "tests/data/pairs.jsonl").read_text().splitlines()]
DOCUMENTS = ["a whale breathes air and lives in the sea", "", "bread needs flour, water and salt; bake it"]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config()).eval()
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def reader(model):
    return JinaReader("random", model)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with long/Facts (countries by a fact that stands in them) and ir/Facts (the same facts as passages)."""
    root = tmp_path_factory.mktemp("data") / "eval"
    countries = [text for text in TEXTS if len(text.split()) == 400][:12]
    queries = [{"_id": f"q{i}", "text": " ".join(text.split()[:2])} for i, text in enumerate(countries)]
    passages = [pair["positive"] for pair in PAIRS[:40]]
    write_rows(root / "long/Facts/corpus.jsonl.zst", [{"_id": f"d{i}", "text": x} for i, x in enumerate(countries)])
    write_rows(root / "long/Facts/queries.jsonl.zst", queries)
    write_rows(root / "ir/Facts/corpus.jsonl.zst", [{"_id": f"d{i}", "text": x} for i, x in enumerate(passages)])
    write_rows(
        root / "ir/Facts/queries.jsonl.zst", [{"_id": f"q{i}", "text": p["query"]} for i, p in enumerate(PAIRS[:40])]
    )
    for name, count in (("long/Facts", len(countries)), ("ir/Facts", 40)):
        rows = "".join(f"q{i}\td{i}\t1\n" for i in range(count))
        (root / name / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    labelled = [{"text": text, "label": "Factbook" if i % 2 else "other"} for i, text in enumerate(TEXTS[:12])]
    write_rows(root / "clustering/Kinds/test.jsonl.zst", labelled)
    return root.parent


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_each_way_gives_the_vectors_that_it_says(reader, model):
    ways = ways_of(reader, [6, 64], [4])
    found = dict(document_vectors(reader, DOCUMENTS, ways))
    assert list(found) == [Way("whole", 6), Way("whole", 64), Way("mean", 4), Way("best", 4), Way("late", 4)]
    np.testing.assert_allclose(found[ways[0]].vectors, unit(model.encode(DOCUMENTS, max_length=6)), atol=1e-5)
    assert np.abs(found[ways[0]].vectors - found[ways[1]].vectors)[0].max() > 1e-2  # control: the cut is real
    spans = chunk_spans(DOCUMENTS, 4, reader.tokenizer)
    chunks = [text[slice(*span)] for text, row in zip(DOCUMENTS, spans, strict=True) for span in row or [(0, 0)]]
    assert chunks[:4] == ["a whale breathes", "air and lives in", "the sea", ""]
    assert found[Way("best", 4)].first.tolist() == [0, 3, 4] == found[Way("late", 4)].first.tolist()
    alone = unit(model.encode(chunks))
    np.testing.assert_allclose(found[Way("best", 4)].vectors, alone, atol=1e-5)
    means = unit(np.stack([alone[:3].mean(axis=0), alone[3], alone[4:].mean(axis=0)]))
    np.testing.assert_allclose(found[Way("mean", 4)].vectors, means, atol=1e-5)
    late = [chunk.embedding for chunk in model.encode_chunks(DOCUMENTS[0], 4, normalize_embeddings=True)]
    np.testing.assert_allclose(found[Way("late", 4)].vectors[:3], late, atol=1e-5)
    assert np.abs(found[Way("late", 4)].vectors[:3] - alone[:3]).max() > 1e-2  # control: context counts
    np.testing.assert_allclose(found[Way("late", 4)].vectors[3], alone[3], atol=1e-5)  # the document without a token


def test_a_model_with_a_limit_reads_so_much_and_no_more():
    shipped = SentenceTransformer(str(SHIPPED), trust_remote_code=True, device="cpu")
    shipped.max_seq_length = 32
    reader = SentenceReader(EmbeddingModel("shipped", shipped))
    ways = ways_of(reader, [8, 512], [16, 64])
    assert [(way.kind, way.tokens) for way in ways] == [
        ("whole", 8), ("whole", 32), ("mean", 16), ("best", 16), ("mean", 30), ("best", 30),
    ]  # fmt: skip
    found = dict(document_vectors(reader, TEXTS[:2], ways))
    assert shipped.max_seq_length == 32
    for way in ways[:2]:
        shipped.max_seq_length = way.tokens
        np.testing.assert_allclose(found[way].vectors, shipped.encode(TEXTS[:2]), atol=1e-5)
    assert np.abs(found[ways[0]].vectors - found[ways[1]].vectors).max() > 1e-2


def toy(qrels):
    return RetrievalSet("long/Toy", {q: q for q in qrels}, {"a": "x", "b": "y", "c": "z"}, qrels)


def test_a_document_scores_by_its_best_vector():
    dataset = toy({"q1": {"b": 1}, "q2": {"c": 1}})
    # a has one vector, b two, c one; q1 is nearest to the second of b, q2 nearest to b, then c.
    vectors = np.array([[1, 0], [-1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    found = DocumentVectors(vectors, np.array([0, 1, 3]))
    samples = score_retrieval(np.array([[0, 1], [0.1, 0.9]], dtype=np.float32), found, dataset)
    np.testing.assert_allclose(samples["ndcg_at_10"], [1.0, 1 / np.log2(3)], atol=1e-6)
    assert samples["group"].tolist() == [0, 1]


def test_a_sample_keeps_the_queries_that_its_documents_answer():
    dataset = toy({"q1": {"a": 1, "b": 1}, "q2": {"c": 1}, "q3": {"b": 0, "a": 1}})
    found = sample(dataset, 2)
    assert len(found.documents) == 2
    assert found.documents == {name: dataset.documents[name] for name in found.documents}
    expected = {q for q, judged in dataset.qrels.items() if any(judged[d] for d in judged if d in found.documents)}
    assert set(found.queries) == set(found.qrels) == expected
    assert all(set(judged) <= set(found.documents) for judged in found.qrels.values())
    assert sample(dataset, 3) is dataset
    assert sample(dataset, None) is dataset
    with pytest.raises(EvaluationError, match="keeps no query"):
        sample(toy({"q": {next(iter(set("abc") - set(found.documents))): 1}}), 2)


def test_clustering_has_no_ways_with_several_vectors():
    ways = [Way("whole", 128), Way("whole", 512), Way("whole", 1024), *(Way(k, 64) for k in ("mean", "best", "late"))]
    assert [way.kind for way in useful_ways(ways, "clustering", 300)] == ["whole", "whole", "mean"]
    assert useful_ways(ways, "retrieval", 5000) == ways


@pytest.fixture
def as_model(monkeypatch, model):
    """The random model is what --model loads; its calls of `whole` are counted."""
    calls = []

    class Counting(JinaReader):
        def whole(self, texts, tokens):
            calls.append((len(texts), tokens))
            return super().whole(texts, tokens)

    monkeypatch.setattr(document_vectors_module, "load_jina_bert", lambda *_: model)
    monkeypatch.setattr(document_vectors_module, "JinaReader", Counting)
    return calls


def test_a_run_from_the_command_line_and_its_resumption(data, tmp_path, capsys, as_model):
    arguments = ["--model", "random", "--data", str(data), "--sets", "long/*", "clustering/Kinds"]
    arguments += ["--lengths", "16", "64", "2048", "4096", "--chunks", "64", "--output", str(tmp_path / "out")]
    long_documents.main(arguments)
    store = Store(tmp_path / "out" / "records.json")
    ways = [(r["set"], r["settings"]["kind"], r["settings"]["tokens"]) for r in store.records]
    whole = [("whole", 16), ("whole", 64), ("whole", 2048)]  # 4096 reads no more than 2048 does
    chunks = [("mean", 64), ("best", 64), ("late", 64)]
    assert ways == [("long/Facts", *way) for way in whole + chunks] + [
        ("clustering/Kinds", *way) for way in [*whole, chunks[0]]
    ]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    (retrieval, clustering) = answers(store.records, store.samples)
    assert set(retrieval.ways) == {"first", "whole", "mean", "best", "late"}
    assert set(clustering.contrasts) == {"whole - first", "whole - mean of chunks"}
    by_hand = [store.samples[retrieval.ways[way]["samples"]]["ndcg_at_10"].mean() for way in ("whole", "first")]
    assert retrieval.contrasts["whole - first"].value == pytest.approx(by_hand[0] - by_hand[1], abs=1e-6)
    low, high = retrieval.record["metrics"]["interval_95"]
    assert low < retrieval.record["metrics"]["ndcg_at_10"] < high
    assert f"{by_hand[0]:.3f} (2,048)" in table

    as_model.clear()
    lost = store.records.pop(1)
    (tmp_path / "out" / "records.json").write_text(json.dumps({"records": store.records}))
    long_documents.main(arguments)
    assert as_model == [(12, None), (12, 64)]  # the queries, and the one way that was lost
    again = {r["samples"]: r["metrics"] for r in Store(tmp_path / "out" / "records.json").records}
    assert again[lost["samples"]] == lost["metrics"]
    assert len(again) == len(ways)
    assert len(figure_of(store.records).axes) == 2


def test_sets_with_the_same_documents_embed_them_once(tmp_path, reader, monkeypatch):
    embedded = []
    monkeypatch.setattr(JinaReader, "whole", lambda self, texts, tokens: embedded.append(len(texts)) or unit(
        np.arange(2 * len(texts), dtype=np.float32).reshape(-1, 2) + 1))  # fmt: skip
    pair = [toy({"q1": {"a": 1}}), toy({"q2": {"b": 1}, "q3": {"c": 1}})]
    datasets = [(pair[0], 3), (RetrievalSet("long/Other", pair[1].queries, pair[1].documents, pair[1].qrels), 3)]
    store = Store(tmp_path / "records.json")
    long_documents.evaluate(reader, datasets, [Way("whole", 8)], store, "command")
    assert embedded == [1, 2, 3]  # two sets of queries, one of documents
    assert [record["set"] for record in store.records] == ["long/Toy", "long/Other"]


WRONG = {
    "--sets long/Nothing --data DATA": "unknown set 'long/Nothing'",
    "--sets long/Facts": "say with --data",
    "--sets long/Facts --data DATA --lengths 2": "--lengths 2: the least is 3",
    "--sets long/Facts --data DATA --chunks 0": "--chunks 0: the least is 1",
    "--sets long/Facts --data DATA --documents 1": "--documents 1: the least is 2",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_input_is_one_line(arguments, data, tmp_path, capsys, as_model):
    words = [str(data) if word == "DATA" else word for word in arguments.split()]
    with pytest.raises(SystemExit) as error:
        long_documents.main(["--model", "random", "--output", str(tmp_path), *words])
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert WRONG[arguments] in line


def test_a_difference_counts_where_its_interval_excludes_0():
    signs = [sign(Difference(0.1, interval, 0.01)) for interval in ((0.01, 0.2), (-0.2, -0.01), (-0.1, 0.2), None)]
    assert signs == [1, -1, 0, 0]
    assert markdown([], {}) == "No scores.\n"


@pytest.mark.parametrize("tokens", [256, 512])
def test_a_needle_lies_where_it_should_in_a_document_of_the_right_length(tokenizer, tokens):
    text = "\n\n".join(TEXTS[:4])
    passage = "The zeppelin of Friedrichshafen rose above the lake."
    needle_ = Needle("zeppelin", passage, len(tokenizer(passage, add_special_tokens=False)["input_ids"]))
    haystack = Haystack(text, tokenizer)
    places = []
    for depth in (0, 25, 50, 75, 100):
        document = haystack.with_needle(needle_, tokens, depth)
        assert document.count(passage) == 1
        before, after = document.split(passage)
        assert abs(len(tokenizer(document)["input_ids"]) - tokens) <= 2
        assert text.startswith(before.rstrip())
        assert after.strip() in text
        assert not before or before.rstrip()[-1] in ".;:)!?" or depth == 100  # between two sentences
        places.append(len(tokenizer(before, add_special_tokens=False)["input_ids"]) / tokens)
    assert places[0] == 0
    assert places == sorted(places)
    assert places[-1] > 0.9 - len(passage) / tokens / 2
    np.testing.assert_allclose(places[1:4], [0.25, 0.5, 0.75], atol=0.2)
    control = haystack.with_needle(None, tokens, 0)
    assert passage not in control
    assert abs(len(tokenizer(control)["input_ids"]) - tokens) <= 2


def test_needles_and_haystacks_are_chosen_without_repetition(tokenizer):
    dataset = RetrievalSet(
        "ir/Toy",
        {f"q{i}": f"query {i}" for i in range(6)},
        {"a": "short", "b": "also short", "c": "word " * 500, "d": "brief"},
        {"q0": {"a": 1}, "q1": {"a": 1}, "q2": {"b": 2, "c": 1}, "q3": {"c": 1}, "q4": {"d": 1}, "q5": {"d": 1}},
    )
    found = pick_needles(dataset, 3, tokenizer)
    assert sorted(each.passage for each in found) == ["also short", "brief", "short"]
    with pytest.raises(EvaluationError, match="has 3 passages of at most 128 tokens"):
        pick_needles(dataset, 4, tokenizer)
    stretches = pick_haystacks(["one two", "three", "four five six", "seven"], 3, 2, tokenizer)
    assert stretches == ["one two\n\nthree", "four five six"]
    with pytest.raises(EvaluationError, match="hold 2 stretches of 3 tokens"):
        pick_haystacks(["one two", "three", "four five six", "seven"], 3, 3, tokenizer)


def test_needles_from_the_command_line_and_resumption(data, tmp_path, as_model, capsys):
    arguments = ["--model", "random", "--data", str(data), "--needles", "ir/Facts", "--haystacks", "long/Facts"]
    arguments += ["--lengths", "256", "640", "--depths", "0", "100", "--documents", "3", "--chunk", "64"]
    arguments += ["--kinds", "whole", "best", "late", "--output", str(tmp_path)]
    needle.main(arguments)
    records = Store(tmp_path / "needle.json").records
    cells = [(r["settings"]["length"], r["settings"]["depth"], r["settings"]["kind"]) for r in records]
    assert len(cells) == len(records) == 2 * (3 + 3) + 2 + 2 * 1 + 1  # the first 512 of 640 besides; controls: whole
    assert {kind for _, depth, kind in cells if depth is None} == {"whole"}
    table = (tmp_path / "needle.md").read_text()
    assert table in capsys.readouterr().out
    assert "| random | first 512 | 640 |" in table
    assert (tmp_path / "needle.png").stat().st_size > 10_000
    as_model.clear()
    needle.main(arguments)
    assert as_model == []
    with pytest.raises(SystemExit) as error:
        needle.main([*arguments, "--depths", "101"])
    assert error.value.code == 2
    assert "--depths 101: is not in 0 ... 100 percent." in capsys.readouterr().err


def test_clustering_scores_are_sklearns(tmp_path):
    from sklearn.metrics import v_measure_score

    from evaluation.metrics import scores

    dataset = TextSet("clustering/Toy", "clustering", ["a"] * 12, ["x", "y"] * 6)
    vectors = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    samples = long_documents.score_clustering(vectors, dataset)
    expected = np.mean([v_measure_score(dataset.labels, row) for row in samples["assigned"]])
    assert scores("clustering", samples)["v_measure"] == pytest.approx(expected)
