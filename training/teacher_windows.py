"""Vectors for texts longer than a teacher reads: the mean over the windows that it can read. Not in the paper.

A student of 8,192 tokens learns nothing of the rest of a text from a teacher that cuts it at 256: the teacher's vector
is that of the beginning. The mean of the vectors of all its windows is the longest view that the teacher has.

Laws: every token of a text is in one window, and a word is not cut where it fits into one; a text that the teacher
reads whole has its own vector.
COST: the texts of all windows are held in memory, as much as those of the sources that are read.
"""

from dataclasses import dataclass

import numpy as np

from .embedding_shards import Embedder, Vectors
from .mining_texts import Texts
from .recipe import RecipeError


@dataclass
class Windows:
    """The windows of texts, one text's after the other's.

    Attributes:
        texts: Of the windows.
        starts: `(texts + 1,) int64`: text t has the windows from `starts[t]` to `starts[t + 1]`.
        tokens: `(windows,) int64`.
    """

    texts: Texts
    starts: np.ndarray
    tokens: np.ndarray


class WindowedVectors:
    """Vectors of texts, from those of their windows: the mean by the windows' tokens, of length 1.

    Args:
        vectors: Of the windows' texts.
        windows: What they are windows of.
    """

    def __init__(self, vectors: Vectors, windows: Windows):
        self._vectors, self._windows = vectors, windows
        self.width = vectors.width

    def __len__(self) -> int:
        return len(self._windows.starts) - 1

    def take(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of these texts, `(ids, width) float32`."""
        starts, counts = self._windows.starts[ids], np.diff(self._windows.starts)[ids]
        first = np.cumsum(counts) - counts
        windows = np.repeat(starts - first, counts) + np.arange(counts.sum())
        weighted = self._vectors.take(windows) * self._windows.tokens[windows, None]
        sums = np.add.reduceat(weighted, first, axis=0) if len(ids) else weighted
        return (sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-12)).astype(np.float32)


def cut(words: list[int | None], size: int) -> list[tuple[int, int]]:
    """Spans of consecutive tokens, at most `size` each, that begin with a word where that leaves them any token.

    Args:
        words: The word that each token is of.
        size: At least 1.

    Example:
        >>> cut([0, 1, 1, 2, 3], 2)
        [(0, 1), (1, 3), (3, 5)]
        >>> cut([0, 0, 0, 1], 2)
        [(0, 2), (2, 4)]
        >>> cut([], 2)
        []
    """
    spans, start = [], 0
    while start < len(words):
        stop = min(start + size, len(words))
        end = stop
        while start < end < len(words) and words[end] == words[end - 1]:
            end -= 1
        end = end if end > start else stop
        spans.append((start, end))
        start = end
    return spans


def windows_of(texts: Texts, embedder: Embedder, role: str) -> Windows:
    """Cuts texts into windows that the teacher reads whole; a text that it reads whole is its own window.

    Args:
        texts: Of any length.
        embedder: The teacher.
        role: "query" or "document"; the prompt of the role takes its tokens.

    Raises:
        RecipeError: The teacher's tokenizer does not say where its tokens are, or its length leaves none for a text.
    """
    tokenizer = embedder.model.tokenizer
    if not tokenizer.is_fast:
        raise RecipeError(f"teacher {embedder.name}: its tokenizer does not say where tokens are: no teacher_windows.")
    plain = {"add_special_tokens": False, "truncation": False, "verbose": False}
    of_prompt = len(tokenizer(embedder.prompt(role), **plain)["input_ids"])
    size = embedder.model.max_seq_length - tokenizer.num_special_tokens_to_add() - of_prompt
    if size < 1:
        raise RecipeError(f"teacher {embedder.name}: teacher_max_length leaves no token for a text.")
    found: list[str] = []
    tokens: list[int] = []
    starts = [0]
    for batch in texts.batches():
        encoded = tokenizer(batch, return_offsets_mapping=True, **plain)
        for row, (text, offsets) in enumerate(zip(batch, encoded["offset_mapping"], strict=True)):
            spans = cut(encoded.word_ids(row), size) if len(offsets) > size else []
            if spans:
                found.extend(text[offsets[first][0] : offsets[last - 1][1]] for first, last in spans)
                tokens.extend(last - first for first, last in spans)
            else:
                found.append(text)
                tokens.append(max(1, len(offsets)))
            starts.append(len(found))
    return Windows(Texts.of(found), np.array(starts), np.array(tokens))
