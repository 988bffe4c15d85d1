"""`encode_chunks`: chunks equal a slow reference that averages single tokens of the hidden states, with windows and
without; one span over the text is `encode`; nothing depends on the batch; bad spans are named with their values.
"""

import gc
import math

import numpy as np
import pytest
import torch
from conftest import SHIPPED, run_as_stranger, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from modeling_jina_bert import JinaBertModel, chunking, sentence_spans
from modeling_jina_bert.chunking import macro_windows

STORY = (
    "Dr. Anna Müller came to Berlin in 1999. She liked it! The city, she said, was... unfinished.\n\n"
    "Its museums (No. 5 above all) were free. 東京は都市。大阪も。 Cafe\u0301s 👩‍👩‍👧 everywhere  \n"
)
TEXTS = [STORY, "", "x", "   ", "word " * 150, "é", "Two sentences. Or so.", "👍🏽"]
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config()).eval()
    model.tokenizer = tokenizer
    return model


def byte_level_tokenizer(*, trim_offsets: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as of the German and Spanish models, without merges: a token is a byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([STORY], trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(
        *special, trim_offsets=trim_offsets, add_prefix_space=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8192)


def slow_tokens(model, text, max_length=None, overlap=0):
    """Token embeddings of a text by the plain forward pass and eager attention, window by window."""
    ids = model.tokenizer(text)["input_ids"]
    found = [None] * len(ids)
    start = 0
    while None in found:
        window = ids[start : start + max_length] if max_length else ids
        with torch.no_grad():
            states = model(torch.tensor([window]), output_hidden_states=True, output_attentions=True).hidden_states[
                -1
            ][0]
        for place, state in enumerate(states, start=start):
            if found[place] is None:
                found[place] = state.double()
        start += (max_length or 0) - overlap
    return found


def slow_chunk(model, text, span, tokens):
    """(embedding, number of tokens) of the characters [start, end): the tokens that begin there, one by one."""
    encoding = model.tokenizer(text, return_offsets_mapping=True)
    inside = [place for place, sequence in enumerate(encoding.sequence_ids(0)) if sequence is not None]
    chosen = []
    for place in inside:
        first, last = encoding["offset_mapping"][place]
        while first < last - 1 and text[first].isspace() and text[first:last].strip():
            first += 1
        if span[0] <= first < span[1]:
            chosen.append(place)
    if inside[0] in chosen:
        chosen = [*range(inside[0]), *chosen]
    if inside[-1] in chosen:
        chosen = [*chosen, *range(inside[-1] + 1, len(tokens))]
    return sum(tokens[place] for place in chosen) / len(chosen), len(chosen)


def assert_equal_to_reference(model, text, chunks, tokens):
    assert chunks
    for chunk in chunks:
        expected, count = slow_chunk(model, text, chunk.span, tokens)
        assert chunk.tokens[1] - chunk.tokens[0] == count
        assert chunk.text == text[chunk.span[0] : chunk.span[1]]
        assert chunk.embedding.shape == (64,)
        assert chunk.embedding.dtype == np.float32
        np.testing.assert_allclose(chunk.embedding, expected.numpy(), **TOLERANCE)


def stacked(chunks):
    return np.stack([chunk.embedding for chunk in chunks])


# The reference


@pytest.mark.parametrize("spans", ["sentences", 1, 7, [(5, 60), (0, 10), (8, 40), (0, len(STORY)), (5, 60)], None])
def test_chunks_equal_a_slow_reference(model, spans):
    tokens = slow_tokens(model, STORY)
    chunks = model.encode_chunks(STORY, spans)
    assert_equal_to_reference(model, STORY, chunks, tokens)
    if isinstance(spans, list):
        assert [chunk.span for chunk in chunks] == spans


@pytest.mark.parametrize(("max_length", "overlap"), [(17, 5), (17, 0), (17, 16), (16, 1), (40, 20)])
def test_windows_equal_a_slow_reference(model, max_length, overlap):
    tokens = slow_tokens(model, STORY, max_length, overlap)
    for spans in ("sentences", 9, [(0, len(STORY)), (20, 90), (50, 60)]):
        chunks = model.encode_chunks(STORY, spans, max_length=max_length, overlap=overlap)
        assert_equal_to_reference(model, STORY, chunks, tokens)
    whole = stacked(model.encode_chunks(STORY, 9))
    windows = stacked(model.encode_chunks(STORY, 9, max_length=max_length, overlap=overlap))
    assert np.abs(whole - windows)[-1].max() > 1e-3  # control: the windows do cut the attention


def test_windows_by_hand():
    assert macro_windows(10, 10, 3) == [(0, 0, 10)]
    assert macro_windows(11, 10, 3) == [(0, 0, 10), (7, 10, 11)]
    assert macro_windows(17, 10, 3) == [(0, 0, 10), (7, 10, 17)]
    assert macro_windows(18, 10, 3) == [(0, 0, 10), (7, 10, 17), (14, 17, 18)]
    assert macro_windows(3, 1, 0) == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    assert macro_windows(99, None, 3) == [(0, 0, 99)]
    assert macro_windows(0, 10, 3) == []
    for length in range(1, 60):
        kept = [place for _, first, end in macro_windows(length, 13, 4) for place in range(first, end)]
        assert kept == list(range(length))


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_byte_level_tokens(trim_offsets):
    """Several tokens share the characters of an emoji; the space before a word may be in its token."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer(trim_offsets=trim_offsets)
    model = JinaBertModel(tiny_config(vocab_size=len(tokenizer))).eval()
    model.tokenizer = tokenizer
    tokens = slow_tokens(model, STORY)
    words = [(STORY.index(word), STORY.index(word) + len(word)) for word in ("Anna", "Berlin", "👩‍👩‍👧", "everywhere")]
    chunks = model.encode_chunks(STORY, words)
    assert_equal_to_reference(model, STORY, chunks, tokens)
    assert chunks[2].tokens[1] - chunks[2].tokens[0] > len("👩‍👩‍👧")
    for spans in ("sentences", 5):
        chunks = model.encode_chunks(STORY, spans)
        assert [chunk.tokens[0] for chunk in chunks[1:]] == [chunk.tokens[1] for chunk in chunks[:-1]]
        assert (chunks[0].tokens[0], chunks[-1].tokens[1]) == (0, len(tokens))


# `encode`


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_one_span_over_the_text_is_encode(model, text):
    expected = model.encode(text)
    (chunk,) = model.encode_chunks(text, None)
    assert (chunk.span, chunk.text) == ((0, len(text)), text)
    np.testing.assert_allclose(chunk.embedding, expected, **TOLERANCE)
    if text.strip():
        visible = (len(text) - len(text.lstrip()), len(text.rstrip()))
        for chunk in model.encode_chunks(text, [(0, len(text)), visible]):
            np.testing.assert_allclose(chunk.embedding, expected, **TOLERANCE)
    else:
        assert model.encode_chunks(text, "sentences") == model.encode_chunks(text, 3) == []
        assert model.encode_chunks(text, []) == []


@pytest.mark.parametrize("spans", ["sentences", 1, 11])
def test_chunks_that_tile_the_text_average_to_encode(model, spans):
    chunks = model.encode_chunks(STORY, spans)
    assert len(chunks) > 3
    sizes = np.array([end - start for start, end in (chunk.tokens for chunk in chunks)])
    assert sizes.sum() == len(model.tokenizer(STORY)["input_ids"])
    np.testing.assert_allclose(np.average(stacked(chunks), axis=0, weights=sizes), model.encode(STORY), **TOLERANCE)
    if spans == "sentences":
        assert "".join(chunk.text for chunk in chunks) == STORY
    else:
        assert (sizes[1:-1] == spans).all()
        assert sizes[0] == spans + 1  # [CLS]


def test_a_chunk_sees_its_context(model):
    """The same sentence in two places has two vectors, and neither is that of the sentence alone."""
    sentence = "The city is large."
    text = f"Berlin is old. {sentence} " + "Rome is older. Much older. " * 3 + sentence
    spans = [(15, 15 + len(sentence)), (len(text) - len(sentence), len(text))]
    first, second = stacked(model.encode_chunks(text, spans))
    alone = model.encode(sentence)
    for one, other in ((first, second), (first, alone), (second, alone)):
        assert np.abs(one - other).max() > 1e-2


def test_the_limit_is_that_of_encode_or_none(model, monkeypatch):
    monkeypatch.setattr(model.config, "model_max_length", 50)
    text = STORY * 2
    limits = ("model", 50, None, 10_000)
    found = {limit: stacked(model.encode_chunks(text, 20, max_length=limit, overlap=9)) for limit in limits}
    np.testing.assert_array_equal(found["model"], found[50])
    np.testing.assert_array_equal(found[None], found[10_000])
    assert np.abs(found[50] - found[None])[-1].max() > 1e-3
    (whole,) = model.encode_chunks(text, None, max_length=None)
    np.testing.assert_allclose(whole.embedding, model.encode(text, truncation=False), **TOLERANCE)
    assert np.abs(whole.embedding - model.encode(text)).max() > 1e-3  # control: the limit of 50 is in force


# Batches and options


def test_batch_equals_single_in_any_order(model, monkeypatch):
    together = model.encode_chunks(TEXTS, "sentences", max_length=50, overlap=10)
    alone = [model.encode_chunks(text, "sentences", max_length=50, overlap=10) for text in TEXTS]
    monkeypatch.setattr(chunking, "TOKENS_PER_BATCH", 60)
    monkeypatch.setattr(chunking, "GROUP_CHARACTERS", 100)
    backwards = model.encode_chunks(TEXTS[::-1], "sentences", max_length=50, overlap=10)[::-1]
    for others in (alone, backwards):
        assert [len(chunks) for chunks in others] == [len(chunks) for chunks in together] == [7, 0, 1, 0, 1, 1, 2, 1]
        for text, chunks, other in zip(TEXTS, together, others, strict=True):
            assert [chunk.span for chunk in chunks] == [chunk.span for chunk in other]
            if text.strip():
                np.testing.assert_allclose(stacked(chunks), stacked(other), **TOLERANCE)
    assert model.encode_chunks([]) == []


def test_spans_for_several_texts(model):
    texts = ["Anna sings. Bob sleeps.", "Nothing here."]
    found = model.encode_chunks(texts, [[(0, 11), (12, 23)], []])
    assert [[chunk.text for chunk in chunks] for chunks in found] == [["Anna sings.", "Bob sleeps."], []]
    np.testing.assert_allclose(
        stacked(found[0]), stacked(model.encode_chunks(texts[0], np.array([[0, 11], [12, 23]]))), **TOLERANCE
    )


def test_truncated_dimensions_are_normalised_again(model):
    whole = stacked(model.encode_chunks(STORY))[:, :16]
    part = stacked(model.encode_chunks(STORY, truncate_dim=16, normalize_embeddings=True))
    np.testing.assert_allclose(part, whole / np.linalg.norm(whole, axis=1, keepdims=True), **TOLERANCE)
    tensors = [chunk.embedding for chunk in model.encode_chunks(STORY, convert_to_tensor=True, truncate_dim=16)]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    np.testing.assert_array_equal(torch.stack(tensors).numpy(), whole)


def test_pooling_is_in_float32(tokenizer):
    """400 equal words in bfloat16: sums of that dtype would be off by percents."""
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config()).eval().to(torch.bfloat16)
    model.tokenizer = tokenizer
    text = "word " * 400
    (states,) = model.encode([text], output_value="token_embeddings")
    (chunk,) = model.encode_chunks(text, None)
    assert chunk.embedding.dtype == np.float32
    np.testing.assert_allclose(chunk.embedding, states.double().mean(dim=0).numpy(), **TOLERANCE)


def test_dropout_is_off_and_the_training_flag_restored(tokenizer):
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config(hidden_dropout_prob=0.5)).train()
    model.tokenizer = tokenizer
    first, second = (stacked(model.encode_chunks(STORY)) for _ in range(2))
    assert model.training
    np.testing.assert_array_equal(first, second)


def test_a_long_text_is_held_in_windows_only(tokenizer, monkeypatch):
    """100,000 tokens: a forward pass sees one batch, and the hidden states of the batches before are gone by then."""
    model = JinaBertModel(tiny_config(num_hidden_layers=1)).eval()
    model.tokenizer = tokenizer
    batches, held = [], []
    forward = model._hidden_states

    def measured(sequences, input_ids):
        tensors = {x.data_ptr(): x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor}
        batches.append(len(input_ids))
        held.append(sum(tensors.values()))
        return forward(sequences, input_ids)

    monkeypatch.setattr(model, "_hidden_states", measured)
    chunks = model.encode_chunks("word " * 100_000, 1000, max_length=256, overlap=16)
    assert len(chunks) == 100
    windows = 1 + math.ceil((100_002 - 256) / 240)
    assert len(batches) == math.ceil(windows / 64)
    assert max(batches) == chunking.TOKENS_PER_BATCH == 64 * 256
    assert max(held) - held[0] <= 2 * max(batches) * 64 * 4  # 8 MB; all token embeddings would take 27 MB


# Sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("x", ["x"]),
        (" \n ", [" \n "]),
        ("One. Two!  Three?\nFour", ["One. ", "Two!  ", "Three?\n", "Four"]),
        ("Mr. and Mrs. Smith met Dr. No. He fled.", ["Mr. and Mrs. Smith met Dr. No. ", "He fled."]),
        ("See Fig. 3 and No. 7. No. Never.", ["See Fig. 3 and No. 7. ", "No. ", "Never."]),
        ("J. K. Rowling, e.g. here, left the U.S. Army.", ["J. K. Rowling, e.g. here, left the U.S. Army."]),
        ("It cost 3.50. The end.", ["It cost 3.50. ", "The end."]),
        ('"Why?" he asked. "Go!" She went.', ['"Why?" he asked. ', '"Go!" ', "She went."]),
        ("1. Introduction. Text (so.) More", ["1. Introduction. ", "Text (so.) ", "More"]),
        ("a title\n\nthe text\n \nmore", ["a title\n\n", "the text\n \n", "more"]),
        ("wrapped at\nthe line. end", ["wrapped at\nthe line. end"]),
        ("Wait... what? . . . Yes", ["Wait... what? . . . ", "Yes"]),
        ("東京は都市。「はい。」大阪も！End", ["東京は都市。", "「はい。」", "大阪も！", "End"]),  # noqa: RUF001
    ],
)
def test_sentences_by_hand(text, sentences):
    spans = sentence_spans(text)
    assert [text[start:end] for start, end in spans] == sentences


@pytest.mark.parametrize("unit", [".", '."', ". ", "\n", "\n ", "。", "a.\n", " ", "A. ", "Ab. "])
def test_sentences_tile_any_text_in_linear_time(unit):
    text = " " + unit * 100_000
    spans = sentence_spans(text)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(text)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["a", 3]}, r"texts\[1\] is 3, not a string"),
        ({"texts": ["a", "b\udfff"]}, r"texts\[1\] is not valid Unicode"),
        ({"texts": "ab cd", "spans": [(0, 2), (3, 6)]}, r"spans\[1\] of texts\[0\] is \(3, 6\), not .* <= 5 char"),
        ({"texts": "ab cd", "spans": [(4, 3)]}, r"spans\[0\] of texts\[0\] is \(4, 3\), not"),
        ({"texts": "ab cd", "spans": [(-2, 2)]}, r"spans\[0\] of texts\[0\] is \(-2, 2\), not"),
        ({"texts": "ab cd", "spans": [(2, 2)]}, r"spans\[0\] of texts\[0\] is \(2, 2\), not"),
        (
            {"texts": "ab   cd", "spans": [(0, 2), (3, 5)]},
            r"\[1\] of texts\[0\] is \(3, 5\), where no token begins: '  '",
        ),
        ({"texts": "ab cd", "spans": [(0.0, 2)]}, r"spans\[0\] of texts\[0\] is \(0\.0, 2\), not a pair"),
        ({"texts": "ab cd", "spans": [(0, 1, 2)]}, r"spans\[0\] of texts\[0\] is \(0, 1, 2\), not a pair"),
        ({"texts": ["a", "b c"], "spans": [[(0, 1)], [(1, 2)]]}, r"spans\[0\] of texts\[1\] is \(1, 2\), where"),
        ({"texts": ["a", "b"], "spans": [(0, 1), (0, 1)]}, r"spans\[0\] of texts\[0\] is 0, not a pair"),
        ({"texts": ["a", "b"], "spans": [[(0, 1)]]}, "There are 2 texts, but lists of spans for 1"),
        ({"texts": "a", "spans": "words"}, "spans='words' is not"),
        ({"texts": "a", "spans": 0}, "spans=0 is not"),
        ({"texts": "a", "spans": True}, "spans=True is not"),
        ({"texts": "a", "spans": 1.5}, "spans=1.5 is not"),
        ({"texts": "a", "max_length": 256}, "overlap=256 tokens is not at least 0 and less than max_length=256"),
        ({"texts": "a", "max_length": "8192"}, "max_length='8192' is not a number of tokens"),
        ({"texts": "a", "overlap": -1}, "overlap=-1 tokens is not at least 0"),
        ({"texts": "a", "truncate_dim": 65}, "truncate_dim=65"),
    ],
    ids=str,
)
def test_bad_input_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.encode_chunks(**arguments)


def test_a_slow_tokenizer_is_named():
    model = JinaBertModel(tiny_config(vocab_size=100))
    model.tokenizer = CanineTokenizer()
    with pytest.raises(ValueError, match="CanineTokenizer is a slow tokenizer"):
        model.encode_chunks("text")


STRANGER = """
import sys
import numpy as np
from transformers import AutoModel
folder, target, text = sys.argv[1:]
chunks = AutoModel.from_pretrained(folder, trust_remote_code=True).encode_chunks(text, max_length=40, overlap=8)
np.savez(target, embeddings=[x.embedding for x in chunks], spans=[x.span for x in chunks])
"""


def test_a_stranger_chunks_with_the_shipped_folder(tmp_path):
    process = run_as_stranger(STRANGER, SHIPPED, tmp_path / "chunks.npz", STORY, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    expected = JinaBertModel.from_pretrained(SHIPPED).encode_chunks(STORY, max_length=40, overlap=8)
    with np.load(tmp_path / "chunks.npz") as found:
        np.testing.assert_allclose(found["embeddings"], stacked(expected), **TOLERANCE)
        assert [tuple(span) for span in found["spans"].tolist()] == [chunk.span for chunk in expected]
