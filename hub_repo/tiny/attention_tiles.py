"""Which queries meet which keys: a batch of packed sequences cut into rectangles that one kernel call computes.

Law: every pair of a query and a key of its sequence lies in exactly one tile of its head, or is proven to be below
rounding (sparsity.py). All keys that a query sees are in one tile, so a softmax never spans two.

With the queries in reverse order the ALiBi bias of a sequence is a Hankel matrix, a strided view of one vector a head
(see alibi.py); the view of any (queries, keys) rectangle is again a view.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .sparsity import LOCAL, least_window, record_scores, window_bound

SPARSE_LENGTH = 2048
"""Tokens from which a sequence is looked at for what can be left out."""
BLOCK = 512
"""Queries in a tile at least."""
_STEP = 128
"""Keys that a window grows by at least; wider ones in four steps an octave: oneDNN keeps code for every shape."""
_WORTHWHILE = 0.9
"""Share of a head's scores from which it is computed whole."""
_LOCAL_SCORES = 2**22
"""Scores that the bound holds at a time, float32: 16 MiB."""


@dataclass(frozen=True)
class Tile:
    """One kernel call: queries [first, last) of each sequence against its keys [start, stop), for some heads.

    `offset` is the first row of the first sequence; sequences of `lengths` tokens follow one another, `extent` rows
    apart. Rows from its length on are filler: `first` ... `stop` may reach into it, and nobody may look at it.
    """

    offset: int
    extent: int
    lengths: tuple[int, ...]
    heads: slice
    first: int
    last: int
    start: int
    stop: int

    @property
    def scores(self) -> int:
        """Pairs of a query and a key, without filler."""
        pairs = sum((min(self.last, n) - self.first) * (min(self.stop, n) - self.start) for n in self.lengths)
        return pairs * (self.heads.stop - self.heads.start)


class Plan:
    """The tiles of a batch, and the views that a tile reads and writes.

    Args:
        query: `(tokens, heads, head_dim)`, packed; read for what can be left out.
        key: The same shape.
        slopes: `(heads,)`.
        sequences: (first packed row, tokens) of each sequence, in the order of the rows that the tiles are of.
        extents: Rows of each sequence there, at least its tokens.
        scaling: Factor on the dot products.
        sparse: Leave out what is proven to be below rounding.

    Attributes:
        groups: Lists of tiles; those of one list share no head with those of another.
        rows: Rows of all sequences.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        slopes: torch.Tensor,
        sequences: Sequence[tuple[int, int]],
        extents: Sequence[int],
        *,
        scaling: float,
        sparse: bool,
    ):
        self.heads = query.shape[1]
        self.rows = sum(extents)
        self.longest = max(extents, default=0)
        positions = torch.arange(max(0, 2 * self.longest - 1), dtype=slopes.dtype)
        self._bias = -slopes[:, None] * (positions - (self.longest - 1)).abs()
        self.groups: list[list[Tile]] = []
        for offset, run in _runs(extents):
            lengths = tuple(length for _, length in sequences[run])
            extent = extents[run.start]
            if sparse and extent >= SPARSE_LENGTH:
                for i, (row, length) in enumerate(sequences[run]):
                    rows = slice(row, row + length)
                    whole = Tile(offset + i * extent, extent, (length,), slice(0, self.heads), 0, extent, 0, extent)
                    self._add_sparse(query[rows], key[rows], slopes, whole, scaling)
            else:
                self.groups.append([Tile(offset, extent, lengths, slice(0, self.heads), 0, extent, 0, extent)])
        total = self.heads * sum(length * length for _, length in sequences)
        record_scores(total, sum(tile.scores for tile in self.tiles()))

    def _add_sparse(self, query, key, slopes, whole: Tile, scaling: float):
        length, extent = len(query), whole.extent
        # Where the slope alone reaches over most of the text, the bound is not worth its computation.
        near = (1 - (1 - least_window(slopes, query.dtype) / length).clamp(min=0) ** 2 < _WORTHWHILE).nonzero()
        dense = sorted(set(range(self.heads)) - set(near[:, 0].tolist()))
        for heads in near[:, 0].split(max(1, _LOCAL_SCORES // (LOCAL * length))):
            reach = window_bound(
                query[:, heads].transpose(0, 1), key[:, heads].transpose(0, 1), slopes[heads],
                scaling=scaling, block=BLOCK, dtype=query.dtype,
            ).tolist()  # fmt: skip
            for head, windows in zip(heads.tolist(), reach, strict=True):
                tiles = [
                    Tile(whole.offset, extent, whole.lengths, slice(head, head + 1), *rectangle)
                    for rectangle in _merge(windows, extent)
                ]
                if sum(tile.scores for tile in tiles) > _WORTHWHILE * length * length:
                    dense.append(head)
                else:
                    self.groups.append(tiles)
        for heads in _slices(sorted(dense)):  # several heads a call keep all threads busy
            self.groups.append([Tile(whole.offset, extent, whole.lengths, heads, 0, extent, 0, extent)])

    def tiles(self) -> Iterator[Tile]:
        """All of them, a group after the other."""
        return (tile for group in self.groups for tile in group)

    def to(self, dtype: torch.dtype) -> "Plan":
        """The plan with its bias in another dtype."""
        self._bias = self._bias.to(dtype)
        return self

    def mask(self, tile: Tile) -> torch.Tensor:
        """`(1, heads, queries, keys)` bias of a tile for its queries in reverse order, a view."""
        origin = self.longest - 1 + tile.start - (tile.last - 1)
        width = self._bias.shape[1]
        shape = (1, tile.heads.stop - tile.heads.start, tile.last - tile.first, tile.stop - tile.start)
        return self._bias.as_strided(shape, (0, width, 1, 1), tile.heads.start * width + origin)

    @staticmethod
    def _of_sequences(rows: torch.Tensor, tile: Tile) -> torch.Tensor:
        rows = rows[tile.offset : tile.offset + len(tile.lengths) * tile.extent, tile.heads]
        return rows.unflatten(0, (len(tile.lengths), tile.extent))

    def keys(self, rows: torch.Tensor, tile: Tile) -> torch.Tensor:
        """`(sequences, heads, keys, head_dim)`, a view of `(rows, heads, head_dim)`."""
        return self._of_sequences(rows, tile)[:, tile.start : tile.stop].transpose(1, 2)

    def queries(self, reverse: torch.Tensor, tile: Tile) -> torch.Tensor:
        """`(sequences, heads, queries, ...)`, a view of `(rows, heads, ...)` with each sequence in reverse order."""
        rows = self._of_sequences(reverse, tile)
        return rows[:, tile.extent - tile.last : tile.extent - tile.first].transpose(1, 2)


def _runs(extents: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(first row, sequences) of neighbours of equal extent; empty sequences are left out."""
    offset = first = 0
    while first < len(extents):
        last = first
        while last < len(extents) and extents[last] == extents[first]:
            last += 1
        if extents[first]:
            yield offset, slice(first, last)
        offset += (last - first) * extents[first]
        first = last


def _merge(reach: list[int], extent: int) -> Iterator[tuple[int, int, int, int]]:
    """(first, last, start, stop) of tiles: blocks of queries put together while that adds little to their windows."""
    per_tile = max(1, sorted(reach)[len(reach) // 2] // (4 * BLOCK))
    for block in range(0, len(reach), per_tile):
        first, last = block * BLOCK, min((block + per_tile) * BLOCK, extent)
        if block + per_tile >= len(reach):
            last = extent  # with the filler
        window = max(reach[block : block + per_tile])
        start, stop = max(0, first - window), min(extent, last + window)
        step = max(_STEP, 2 ** ((stop - start).bit_length() - 3))
        width = min(extent, stop - start + -(stop - start) % step)
        start = min(start, extent - width)
        yield first, last, start, start + width


def _slices(heads: list[int]) -> Iterator[slice]:
    """Runs of neighbouring heads."""
    first = 0
    for i, head in enumerate(heads):
        if i + 1 == len(heads) or heads[i + 1] != head + 1:
            yield slice(heads[first], head + 1)
            first = i + 1
