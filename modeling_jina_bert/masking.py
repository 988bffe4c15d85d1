"""Whole-word masking over WordPiece (paper section 4): the rule that training and evaluation share.

Law: words are chosen, not tokens: all pieces of a word are predicted or none is. Of the chosen tokens 80 % become
[MASK], 10 % a random token, 10 % stay. Special tokens, padding and reserved entries are never chosen, and never put in
place of another.

Not part of the code beside the weights: a model that embeds masks nothing.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not predicted."""
CORRUPTION = {"mask": 0.8, "random": 0.1, "unchanged": 0.1}
"""What becomes of the chosen tokens: their shares."""


@dataclass(frozen=True)
class WordPieces:
    """What masking has to know of a WordPiece vocabulary.

    Attributes:
        continues_word: `(vocabulary,) bool`, True for pieces that continue a word ("##ing").
        special: `(vocabulary,) bool`, True for tokens that are neither masked nor put in place of another.
        mask: Id of [MASK].
    """

    continues_word: torch.Tensor
    special: torch.Tensor
    mask: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "WordPieces":
        """Reads a tokenizer's vocabulary.

        Raises:
            ValueError: It has no [MASK], or no piece that continues a word.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError("its tokenizer has no mask_token.")
        pieces = tokenizer.get_vocab()
        continues_word = torch.zeros(max(pieces.values()) + 1, dtype=torch.bool)
        continues_word[[i for piece, i in pieces.items() if piece.startswith("##")]] = True
        if not continues_word.any():
            raise ValueError("its tokenizer is no WordPiece ('##ing'), whole words are not known.")
        special = torch.zeros_like(continues_word)
        special[tokenizer.all_special_ids] = True
        # Reserved entries are no text either.
        special[[i for piece, i in pieces.items() if piece.startswith("[unused")]] = True
        return cls(continues_word, special, tokenizer.mask_token_id)


def mask_whole_words(
    input_ids: torch.Tensor, pieces: WordPieces, *, probability: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks a batch.

    Args:
        input_ids: `(batch, length) int64`.
        pieces: Of the tokenizer that made the ids.
        probability: Chance of each word to be chosen, and so the expected share of tokens.
        generator: Source of randomness, on the CPU.

    Returns:
        The corrupted ids and the labels, both `(batch, length) int64`; labels are -100 where nothing is predicted.
    """
    special = pieces.special[input_ids]
    # A special token starts a word of its own, so a "##" after it cannot join the word before.
    word = (~pieces.continues_word[input_ids] | special).cumsum(dim=1)
    chosen_words = torch.rand(word.shape[0], word.shape[1] + 1, generator=generator) < probability
    chosen = chosen_words.gather(1, word) & ~special
    labels = input_ids.masked_fill(~chosen, IGNORED)

    fate = torch.rand(input_ids.shape, generator=generator)
    ordinary = (~pieces.special).nonzero().squeeze(1)
    random_ids = ordinary[torch.randint(len(ordinary), input_ids.shape, generator=generator)]
    corrupted = input_ids.masked_fill(chosen & (fate < CORRUPTION["mask"]), pieces.mask)
    corrupted = torch.where(chosen & (fate >= CORRUPTION["mask"] + CORRUPTION["unchanged"]), random_ids, corrupted)
    return corrupted, labels
