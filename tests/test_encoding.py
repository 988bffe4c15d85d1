"""`encode`: batch equals single, order and padding do not matter, bad input is named, truncation is said once."""

import copy
import logging
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from conftest import tiny_config

from modeling_jina_bert import JinaBertModel, count_truncations, encoding, onednn
from modeling_jina_bert.encoding import token_budget_batches

TEXTS = ["short", "", "a few more words here", "word " * 600, "x", "the same text", "the same text", "word " * 50]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config()).eval()
    model.tokenizer = tokenizer
    return model


def test_batch_equals_single_in_any_order(model):
    together = model.encode(TEXTS)
    alone = np.stack([model.encode(text) for text in TEXTS])
    backwards = model.encode(TEXTS[::-1], batch_size=2)[::-1]
    assert together.shape == (len(TEXTS), 64)
    assert together.dtype == np.float32
    assert np.abs(together).max() > 0.1
    np.testing.assert_allclose(together, alone, atol=2e-6)
    np.testing.assert_allclose(together, backwards, atol=2e-6)
    np.testing.assert_array_equal(together[5], together[6])


def test_padding_side_does_not_matter(model, tokenizer):
    side = tokenizer.padding_side
    vectors = []
    for tokenizer.padding_side in ("left", "right"):
        vectors.append(model.encode(TEXTS))
    tokenizer.padding_side = side
    np.testing.assert_allclose(*vectors, atol=2e-6)


def test_texts_beyond_one_tokenizer_window(model, monkeypatch):
    """Windows are tokenised ahead of the forward pass; order and truncation counts survive them."""
    expected = model.encode(TEXTS, max_length=32)
    module = sys.modules[type(model).encode.__module__]
    monkeypatch.setattr(module, "_WINDOW", 3)
    for first in (1, 2, len(TEXTS), 100):
        monkeypatch.setattr(module, "_FIRST_WINDOW", first)
        np.testing.assert_allclose(model.encode(TEXTS, max_length=32), expected, atol=2e-6)
        assert model.encode([]).shape == (0, 64)


def test_long_texts_are_tokenised_a_few_at_a_time():
    """2,048 books would be tens of gigabytes of token ids."""
    assert [len(window) for window in encoding._windows(["a"] * 5000)] == [256, 2048, 2048, 648]
    books = ["a" * 1_000_000] * 9 + ["b" * 10_000_000, "c"]
    windows = list(encoding._windows(books))
    assert [len(window) for window in windows] == [4, 4, 1, 1, 1]
    assert [text for window in windows for text in window] == books
    assert list(encoding._windows([])) == []


def test_the_next_texts_are_tokenised_during_the_forward_pass(model, monkeypatch):
    """The first pass waits for the second call of the tokenizer, which would never come if it were not under way."""
    monkeypatch.setattr(sys.modules[type(model).encode.__module__], "_FIRST_WINDOW", 2)
    calls, called_again = [], Event()
    tokenizer, compute = model.tokenizer, model._hidden_states

    def tokenize(texts, **options):
        calls.append(len(texts))
        if len(calls) == 2:
            called_again.set()
        return tokenizer(texts, **options)

    def wait_and_compute(*arguments, **options):
        assert called_again.wait(10)
        return compute(*arguments, **options)

    monkeypatch.setattr(model, "_needed_tokenizer", lambda: tokenize)
    monkeypatch.setattr(model, "_hidden_states", wait_and_compute)
    model.encode(["one", "two", "three", "four", "five"], max_length=16)
    assert calls == [2, 3]


def test_an_error_of_the_tokenizer_reaches_the_caller(model):
    with pytest.raises(BaseException, match="stride"):  # what tokenizers raises
        model.encode(TEXTS, stride=9, max_length=5)


@pytest.mark.parametrize("argument", [{"prompt": "query: "}, {"precision": "int8"}, {"max_lenght": 3}])
def test_an_argument_that_nobody_takes_is_an_error(model, argument):
    with pytest.raises(TypeError, match=next(iter(argument))):
        model.encode(TEXTS, **argument)


def test_ways_to_say_how_long_a_text_may_be(model):
    text = "word " * 600
    whole = model.encode(text, truncation=False)
    np.testing.assert_array_equal(model.encode(text, truncation="do_not_truncate", max_length=9), whole)
    with pytest.raises(ValueError, match="max_length=1 is less than the 2 special tokens"):
        model.encode(TEXTS, max_length=1)  # the tokenizer would take it for no limit
    with pytest.raises(ValueError, match="max_length=0 is less than one token"):
        model.encode(text, max_length=0)
    with pytest.raises(ValueError, match="max_length=1 is less than the 2 special tokens"):
        model.encode(text, max_length=1)  # which the tokenizer would take for no limit


def test_a_model_that_encode_moved_can_be_trained(model):
    moved = copy.deepcopy(model)
    moved.encode(TEXTS, device=torch.float64)  # as to another device: every parameter is a new tensor
    assert moved.dtype == torch.float64
    assert not any(parameter.is_inference() for parameter in moved.parameters())
    moved.train()(torch.tensor([[5, 6]])).last_hidden_state.sum().backward()


def test_threads_do_not_see_the_truncation_of_one_another(model):
    """A tokenizer keeps it between setting and using it; every thread waits there, if nothing keeps it out."""
    backend = model.tokenizer.backend_tokenizer

    class Slow:
        def __getattr__(self, name):
            time.sleep(0.002)
            return getattr(backend, name)

    texts = ["one two three four five six", "word " * 50]
    with count_truncations(), pytest.MonkeyPatch.context() as patch:
        expected = model.encode(texts[0], max_length=8), model.encode(texts[1], max_length=4)
        patch.setattr(model.tokenizer, "_tokenizer", Slow())
        with ThreadPoolExecutor(4) as executor:
            lengths = [(8, 4)[number % 2] for number in range(24)]
            calls = [
                executor.submit(model.encode, texts[number % 2], max_length=length)
                for number, length in enumerate(lengths)
            ]
            for number, call in enumerate(calls):
                np.testing.assert_array_equal(call.result(), expected[number % 2])


def test_texts_without_any_token_are_zero(model):
    vectors = model.encode(["", "two words", ""], add_special_tokens=False)
    assert not vectors[[0, 2]].any()
    np.testing.assert_allclose(vectors[1], model.encode("two words", add_special_tokens=False), atol=2e-6)
    assert model.encode("", add_special_tokens=False, output_value="token_embeddings").shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_without_instructions_for_it_is_said(model, caplog, monkeypatch, dtype):
    module = sys.modules[type(model).__module__]
    half = JinaBertModel(tiny_config(vocab_size=100, num_hidden_layers=1)).to(dtype)
    for supported, warnings in ((False, 1), (True, 0)):
        caplog.clear()
        module.warn_if_emulated.cache_clear()
        monkeypatch.setattr(module, "multiplies", lambda asked, supported=supported: supported and asked == dtype)
        with caplog.at_level(logging.WARNING):
            half(torch.tensor([[1, 2]]))
            half(torch.tensor([[1, 2]]))
            model.encode("float32")
        assert len(caplog.records) == warnings
    module.warn_if_emulated.cache_clear()


def test_instructions_for_half_precision(monkeypatch):
    """Of x86, AVX512 without BF16 has none, whatever torch's own answer is; elsewhere that is all there is."""
    for own in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda own=own: own)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda own=own: own)
        for has in (False, True):
            monkeypatch.setattr(onednn, "multiplies_bf16", lambda has=has: has)
            for machine, expected in (("x86_64", has), ("AMD64", has), ("aarch64", own)):
                monkeypatch.setattr(onednn.platform, "machine", lambda machine=machine: machine)
                assert onednn.multiplies(torch.bfloat16) == expected
                assert onednn.multiplies(torch.float16) == own


def test_shapes_and_types(model):
    assert model.encode("one").shape == (64,)
    assert model.encode([]).shape == (0, 64)
    assert isinstance(model.encode(TEXTS[:2], convert_to_tensor=True), torch.Tensor)
    listed = model.encode(TEXTS[:2], convert_to_numpy=False)
    assert isinstance(listed, list)
    assert isinstance(listed[0], torch.Tensor)


def test_truncated_dimensions_are_normalised_again(model):
    whole = model.encode(TEXTS)
    part = model.encode(TEXTS, truncate_dim=16, normalize_embeddings=True)
    expected = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(part, expected, atol=1e-6)


def test_token_embeddings_have_no_padding(model):
    found = model.encode(TEXTS[:3], output_value="token_embeddings")
    assert [len(x) for x in found] == [3, 2, 7]
    np.testing.assert_allclose(found[2].mean(0).numpy(), model.encode(TEXTS[2]), atol=1e-6)


def test_truncations_are_counted_in_place_of_the_warning(model, caplog):
    with count_truncations() as outer:
        model.encode("word " * 20, max_length=12)
        with count_truncations() as inner:
            model.encode(["short", "word " * 20, "word " * 30], max_length=12)
        assert (inner.texts, inner.tokens) == (2, (22 - 12) + (32 - 12))
        with ThreadPoolExecutor(1) as pool:  # another thread is not counted here, and has its warning
            pool.submit(model.encode, "word " * 20, max_length=12).result()
    assert (outer.texts, outer.tokens) == (3, 40)
    assert caplog.text.count("were truncated") == 1


def test_truncation_is_documented_and_said_once(model, caplog):
    with caplog.at_level(logging.WARNING, logger="modeling_jina_bert"):
        cut = model.encode([*TEXTS, "word " * 100], max_length=32)
    assert len(caplog.records) == 1
    assert "3 of 9 texts are longer than max_length=32" in caplog.text
    assert f"{602 + 52 + 102 - 3 * 32} tokens are not embedded" in caplog.text
    np.testing.assert_allclose(cut[3], model.encode("word " * 30), atol=1e-6)

    caplog.clear()
    whole = model.encode("word " * 9000, truncation=False)
    assert not caplog.records
    assert not np.allclose(whole, model.encode("word " * 9000), atol=1e-6)  # the default cuts at 8192
    assert "1 of 1 texts are longer than max_length=8192" in caplog.text


def test_the_training_flag_is_restored(model):
    for mode in (True, False):
        model.train(mode)
        model.encode("x")
        assert model.training is mode
        with pytest.raises(BaseException, match="stride"):
            model.encode(TEXTS, stride=9, max_length=5)
        assert model.training is mode


def test_progress_counts_texts(model, capsys):
    model.encode(TEXTS, show_progress_bar=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
    model.encode(TEXTS)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"sentences": ["a", 3]}, r"sentences\[1\] is 3"),
        ({"sentences": ["a", None]}, r"sentences\[1\] is None"),
        (
            {"sentences": ["a", "b\ud800"]},
            r"sentences\[1\] is not valid Unicode: .* '\\ud800', at character 1",
        ),
        ({"sentences": "a", "output_value": "pooled"}, "output_value='pooled'"),
        ({"sentences": "a", "truncate_dim": 65}, "truncate_dim=65"),
        ({"sentences": "a", "truncate_dim": 0}, "truncate_dim=0"),
    ],
)
def test_bad_input_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        model.encode(**call)


def test_no_tokenizer_is_an_error():
    model = JinaBertModel(tiny_config(vocab_size=100))
    assert model.tokenizer is None
    for call in (model.encode, model.encode_chunks):
        with pytest.raises(ValueError, match="assign a tokenizer"):
            call("x")


TOKENIZERS = {
    "none": (lambda folder: remove(folder, "tokenizer.json", "vocab.txt", "tokenizer_config.json"), "is missing or"),
    "settings alone": (lambda folder: remove(folder, "tokenizer.json", "vocab.txt"), "has no tokenizer"),
    "no object": (lambda folder: (folder / "tokenizer.json").write_text("[]"), "cannot be read"),
    "no vocabulary": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
    "no JSON": (lambda folder: (folder / "tokenizer.json").write_text("x"), "cannot be read"),
}


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_bad_tokenizer_beside_the_weights_is_an_error(golden, tmp_path, case):
    """Without its files transformers makes a tokenizer of special tokens, with which every text is [UNK]s."""
    folder = shutil.copytree(golden.folder, tmp_path / "model", ignore=shutil.ignore_patterns("plain", "golden*"))
    damage, message = TOKENIZERS[case]
    damage(folder)
    with pytest.raises(ValueError, match=f"^{folder}.*{message}") as error:
        JinaBertModel.from_pretrained(folder).encode("x")
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_a_larger_vocabulary_is_an_error(tmp_path, tokenizer):
    JinaBertModel(tiny_config(vocab_size=900)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"the tokenizer has token {len(tokenizer) - 1}, the embedding 900 rows"):
        JinaBertModel.from_pretrained(tmp_path).encode("x")


def test_batches_respect_the_budget():
    lengths = [3, 900, 40, 41, 5, 100, 7, 2000]
    batches = list(token_budget_batches(lengths, batch_size=3, max_tokens=1000))
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    assert batches[0] == [7]  # longer than the budget: alone
    for batch in batches[1:]:
        assert len(batch) <= 3
        assert sum(lengths[i] for i in batch) <= 1000
