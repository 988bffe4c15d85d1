"""Texts longer than a teacher reads: their windows, and the mean of the windows' vectors."""

import numpy as np
import pytest
from conftest import SHIPPED

from training.embedding_shards import embed, load_embedder
from training.mining_texts import Texts
from training.recipe import RecipeError
from training.teacher_windows import WindowedVectors, cut, windows_of

LONG = "The lighthouse keeper counted seventeen extraordinary ships before nightfall. " * 9


@pytest.fixture(scope="module")
def teacher():
    return load_embedder(str(SHIPPED), max_length=24, batch_size=8)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_spans_cover_all_tokens_and_begin_with_words(size):
    words = [0, 0, 1, 2, 2, 2, 2, 3, 4, 4]
    spans = cut(words, size)
    assert [token for first, last in spans for token in range(first, last)] == list(range(len(words)))
    assert all(last - first <= size for first, last in spans)
    for first, _ in spans[1:]:
        assert words[first] != words[first - 1] or words.count(words[first]) > size


def test_windows_are_read_whole_and_hold_the_whole_text(teacher):
    texts = ["short", "", LONG, "x" * 300]
    found = windows_of(Texts.of(texts), teacher, "document")
    windows = found.texts.take(np.arange(len(found.texts)))
    parts = [windows[first:last] for first, last in zip(found.starts[:-1], found.starts[1:], strict=True)]
    assert parts[:2] == [["short"], [""]]
    assert " ".join(parts[2]) == LONG.strip()
    assert "".join(parts[3]) == texts[3]
    assert len(parts[2]) > 3
    tokenizer = teacher.model.tokenizer
    counts = [len(tokenizer(window, add_special_tokens=False)["input_ids"]) for window in windows]
    assert max(counts) == 22  # and [CLS] and [SEP]
    of_long = slice(found.starts[2], found.starts[3])
    assert counts[of_long] == found.tokens[of_long].tolist()
    assert sum(counts[of_long]) == len(tokenizer(LONG, add_special_tokens=False)["input_ids"])


def test_the_vector_of_a_long_text_is_the_mean_of_its_windows(teacher, tmp_path):
    texts = [LONG, "short", "a sentence of some more words than one"]
    windows = windows_of(Texts.of(texts), teacher, "document")
    options = {"folder": tmp_path, "dtype": "float32", "shard_rows": 100}
    vectors = WindowedVectors(embed(teacher, windows.texts, "document", **options), windows)
    assert len(vectors) == 3
    own = teacher.embed(texts, "document")
    found = vectors.take(np.array([2, 0, 1, 0]))
    assert found.dtype == np.float32
    assert found.shape == (4, vectors.width)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found[[0, 2]], own[[2, 1]], atol=1e-6)
    np.testing.assert_array_equal(found[1], found[3])
    pieces = windows.texts.take(np.arange(windows.starts[1]))
    mean = (teacher.embed(pieces, "document") * windows.tokens[: len(pieces), None]).sum(axis=0)
    np.testing.assert_allclose(found[1], mean / np.linalg.norm(mean), atol=1e-6)
    assert (found[1] @ own[0]) < 0.999  # the teacher's own vector is that of the beginning
    assert vectors.take(np.array([], int)).shape == (0, vectors.width)


def test_what_has_no_windows_is_refused(teacher):
    short = load_embedder(str(SHIPPED), max_length=2, batch_size=8)
    with pytest.raises(RecipeError, match="leaves no token for a text"):
        windows_of(Texts.of(["a"]), short, "document")
