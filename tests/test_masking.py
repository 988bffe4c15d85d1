"""Whole-word masking: the statistics, the words, and that it needs no state."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from modeling_jina_bert.masking import IGNORED, WordPieces, mask_whole_words
from training.masking import WholeWordMaskingCollator


@pytest.fixture(scope="module")
def sequences(tokenizer) -> list[dict]:
    lines = (REPOSITORY / "tests/data/corpus.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [{"input_ids": ids} for ids in tokenizer(texts * 6, truncation=True, max_length=512)["input_ids"]]


def test_statistics_on_a_hundred_thousand_tokens(tokenizer, sequences):
    collator = WholeWordMaskingCollator(tokenizer, probability=0.3, seed=1)
    counts = torch.zeros(5)  # maskable, chosen, [MASK], unchanged, replaced
    for start in range(0, len(sequences), 10):
        original = tokenizer.pad(sequences[start : start + 10], return_tensors="pt")["input_ids"]
        batch = collator(sequences[start : start + 10])
        special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
        chosen = batch["labels"] != IGNORED
        assert not (chosen & special).any()
        assert torch.equal(batch["labels"][chosen], original[chosen])
        assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
        now = batch["input_ids"][chosen]
        masked, same = now == tokenizer.mask_token_id, now == original[chosen]
        counts += torch.tensor([(~special).sum(), chosen.sum(), masked.sum(), same.sum(), (~masked & ~same).sum()])
    maskable, chosen, masked, same, replaced = counts.tolist()
    assert maskable > 100_000
    assert chosen / maskable == pytest.approx(0.3, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.01)
    assert same / chosen == pytest.approx(0.1, abs=0.01)
    assert replaced / chosen == pytest.approx(0.1, abs=0.01)


def test_words_are_chosen_whole(tokenizer, sequences):
    collator = WholeWordMaskingCollator(tokenizer, probability=0.5)
    batch = collator(sequences[:10])
    tokens = tokenizer.pad(sequences[:10], return_tensors="pt")["input_ids"]
    words_of_several = 0
    for row, labels in zip(tokens, batch["labels"], strict=True):
        pieces = tokenizer.convert_ids_to_tokens(row.tolist())
        for i in range(1, len(pieces)):
            if pieces[i].startswith("##"):
                words_of_several += 1
                assert (labels[i] != IGNORED) == (labels[i - 1] != IGNORED), pieces[i - 1 : i + 1]
    assert words_of_several > 50


def test_same_content_same_masks_other_seed_other_masks(tokenizer, sequences):
    first = WholeWordMaskingCollator(tokenizer, seed=1)
    first(sequences[5:9])  # whatever came before does not matter
    again = WholeWordMaskingCollator(tokenizer, seed=1)
    other = WholeWordMaskingCollator(tokenizer, seed=2)
    assert torch.equal(first(sequences[:3])["labels"], again(sequences[:3])["labels"])
    assert not torch.equal(first(sequences[:3])["labels"], other(sequences[:3])["labels"])


def test_a_batch_that_comes_again_is_masked_differently(tokenizer, sequences):
    """Later epochs: the visit counts, and a run that resumes there masks as the uninterrupted one."""
    collator = WholeWordMaskingCollator(tokenizer, seed=1)
    labels = []
    for visit in range(3):
        examples = [{**example, "visit": visit} for example in sequences[:4]]
        labels.append(collator(examples)["labels"])
        again = WholeWordMaskingCollator(tokenizer, seed=1)(examples)["labels"]
        assert torch.equal(labels[-1], again)
        chosen, given = (labels[-1] != IGNORED).sum(), sum(len(example["input_ids"]) for example in examples)
        assert 0.2 < chosen / given < 0.4
    assert torch.equal(labels[0], collator(sequences[:4])["labels"])  # the first visit is that of a plain example
    assert not torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[1], labels[2])


def test_arrays_and_padding(tokenizer):
    """Compact arrays give what lists give; what is padded is on the right and never chosen."""
    collator = WholeWordMaskingCollator(tokenizer, probability=0.99, seed=1)
    rows = [tokenizer("one " * count)["input_ids"] for count in (3, 40, 1)]
    batch = collator([{"input_ids": ids} for ids in rows])
    arrays = collator([{"input_ids": np.array(ids, dtype=np.uint16)} for ids in rows])
    for name, tensor in batch.items():
        assert torch.equal(arrays[name], tensor)
    assert batch["attention_mask"].tolist() == [[1] * len(ids) + [0] * (42 - len(ids)) for ids in rows]
    assert (batch["labels"] != IGNORED).sum() > 30
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_whole_words_of_byte_level_bpe():
    """Words begin with a space or after what is no letter; a character of several pieces is one."""
    text = ["Unbelievable, (really) he's naïve \u4f60\u597d caf\u00e9s 2310 x" * 3]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["un be lie va ble re al ly he is it na ve ca fe"], vocab_size=262, show_progress=False)
    bpe.add_tokens(["##", "####"])  # as GPT-2's vocabulary has them; no sign of WordPiece
    special = {"mask_token": "<mask>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    pieces = WordPieces.of(tokenizer)
    expected = [match.span() for match in re.finditer(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+|[^\w\s]", text[0])]
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        _, labels = mask_whole_words(encoded["input_ids"], pieces, probability=0.3, generator=generator)
        chosen = encoded["offset_mapping"][0][labels[0] != IGNORED].tolist()
        characters = {i for first, last in chosen for i in range(first, last) if not text[0][i].isspace()}
        for word in expected:
            inside = characters & set(range(*word))
            assert len(inside) in (0, word[1] - word[0]), text[0][slice(*word)]
            seen |= {word} if inside else set()
    assert len(seen) == len(expected)
