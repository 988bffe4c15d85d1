"""The starts of long documents, masked once, and cut into windows of any length.

Law: the masks are drawn over the document, before it is cut, and every masked token is predicted exactly once at every
length: two lengths differ in the context alone, so their accuracies are a paired comparison.
COST: documents are tokenized whole, one at a time; 16 bytes a token are kept of each document that is taken.
"""

import hashlib
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modeling_jina_bert.masking import CORRUPTION, IGNORED, WordPieces, mask_whole_words

from .sets import EvaluationError, read_rows

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = 2  # [CLS] and [SEP] of every window


@dataclass(frozen=True)
class Vocabulary:
    """What masking and cutting have to know of a tokenizer.

    Attributes:
        pieces: Which pieces continue a word, which are never masked.
        cls: Id of [CLS].
        sep: Id of [SEP].
    """

    pieces: WordPieces
    cls: int
    sep: int


@dataclass(frozen=True)
class MaskedText:
    """The first tokens of a document, without [CLS] and [SEP].

    Attributes:
        place: "file:line".
        original: `(tokens,) int64`.
        corrupted: `(tokens,) int64`, what the model sees.
        targets: `(tokens,) bool`, True where it predicts `original`.
    """

    place: str
    original: torch.Tensor
    corrupted: torch.Tensor
    targets: torch.Tensor


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, name: str) -> Vocabulary:
    """The vocabulary of the tokenizer of the model `name`.

    Raises:
        EvaluationError: It has no [MASK], [CLS] or [SEP], or knows no pieces that continue a word.
    """
    for token in ("cls_token", "sep_token"):
        if getattr(tokenizer, token) is None:
            raise EvaluationError(f"model {name}: its tokenizer has no {token}.")
    try:
        pieces = WordPieces.of(tokenizer)
    except ValueError as error:
        raise EvaluationError(f"model {name}: {error}") from None
    return Vocabulary(pieces, tokenizer.cls_token_id, tokenizer.sep_token_id)


def mask_words(
    original: torch.Tensor, vocabulary: Vocabulary, *, probability: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses whole words of a document and corrupts their tokens, as in training.

    Args:
        original: `(tokens,) int64`.
        vocabulary: Of the tokenizer.
        probability: Chance of each word to be chosen, and so the expected share of tokens.
        seed: Changes every choice; so does the text.

    Returns:
        The corrupted ids `(tokens,) int64` and the targets `(tokens,) bool`.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(original.numpy().tobytes(), seed))
    corrupted, labels = mask_whole_words(
        original[None], vocabulary.pieces, probability=probability, generator=generator
    )
    return corrupted[0], labels[0] != IGNORED


def read_texts(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """("file:line", text) of the rows: the first of every file, then the second of every file, and so on.

    Raises:
        EvaluationError: A file cannot be read, or a row has no field "text".
    """
    files = (read_rows(path, {"text": (str,)}) for path in paths)
    for row in chain.from_iterable(zip_longest(*files)):
        if row is not None:
            yield row[0], row[1]["text"]


def masked_texts(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: Vocabulary,
    tokens: int,
    documents: int,
    probability: float,
    seed: int,
) -> list[MaskedText]:
    """The first `tokens` tokens of the first documents that have as many, masked.

    Args:
        paths: JSONL files (.zst) with a field "text".
        tokenizer: Of the model.
        vocabulary: Of the tokenizer.
        tokens: Tokens of each document, without [CLS] and [SEP].
        documents: How many documents; fewer, with a warning, if the files have no more.
        probability: See `mask_words`.
        seed: See `mask_words`.

    Raises:
        EvaluationError: No document is long enough, or nothing in them was masked; see also `read_texts`.
    """
    texts: list[MaskedText] = []
    longest = 0
    for place, text in read_texts(paths):
        # truncation=False: a tokenizer.json may hold the truncation of its last training call.
        encoded = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        longest = max(longest, len(encoded["input_ids"]))
        if len(encoded["input_ids"]) < tokens:
            continue
        original = torch.tensor(encoded["input_ids"][:tokens])
        texts.append(
            MaskedText(place, original, *mask_words(original, vocabulary, probability=probability, seed=seed))
        )
        if len(texts) == documents:
            break
    if not texts:
        raise EvaluationError(
            f"--data {' '.join(map(str, paths))}: no document has {tokens} tokens, the longest has {longest}; "
            f"take --lengths up to {longest + SPECIAL_TOKENS}."
        )
    if not any(text.targets.any() for text in texts):
        raise EvaluationError(f"--mlm-probability {probability}: not one word was masked.")
    if len(texts) < documents:
        logger.warning("Only %d documents have %d tokens; --documents asks for %d.", len(texts), tokens, documents)
    return texts


def shuffled(text: MaskedText, size: int) -> MaskedText:
    """The text with all but the targets in random order, within stretches of `size` tokens."""
    generator = torch.Generator().manual_seed(zlib.crc32(text.corrupted.numpy().tobytes()))
    corrupted = text.corrupted.clone()
    for stretch, targets in zip(corrupted.split(size), text.targets.split(size), strict=True):
        shown = stretch[~targets]
        stretch[~targets] = shown[torch.randperm(len(shown), generator=generator)]
    return replace(text, corrupted=corrupted)


def context_free_scores(texts: Sequence[MaskedText], pieces: WordPieces) -> list[tuple[int, int, float]]:
    """What the best answer scores that knows the token at a target's own place, and how frequent the targets are.

    By Bayes' rule: a token that is shown and is not [MASK] was left as it is, or drawn from all ordinary tokens. So it
    is the answer, unless it is so rare among the targets that the most frequent one, drawn over, is likelier. A model
    that does not use the context does no better.

    Args:
        texts: Whose targets are predicted.
        pieces: Of the vocabulary that they were masked with.

    Returns:
        For each text its targets, the right answers among them, and the sum of the cross entropies (nats).
    """
    targets = torch.cat([text.original[text.targets] for text in texts])
    frequencies = targets.bincount(minlength=len(pieces.special)).double() / len(targets)
    most_frequent = frequencies.argmax()
    drawn = CORRUPTION["random"] / CORRUPTION["unchanged"] / int((~pieces.special).sum())  # to 1 for left as it is
    found = []
    for text in texts:
        wanted, shown = text.original[text.targets], text.corrupted[text.targets]
        masked, own = shown == pieces.mask, frequencies[shown]
        is_drawn = masked | (own * (1 + drawn) < frequencies[most_frequent] * drawn)
        right = torch.where(is_drawn, most_frequent, shown) == wanted
        kept = frequencies[wanted] * ((shown == wanted) + drawn) / (own + drawn)
        likelihoods = torch.where(masked, frequencies[wanted], kept)
        found.append((len(wanted), int(right.sum()), -float(likelihoods.log().sum())))
    return found


def fingerprint(texts: Sequence[MaskedText]) -> str:
    """SHA-256 of what is shown and what is asked: equal for two models if they are asked the same of the same."""
    digest = hashlib.sha256()
    for text in texts:
        for tensor in (text.original, text.corrupted, text.targets):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def window_starts(tokens: int, size: int) -> list[tuple[int, int]]:
    """Where consecutive windows of `size` tokens begin, and the first token that each is the first to hold.

    The last window is moved back so that it is as long as the others: what it shares with the one before is context.

    Example:
        >>> window_starts(10, 4)
        [(0, 0), (4, 4), (6, 8)]
        >>> window_starts(10, 10)
        [(0, 0)]
    """
    return [(min(start, tokens - size), start) for start in range(0, tokens, size)]


def windows(text: MaskedText, length: int, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts a text into windows of `length` tokens, [CLS] and [SEP] included.

    Args:
        text: At least `length - 2` tokens long.
        length: Tokens of a window.
        vocabulary: Of the tokenizer.

    Returns:
        Ids and labels, both `(windows, length) int64`; every target of the text is the label of one window, labels are
        -100 elsewhere.
    """
    size = length - SPECIAL_TOKENS
    starts = window_starts(len(text.original), size)
    ids = torch.empty(len(starts), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    ids[:, 0], ids[:, -1] = vocabulary.cls, vocabulary.sep
    wanted = text.original.masked_fill(~text.targets, IGNORED)
    for row, (start, first) in enumerate(starts):
        ids[row, 1:-1] = text.corrupted[start : start + size]
        labels[row, 1 + first - start : -1] = wanted[first : start + size]
    return ids, labels
