"""Whole-word masking (paper section 4): the rule that training and evaluation share.

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
    """What masking has to know of a vocabulary, of WordPiece or of byte-level BPE.

    Attributes:
        continues_word: `(vocabulary,) bool`, True for pieces that continue a word ("##ing").
        special: `(vocabulary,) bool`, True for tokens that are neither masked nor put in place of another.
        mask: Id of [MASK].
        may_go_on: `(vocabulary,) bool`, True for pieces after which a word may be continued; None is all of them, as
            in WordPiece.
    """

    continues_word: torch.Tensor
    special: torch.Tensor
    mask: int
    may_go_on: torch.Tensor | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "WordPieces":
        """Reads a tokenizer's vocabulary.

        Raises:
            ValueError: It has no [MASK], or is neither WordPiece nor byte-level BPE.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError("its tokenizer has no mask_token.")
        pieces = tokenizer.get_vocab()
        kind = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__
        continues_word = torch.zeros(max(pieces.values()) + 1, dtype=torch.bool)
        may_go_on = None
        if kind != "BPE":
            continues_word[[i for piece, i in pieces.items() if piece.startswith("##")]] = True
        if not continues_word.any():
            if kind != "BPE" or not any(piece.startswith("\u0120") for piece in pieces):
                raise ValueError("its tokenizer is neither WordPiece nor byte-level BPE: whole words are not known.")
            may_go_on = torch.zeros_like(continues_word)
            for piece, i in pieces.items():
                continues_word[i], may_go_on[i] = _inside_a_word(piece)
        special = torch.zeros_like(continues_word)
        special[tokenizer.all_special_ids] = True
        # Reserved entries are no text either.
        special[[i for piece, i in pieces.items() if piece.startswith("[unused")]] = True
        return cls(continues_word, special, tokenizer.mask_token_id, may_go_on)


_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_ALPHABET = {chr(byte): byte for byte in _BYTES}
_ALPHABET |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in set(_BYTES))}
"""Character in a byte-level piece -> byte (Radford et al. 2019): printable ones stand for themselves."""


def _inside_a_word(piece: str) -> tuple[bool, bool]:
    """Whether a byte-level piece continues the word before it, and whether its own word may be continued.

    Letters and digits make words, each ideograph or kana is one of its own, and pieces of a character belong together.

    Example:
        >>> [_inside_a_word(piece) for piece in ("ing", "\u0120the", ".")]
        [(True, True), (False, True), (False, False)]
    """
    if not piece or not all(character in _ALPHABET for character in piece):
        return False, False  # added tokens stand as they are
    content = bytes(_ALPHABET[character] for character in piece)
    text = content.decode("utf-8", errors="replace")
    if 0x80 <= content[0] < 0xC0:  # the rest of a character
        goes_on = True
    elif text[0] == _PART:  # the beginning of one, of an ideograph or kana from 0xE3 to 0xE9
        goes_on = not 0xE3 <= content[0] <= 0xE9
    else:
        goes_on = _is_of_a_word(text[0])
    return goes_on, text[-1] == _PART or _is_of_a_word(text[-1])


_PART = "\ufffd"


def _is_of_a_word(character: str) -> bool:
    ideographic = "\u2e80" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff"
    return character.isalnum() and not ideographic


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
    begins = ~pieces.continues_word[input_ids] | special
    if pieces.may_go_on is not None:
        begins[:, 1:] |= ~pieces.may_go_on[input_ids[:, :-1]]
    word = begins.cumsum(dim=1)
    chosen_words = torch.rand(word.shape[0], word.shape[1] + 1, generator=generator) < probability
    chosen = chosen_words.gather(1, word) & ~special
    labels = input_ids.masked_fill(~chosen, IGNORED)

    fate = torch.rand(input_ids.shape, generator=generator)
    ordinary = (~pieces.special).nonzero().squeeze(1)
    random_ids = ordinary[torch.randint(len(ordinary), input_ids.shape, generator=generator)]
    corrupted = input_ids.masked_fill(chosen & (fate < CORRUPTION["mask"]), pieces.mask)
    corrupted = torch.where(chosen & (fate >= CORRUPTION["mask"] + CORRUPTION["unchanged"]), random_ids, corrupted)
    return corrupted, labels
