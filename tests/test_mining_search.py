"""Rankings for hard-negative mining: exact whatever the blocks, in little memory; an index and BM25; their timing."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from training import mining_timing
from training.embedding_shards import Vectors
from training.mining_recipe import Retriever
from training.mining_search import BM25Search, DenseSearch, block_rows, top_k
from training.mining_texts import Texts
from training.recipe import RecipeError


def shards(folder: Path, vectors: np.ndarray, rows: int, order: np.ndarray | None = None) -> Vectors:
    """Vectors in files of `rows`, text i in place `order[i]`."""
    folder.mkdir(parents=True)
    place = np.arange(len(vectors)) if order is None else order
    stored = np.empty_like(vectors)
    stored[place] = vectors
    files = [folder / f"{start:04d}.npy" for start in range(0, len(vectors), rows)]
    for number, file in enumerate(files):
        np.save(file, stored[number * rows : (number + 1) * rows].astype(np.float16))
    return Vectors(files, place // rows, place % rows)


def unit_vectors(rows: int, width: int = 24) -> np.ndarray:
    """Random vectors of length 1 that float16 holds exactly."""
    vectors = np.random.default_rng(rows).standard_normal((rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def best(queries: np.ndarray, passages: np.ndarray, k: int) -> np.ndarray:
    """The slow obvious ranking."""
    scores = queries.astype(np.float64) @ passages.astype(np.float64).T
    ranking = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    gaps = -np.diff(np.take_along_axis(scores, ranking, axis=1))
    assert gaps.min() > 1e-7, "choose other vectors: float32 cannot tell two of them apart"
    return ranking


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_merging_blocks_is_exact_whatever_their_size(tmp_path, rows):
    passages, queries = unit_vectors(301), unit_vectors(13)
    stored = shards(tmp_path / "passages", passages, 50, np.random.default_rng(0).permutation(301))
    np.testing.assert_array_equal(stored.take(np.array([300, 0, 299])), passages[[300, 0, 299]])
    assert sorted(np.concatenate([ids for ids, _ in stored.blocks(rows)])) == list(range(301))
    np.testing.assert_array_equal(top_k(queries, stored.blocks(rows), 20), best(queries, passages, 20))


def test_equals_are_ordered_and_what_is_missing_is_minus_one():
    passages = np.eye(4, dtype=np.float32)[[0, 1, 0, 1, 0]]
    blocks = [(np.array([4, 1]), passages[[4, 1]]), (np.array([2, 3, 0]), passages[[2, 3, 0]])]
    found = top_k(np.eye(4, dtype=np.float32)[:1], blocks, 7)
    assert found.tolist() == [[0, 2, 4, 1, 3, -1, -1]]


def test_less_memory_gives_smaller_blocks_and_the_same_results(tmp_path, monkeypatch):
    passages, queries = shards(tmp_path / "p", unit_vectors(5000), 512), shards(tmp_path / "q", unit_vectors(13), 5)
    sizes, blocks = [], Vectors.blocks
    monkeypatch.setattr(Vectors, "blocks", lambda self, rows: sizes.append(rows) or blocks(self, rows))
    small = block_rows(65, width=24, queries=13, k=20)
    found = [DenseSearch(queries, passages, Retriever(), memory_mb=mb).search(np.arange(13), 20) for mb in (65, 500)]
    np.testing.assert_array_equal(*found)
    assert sizes[0] == small < 5000 < sizes[1]
    assert 64 * 2**20 + small * (10 * 24 + 16) <= 65 * 2**20
    with pytest.raises(RecipeError, match="memory_mb=64 is too little"):
        block_rows(64, width=24, queries=13, k=20)


def test_ivf_that_probes_all_lists_is_exact_and_one_list_is_not(tmp_path):
    passages, queries = unit_vectors(400), unit_vectors(13)
    stored, asked = shards(tmp_path / "p", passages, 100), shards(tmp_path / "q", queries, 13)
    expected = best(queries, passages, 10)
    for probes, exact in ((8, True), (1, False)):
        retriever = Retriever(name="ivf", index="ivf", lists=8, probes=probes)
        found = DenseSearch(asked, stored, retriever, memory_mb=100).search(np.arange(13), 10)
        assert (found == expected).all() == exact
        assert np.isin(found[:, 0], expected).any()
    with pytest.raises(RecipeError, match="lists=500, but there are 400 passages"):
        DenseSearch(asked, stored, Retriever(name="ivf", index="ivf", lists=500), memory_mb=100)


def test_bm25_finds_words_and_says_minus_one_where_there_are_none():
    passages = Texts.of(["a red fox sleeps", "the green river", "", "red red river"])
    search = BM25Search(Texts.of(["river", "fox red", "zebra", ""]), passages, memory_mb=1)
    found = search.search(np.arange(4), 6)
    assert found[:, :2].tolist() == [[1, 3], [0, 3], [-1, -1], [-1, -1]]
    assert (found[:, 2:] == -1).all()
    assert (BM25Search(Texts.of(["x"]), Texts.of(["", "."]), memory_mb=1).search(np.arange(1), 3) == -1).all()


def test_the_timing_searches_what_mining_searches_and_notices_an_inexact_one(tmp_path, monkeypatch, capsys):
    sizes = ["--passages", "3000", "--queries", "40", "--width", "16", "--k", "10", "--memory-mb", "70"]
    monkeypatch.setattr(sys, "argv", ["mining_timing", *sizes, "--output", str(tmp_path / "time.json")])
    mining_timing.main()
    result = json.loads((tmp_path / "time.json").read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert result["passages"] == 3000
    assert result["seconds"] >= 0
    assert result["passages_of_a_block"] > 1024
    monkeypatch.setattr(DenseSearch, "search", lambda self, queries, k: np.zeros((len(queries), k), np.int32))
    with pytest.raises(RuntimeError, match="other results than a product of all vectors"):
        mining_timing.main()


def test_bm25_is_refused_where_its_index_would_outgrow_the_bound():
    passages = Texts.of(["a word " * 15_000] * 2)  # 60,000 words, 2.3 MiB
    with pytest.raises(RecipeError, match=r"memory_mb=2 is too little for bm25 of 2 passages with 60,000 words: .*3;"):
        BM25Search(Texts.of(["word"]), passages, memory_mb=2)
    BM25Search(Texts.of(["word"]), passages, memory_mb=3)
