"""ALiBi attention over packed sequences on the CPU: linear memory, nothing computed that cannot be seen.

Law: the numbers of `eager_attention`, values and gradients; no tensor of size length x length exists.

How: with the queries in reverse order the ALiBi bias of a sequence is a Hankel matrix, a strided view of one vector a
head (see alibi.py), which torch's blockwise kernel reads as its mask. Queries are cut into blocks, and the slice of
keys for each block comes from `sparsity.window_bound`; the view of any (queries, keys) rectangle is again a view.

In bfloat16 that kernel asks MKL for its products, which on a processor that is not Intel's are emulated with those of
float32. There, in inference, a tile is computed as two batched products through oneDNN (`_products`).

The whole is one operator, so that `torch.compile` and `torch.export` see a single node whatever the lengths are. The
name of the operator carries the name of this module: the installed package and copies loaded by trust_remote_code live
side by side in one process.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .onednn import mkl_is_slow, multiplies_bf16
from .sparsity import LOCAL, least_window, record_scores, window_bound

SPARSE_LENGTH = 2048
"""Tokens from which a sequence is looked at for what can be left out."""
_BLOCK = 512
"""Queries in a tile at least; windows of keys are whole blocks, as oneDNN keeps compiled code for every shape."""
_WORTHWHILE = 0.9
"""Share of a head's scores from which it is computed whole."""
_LOCAL_SCORES = 2**22
"""Scores that the bound holds at a time, float32: 16 MiB."""

_PRODUCT_SCORES = 2**20
"""Scores of a tile that `_products` holds at a time, in bfloat16, twice."""
_PRODUCT_ROWS = 512
"""Queries of one head in a product at least; fewer do not fill it."""

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_NAMESPACE = "jina_bert_" + re.sub(r"\W", "_", __name__)


@dataclass(frozen=True)
class _Tile:
    """One kernel call: queries [first, last) of each sequence against its keys [start, stop), for some heads.

    `offset` is the first row of the first sequence; `sequences` of equal `length` follow one another.
    """

    offset: int
    sequences: int
    length: int
    heads: slice
    first: int
    last: int
    start: int
    stop: int


class _Plan:
    """The tiles of a batch, and the views that a tile reads and writes."""

    def __init__(self, query, key, slopes, cu_seqlens, *, scaling: float, sparse: bool):
        self.tokens, self.heads, _ = query.shape
        sizes = cu_seqlens.diff()
        lengths = sizes.tolist()
        # Row of the token that stands in each row once every sequence is reversed in its place; its own inverse.
        self.reverse = (cu_seqlens[:-1] + cu_seqlens[1:] - 1).repeat_interleave(sizes) - torch.arange(self.tokens)
        self.longest = max(lengths, default=0)
        positions = torch.arange(2 * self.longest - 1 if lengths else 0, dtype=slopes.dtype)
        self.bias = -slopes[:, None] * (positions - (self.longest - 1)).abs()
        self.groups: list[list[_Tile]] = []  # tiles of a group share no head with those of another
        for offset, sequences, length in _runs(lengths):
            if sparse and length >= SPARSE_LENGTH:
                for i in range(sequences):
                    self._add_sparse(query, key, slopes, offset + i * length, length, scaling)
            else:
                tile = _Tile(offset, sequences, length, slice(0, self.heads), 0, length, 0, length)
                self.groups.append([tile])
        total = self.heads * sum(length * length for length in lengths)
        computed = sum(_scores(tile) for group in self.groups for tile in group)
        record_scores(total, computed)

    def _add_sparse(self, query, key, slopes, offset: int, length: int, scaling: float):
        rows = slice(offset, offset + length)
        # Where the slope alone reaches over most of the text, the bound is not worth its computation.
        near = (1 - (1 - least_window(slopes, query.dtype) / length).clamp(min=0) ** 2 < _WORTHWHILE).nonzero()
        dense = sorted(set(range(self.heads)) - set(near[:, 0].tolist()))
        for heads in near[:, 0].split(max(1, _LOCAL_SCORES // (LOCAL * length))):
            reach = window_bound(
                query[rows, heads].transpose(0, 1), key[rows, heads].transpose(0, 1), slopes[heads],
                scaling=scaling, block=_BLOCK, dtype=query.dtype,
            ).tolist()  # fmt: skip
            for head, windows in zip(heads.tolist(), reach, strict=True):
                tiles = [_Tile(offset, 1, length, slice(head, head + 1), *tile) for tile in _merge(windows, length)]
                if sum(_scores(tile) for tile in tiles) > _WORTHWHILE * length * length:
                    dense.append(head)
                else:
                    self.groups.append(tiles)
        for heads in _slices(sorted(dense)):  # several heads a call keep all threads busy
            self.groups.append([_Tile(offset, 1, length, heads, 0, length, 0, length)])

    def mask(self, tile: _Tile) -> torch.Tensor:
        """`(1, heads, queries, keys)` bias of a tile for its queries in reverse order, a view."""
        origin = self.longest - 1 + tile.start - (tile.last - 1)
        width = self.bias.shape[1]
        shape = (1, tile.heads.stop - tile.heads.start, tile.last - tile.first, tile.stop - tile.start)
        return self.bias.as_strided(shape, (0, width, 1, 1), tile.heads.start * width + origin)

    def keys(self, packed: torch.Tensor, tile: _Tile) -> torch.Tensor:
        """`(sequences, heads, keys, head_dim)`, a view of packed `(tokens, heads, head_dim)`."""
        rows = packed[tile.offset : tile.offset + tile.sequences * tile.length, tile.heads]
        return rows.unflatten(0, (tile.sequences, tile.length))[:, tile.start : tile.stop].transpose(1, 2)

    def queries(self, reverse: torch.Tensor, tile: _Tile) -> torch.Tensor:
        """`(sequences, heads, queries, ...)`, a view of `(tokens, heads, ...)` in the order of `self.reverse`."""
        rows = reverse[tile.offset : tile.offset + tile.sequences * tile.length, tile.heads]
        rows = rows.unflatten(0, (tile.sequences, tile.length))
        return rows[:, tile.length - tile.last : tile.length - tile.first].transpose(1, 2)


def _reorder(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``packed[rows]`` of a contiguous `(tokens, heads, head_dim)`, as rows that are copied whole: far faster."""
    return packed.flatten(1).index_select(0, rows).view(packed.shape)


def _heads_first(packed: torch.Tensor) -> torch.Tensor:
    """The same `(tokens, heads, head_dim)`, stored head by head: the rows of a sequence in a head are one matrix."""
    return packed.transpose(0, 1).contiguous().transpose(0, 1)


def _products(query, key, value, bias, scaling: float, context, buffers):
    """``softmax(query key^T * scaling + bias) value`` as batched matrix products, written into `context`.

    Scores and probabilities are rounded to the dtype of the query; sums and the softmax itself are float32.

    Args:
        query: `(sequences, heads, queries, head_dim)`, any strides; without copies if `_heads_first`.
        key: `(sequences, heads, keys, head_dim)`.
        value: The same shape.
        bias: `(1, heads, queries, keys)` in the dtype of the query, a view.
        scaling: Factor on the dot products.
        context: The shape of the query; written.
        buffers: `(2, scores)` in the dtype of the query, one for all tiles: for at least `_PRODUCT_SCORES` and
            `_PRODUCT_ROWS` rows of scores.
    """
    if len(query) > 1:  # a product is batched over the sequences of one head, or over the heads of one sequence
        query, key, value, context, bias = (x.transpose(0, 1) for x in (query, key, value, context, bias))
    outer, inner, queries, _ = query.shape
    keys = key.shape[2]
    rows = min(queries, max(_PRODUCT_ROWS, _PRODUCT_SCORES // keys))
    batch = min(inner, max(1, _PRODUCT_SCORES // (rows * keys)))
    bias = bias.expand(outer, inner, queries, keys)
    for i in range(outer):
        for of_batch in (slice(start, min(start + batch, inner)) for start in range(0, inner, batch)):
            for block in (slice(first, min(first + rows, queries)) for first in range(0, queries, rows)):
                additive = bias[i, of_batch, block]
                scores, probabilities = (x[: additive.numel()].view(additive.shape) for x in buffers)
                scores.copy_(additive)
                scores.baddbmm_(query[i, of_batch, block], key[i, of_batch].mT, alpha=scaling)
                torch.softmax(scores, dim=-1, out=probabilities)
                torch.bmm(probabilities, value[i, of_batch], out=context[i, of_batch, block])


def _runs(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """(offset, sequences, length) of neighbours of equal length; empty sequences are left out."""
    offset = first = 0
    while first < len(lengths):
        last = first
        while last < len(lengths) and lengths[last] == lengths[first]:
            last += 1
        if lengths[first]:
            yield offset, last - first, lengths[first]
        offset += (last - first) * lengths[first]
        first = last


def _merge(reach: list[int], length: int) -> Iterator[tuple[int, int, int, int]]:
    """(first, last, start, stop) of tiles: blocks of queries put together while that adds little to their windows."""
    per_tile = max(1, sorted(reach)[len(reach) // 2] // (4 * _BLOCK))
    for block in range(0, len(reach), per_tile):
        first, last = block * _BLOCK, min((block + per_tile) * _BLOCK, length)
        window = max(reach[block : block + per_tile])
        start, stop = first - window, last + window
        yield first, last, max(0, start - start % _BLOCK), min(length, stop + -stop % _BLOCK)


def _scores(tile: _Tile) -> int:
    heads = tile.heads.stop - tile.heads.start
    return tile.sequences * heads * (tile.last - tile.first) * (tile.stop - tile.start)


def _slices(heads: list[int]) -> Iterator[slice]:
    """Runs of neighbouring heads."""
    first = 0
    for i, head in enumerate(heads):
        if i + 1 == len(heads) or heads[i + 1] != head + 1:
            yield slice(heads[first], head + 1)
            first = i + 1


@torch.library.custom_op(f"{_NAMESPACE}::alibi_attention", mutates_args=(), device_types="cpu")
def alibi_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float,
    sparse: bool,
    differentiable: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional attention with symmetric ALiBi inside each packed sequence.

    Args:
        query: `(tokens, heads, head_dim)`, contiguous in the last dimension.
        key: The same shape and dtype.
        value: The same shape and dtype.
        slopes: `(heads,) float32` (float64 for float64 inputs).
        cu_seqlens: `(sequences + 1,) int64`, first row of each sequence, ascending from 0 to `tokens`.
        scaling: Factor on the dot products.
        sparse: Leave out what `sparsity.window_bound` proves to be below rounding.
        differentiable: Whether there may be a backward pass.

    Returns:
        The context `(tokens, heads, head_dim)`, and, if `differentiable`, the log-sum-exp of the scores
        `(tokens, heads)`, each sequence in reverse order, for the backward pass; else `(0, heads)`.
    """
    plan = _Plan(query, key, slopes, cu_seqlens, scaling=scaling, sparse=sparse)
    reverse = _reorder(query, plan.reverse)
    if not differentiable and query.dtype == torch.bfloat16 and mkl_is_slow() and multiplies_bf16():
        plan.bias = plan.bias.to(query.dtype)
        reverse, key, value = (_heads_first(x) for x in (reverse, key, value))
        context = torch.empty_like(reverse)
        buffers = query.new_empty(2, max(_PRODUCT_SCORES, _PRODUCT_ROWS * plan.longest))
        for tile in (tile for group in plan.groups for tile in group):
            queries, keys, values = plan.queries(reverse, tile), plan.keys(key, tile), plan.keys(value, tile)
            _products(queries, keys, values, plan.mask(tile), scaling, plan.queries(context, tile), buffers)
        return _reorder(context.contiguous(), plan.reverse), slopes.new_empty(0, plan.heads)
    context = torch.empty_like(reverse)
    statistics = slopes.new_empty(reverse.shape[:2])
    for tile in (tile for group in plan.groups for tile in group):
        result, logsumexp = _forward_kernel(
            plan.queries(reverse, tile), plan.keys(key, tile), plan.keys(value, tile),
            attn_mask=plan.mask(tile), scale=scaling,
        )  # fmt: skip
        plan.queries(context, tile).copy_(result)
        plan.queries(statistics, tile).copy_(logsumexp)
    return _reorder(context, plan.reverse), statistics if differentiable else slopes.new_empty(0, plan.heads)


@alibi_attention.register_fake
def _(query, key, value, slopes, cu_seqlens, scaling, sparse, differentiable):
    statistics = slopes.new_empty(query.shape[0] if differentiable else 0, query.shape[1])
    return torch.empty(query.shape, dtype=query.dtype), statistics


@torch.library.custom_op(f"{_NAMESPACE}::alibi_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: torch.Tensor,
    statistics: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float,
    sparse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The same inputs give the same plan as in the forward pass.
    plan = _Plan(query, key, slopes, cu_seqlens, scaling=scaling, sparse=sparse)
    gradient, reverse, context = (_reorder(x, plan.reverse) for x in (gradient, query, context))
    of_query = torch.empty_like(reverse)
    # Tiles overlap in their keys: their shares are added in float32 or wider.
    of_key = torch.zeros(key.shape, dtype=slopes.dtype)
    of_value = torch.zeros(value.shape, dtype=slopes.dtype)

    def run(group: list[_Tile]):
        for tile in group:
            shares = _backward_kernel(
                plan.queries(gradient, tile), plan.queries(reverse, tile), plan.keys(key, tile),
                plan.keys(value, tile), plan.queries(context, tile), plan.queries(statistics, tile).contiguous(),
                0.0, False, attn_mask=plan.mask(tile), scale=scaling,
            )  # fmt: skip
            plan.queries(of_query, tile).copy_(shares[0])
            plan.keys(of_key, tile).add_(shares[1])
            plan.keys(of_value, tile).add_(shares[2])

    # The backward kernel has one thread a head: tiles of one head go side by side, a group (a head) a thread.
    single = [group for group in plan.groups if group[0].heads.stop - group[0].heads.start == 1]
    for group in plan.groups:
        if group not in single:
            run(group)
    if len(single) > 1 and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(run, single))
    else:
        for group in single:
            run(group)
    return _reorder(of_query, plan.reverse), of_key.to(key.dtype), of_value.to(value.dtype)


@_backward.register_fake
def _(gradient, query, key, value, context, statistics, slopes, cu_seqlens, scaling, sparse):
    return tuple(torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, slopes, cu_seqlens, ctx.scaling, ctx.sparse, _ = inputs
    ctx.save_for_backward(query, key, value, *output, slopes, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward_of(ctx, gradient, _):
    if gradient is None:
        return (None,) * 8
    query, key, value, context, statistics, slopes, cu_seqlens = ctx.saved_tensors
    gradients = _backward(
        gradient.contiguous(), query, key, value, context, statistics, slopes, cu_seqlens, ctx.scaling, ctx.sparse
    )
    return (*gradients, None, None, None, None, None)


alibi_attention.register_autograd(_backward_of, setup_context=_setup_context)
