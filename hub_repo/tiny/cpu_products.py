"""ALiBi attention in bfloat16 as batched matrix products, for processors whose fused kernel emulates them.

Law: the numbers of `eager_attention` in bfloat16: scores and probabilities are rounded to it, sums and the softmax
itself are float32. Memory is linear in the length.

Why: torch's fused kernel asks MKL for its products, which on a processor that is not Intel's are emulated with those
of float32. `torch.bmm` asks oneDNN, which multiplies bfloat16 where the processor does.

oneDNN keeps half a megabyte for every shape that it has multiplied, of a thousand shapes at most. So sequences are
laid out on a grid of lengths, with filler behind the shorter ones that no real query attends to, and sequences of one
length on that grid are multiplied together, in batches whose sizes are powers of two.
"""

import functools
from collections.abc import Iterator

import torch

from .attention_tiles import Plan, Tile
from .onednn import mkl_is_slow, multiplies_bf16, on_grid

_SCORES = 2**20
"""Scores of a tile that are held at a time, in bfloat16, twice."""
_ROWS = 512
"""Queries of one head in a product at least; fewer do not fill it."""


def by_products(dtype: torch.dtype) -> bool:
    """Whether attention in this dtype is faster here than by the fused kernel."""
    return dtype == torch.bfloat16 and mkl_is_slow() and multiplies_bf16()


class _Layout:
    """Packed rows -> the sequences in order of length, each on the grid of lengths with filler behind its tokens.

    Filler repeats the last token of its sequence.
    """

    def __init__(self, lengths: tuple[int, ...], tokens: int):
        packed = torch.tensor(lengths, dtype=torch.int64)
        sizes, order = packed.sort(stable=True)
        first = (packed.cumsum(0) - packed)[order]
        self.sequences = list(zip(first.tolist(), sizes.tolist(), strict=True))
        self.extents = [on_grid(length) for _, length in self.sequences]
        extents = torch.tensor(self.extents, dtype=torch.int64)
        rows = torch.arange(int(extents.sum()))
        sequence = torch.repeat_interleave(extents)
        position = rows - (extents.cumsum(0) - extents)[sequence]
        first, last = first[sequence], sizes[sequence] - 1
        back = extents[sequence] - 1 - position
        self.forward = first + torch.minimum(position, last)
        self.reverse = first + torch.minimum(back, last)
        self.filler = back > last
        self._origins = [rows.new_zeros(tokens) for _ in range(2)]
        for origin, source, real in zip(
            self._origins, (self.forward, self.reverse), (position <= last, ~self.filler), strict=True
        ):
            origin[source[real]] = rows[real]

    def put(self, rows: torch.Tensor, *, reverse: bool) -> torch.Tensor:
        """The way back of `_take`, by `reverse` or by `forward`: `(tokens, heads, head_dim)`, contiguous.

        Packed rows that belong to no sequence get the numbers of some other row.
        """
        origin = self._origins[reverse]
        return rows.contiguous().flatten(1).index_select(0, origin).unflatten(1, rows.shape[1:])


def _take(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``packed[rows]`` of `(tokens, heads, head_dim)`, stored head by head: a sequence in a head is one matrix."""
    taken = packed.flatten(1).index_select(0, rows).unflatten(1, packed.shape[1:])
    return taken.transpose(0, 1).contiguous().transpose(0, 1)


@functools.lru_cache(maxsize=1)  # the layers of a model ask for the same one after the other
def _layout(lengths: tuple[int, ...], tokens: int) -> _Layout:
    return _Layout(lengths, tokens)


class _Products:
    """The pieces of a tile that are multiplied at a time.

    Args:
        plan: Of the layout's rows.
        dtype: Of queries and keys.
        scaling: Factor on the dot products.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype, scaling: float):
        self.plan = plan.to(dtype)
        self.scaling = scaling
        self._buffers = torch.empty(2, max(_SCORES, _ROWS * plan.longest), dtype=dtype)

    def pieces(
        self, tile: Tile, of_queries: tuple[torch.Tensor, ...], of_keys: tuple[torch.Tensor, ...]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]]:
        """Cuts a tile, and the tensors that belong to its queries and its keys, into pieces.

        Args:
            tile: Of the plan.
            of_queries: `(rows, heads, head_dim)` in reverse order, the queries first.
            of_keys: `(rows, heads, head_dim)`, the keys first.

        Yields:
            The probabilities `(batch, queries, keys)`; a buffer of their shape; and for each of the tensors its view
            `(batch, queries or keys, head_dim)`. Probabilities and buffer hold until the next piece.
        """
        left = [self.plan.queries(rows, tile) for rows in of_queries]
        right = [self.plan.keys(rows, tile) for rows in of_keys]
        bias = self.plan.mask(tile).expand(len(tile.lengths), *[-1] * 3)
        visible = [min(tile.stop, length) - tile.start for length in tile.lengths]
        if len(tile.lengths) > 1:  # the sequences of one head are multiplied together, or the heads of one sequence
            left, right = ([x.transpose(0, 1) for x in xs] for xs in (left, right))
            bias = bias.transpose(0, 1)
        outer, inner, queries, keys = bias.shape
        visible = visible if len(tile.lengths) > 1 else visible * inner
        rows = min(queries, max(_ROWS, _SCORES // keys))
        for i in range(outer):
            for batch in _powers_of_two(inner, max(1, _SCORES // (rows * keys))):
                keys_of = [x[i, batch] for x in right]
                for first in range(0, queries, rows):
                    block = slice(first, min(first + rows, queries))
                    queries_of = [x[i, batch, block] for x in left]
                    additive = bias[i, batch, block]
                    scores, probabilities = self._softmax(queries_of[0], keys_of[0], additive, visible[batch])
                    yield probabilities, scores, queries_of, keys_of

    def _softmax(self, query, key, bias, visible: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        scores, probabilities = (x[: bias.numel()].view(bias.shape) for x in self._buffers)
        scores.copy_(bias).baddbmm_(query, key.mT, alpha=self.scaling)
        for of_sequence, keys in zip(scores, visible, strict=True):
            if keys < bias.shape[2]:
                of_sequence[:, keys:] = -torch.inf
        torch.softmax(scores, dim=-1, out=probabilities)
        return scores, probabilities


def _powers_of_two(count: int, most: int) -> Iterator[slice]:
    """Cuts [0, count) into slices whose sizes are powers of two, the largest first, none above `most`."""
    first = 0
    while first < count:
        size = 1 << (min(count - first, most).bit_length() - 1)
        yield slice(first, first + size)
        first += size


def _prepare(query, key, slopes, cu_seqlens, *, scaling: float, sparse: bool) -> tuple[_Layout, _Products]:
    """Where the rows of a batch go, and the products of its tiles; arguments as of `cpu_attention.alibi_attention`."""
    layout = _layout(tuple(cu_seqlens.diff().tolist()), len(query))
    plan = Plan(query, key, slopes, layout.sequences, layout.extents, scaling=scaling, sparse=sparse)
    return layout, _Products(plan, query.dtype, scaling)


def products(query, key, value, slopes, cu_seqlens, *, scaling: float, sparse: bool) -> torch.Tensor:
    """The context `(tokens, heads, head_dim)`; arguments as of `cpu_attention.alibi_attention`."""
    layout, work = _prepare(query, key, slopes, cu_seqlens, scaling=scaling, sparse=sparse)
    query = _take(query, layout.reverse)
    key, value = (_take(x, layout.forward) for x in (key, value))
    context = torch.empty_like(query)
    for tile in work.plan.tiles():
        for probabilities, _, (_, out), (_, values) in work.pieces(tile, (query, context), (key, value)):
            torch.bmm(probabilities, values, out=out)
    return layout.put(context, reverse=True)


def product_gradients(
    gradient, query, key, value, slopes, cu_seqlens, *, scaling: float, sparse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, each `(tokens, heads, head_dim)`, from that of the context.

    The probabilities are computed again. Shares of several pieces in a key or value are added in float32.
    """
    layout, work = _prepare(query, key, slopes, cu_seqlens, scaling=scaling, sparse=sparse)
    dtype = query.dtype
    gradient, query = (_take(x, layout.reverse) for x in (gradient, query))
    gradient[layout.filler] = 0
    key, value = (_take(x, layout.forward) for x in (key, value))
    of_query = torch.empty_like(query)
    of_key, of_value = (torch.zeros_like(x, dtype=slopes.dtype) for x in (key, value))
    for tile in work.plan.tiles():
        left, right = (query, gradient, of_query), (key, value, of_key, of_value)
        for probabilities, buffer, (q, g, of_q), (k, v, of_k, of_v) in work.pieces(tile, left, right):
            of_v += torch.bmm(probabilities.mT, g)
            of_probabilities = torch.bmm(g, v.mT, out=buffer)
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, dtype, grad_input=buffer)
            torch.bmm(of_scores, k, out=of_q)
            of_k += torch.bmm(of_scores.mT, q)
    return (
        layout.put(of_query.mul_(scaling), reverse=True),
        layout.put(of_key.mul_(scaling).to(dtype), reverse=False),
        layout.put(of_value.to(dtype), reverse=False),
    )
