"""Whole-word masking for stage I (paper section 4).

Law: words are chosen, not tokens: all pieces of a word are predicted or none is. Of the chosen tokens 80 % become
[MASK], 10 % a random token, 10 % stay. Special tokens and padding are never chosen. The choice is a function of
(seed, batch content, how often each text was seen before): it needs no state, so a resumed run masks as the
uninterrupted one, and a batch that comes again in a later epoch is masked differently.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100


def mask_whole_words(
    input_ids: torch.Tensor,
    *,
    continues_word: torch.Tensor,
    special: torch.Tensor,
    mask_token_id: int,
    probability: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks a batch.

    Args:
        input_ids: `(batch, length) int64`.
        continues_word: `(vocabulary,) bool`, True for pieces that continue a word ("##ing").
        special: `(vocabulary,) bool`, True for tokens that are never masked.
        mask_token_id: Id of [MASK].
        probability: Chance of each word to be chosen, and so the expected share of tokens.
        generator: Source of randomness, on the CPU.

    Returns:
        The corrupted ids and the labels, both `(batch, length) int64`; labels are -100 where nothing is predicted.
    """
    # A special token starts a word of its own, so a "##" after it cannot join the word before.
    word = (~continues_word[input_ids] | special[input_ids]).cumsum(dim=1)
    chosen_words = torch.rand(word.shape[0], word.shape[1] + 1, generator=generator) < probability
    chosen = chosen_words.gather(1, word) & ~special[input_ids]
    labels = input_ids.masked_fill(~chosen, IGNORED)

    fate = torch.rand(input_ids.shape, generator=generator)
    ordinary = (~special).nonzero().squeeze(1)
    random_ids = ordinary[torch.randint(len(ordinary), input_ids.shape, generator=generator)]
    corrupted = input_ids.masked_fill(chosen & (fate < 0.8), mask_token_id)
    corrupted = torch.where(chosen & (fate >= 0.9), random_ids, corrupted)
    return corrupted, labels


@dataclass
class WholeWordMaskingCollator:
    """Pads sequences to the longest of the batch and masks whole words.

    Args:
        tokenizer: A WordPiece tokenizer (pieces that continue a word begin with "##").
        probability: Expected share of masked tokens.
        seed: Changes every choice.
    """

    tokenizer: PreTrainedTokenizerBase
    probability: float = 0.3
    seed: int = 42

    def __post_init__(self):
        vocabulary = self.tokenizer.get_vocab()
        size = max(vocabulary.values()) + 1
        self._continues_word = torch.zeros(size, dtype=torch.bool)
        self._continues_word[[i for token, i in vocabulary.items() if token.startswith("##")]] = True
        self._special = torch.zeros(size, dtype=torch.bool)
        self._special[self.tokenizer.all_special_ids] = True
        # Reserved entries are no text either: never a random replacement.
        self._special[[i for token, i in vocabulary.items() if token.startswith("[unused")]] = True

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Pads and masks `input_ids` of the examples; `visit`, 0 if missing, counts how often each was seen before."""
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        padded = np.full((len(examples), int(lengths.max())), self.tokenizer.pad_token_id, dtype=np.int64)
        for row, example in zip(padded, examples, strict=True):
            row[: len(example["input_ids"])] = example["input_ids"]
        # TRAP: torch's CPU generator reads the low 32 bits of a seed only; all parts have to be in them.
        seed = zlib.crc32(padded.tobytes(), self.seed)
        visits = [example.get("visit", 0) for example in examples]
        if any(visits):
            seed = zlib.crc32(np.array(visits, dtype=np.int64).tobytes(), seed)
        generator = torch.Generator().manual_seed(seed)
        input_ids, labels = mask_whole_words(
            torch.from_numpy(padded),
            continues_word=self._continues_word,
            special=self._special,
            mask_token_id=self.tokenizer.mask_token_id,
            probability=self.probability,
            generator=generator,
        )
        attention_mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
