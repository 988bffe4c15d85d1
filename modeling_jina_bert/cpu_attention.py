"""ALiBi attention over packed sequences on the CPU: linear memory, nothing computed that cannot be seen.

Law: the numbers of `eager_attention`, values and gradients; no tensor of size length x length exists.

How: the batch is cut into tiles (attention_tiles.py), each of which torch's blockwise kernel computes with a view of
the ALiBi bias as its mask; in bfloat16, where that kernel is slow, by matrix products (cpu_products.py).

The whole is one operator, so that `torch.compile` and `torch.export` see a single node whatever the lengths are. The
name of the operator carries the name of this module: the installed package and copies loaded by trust_remote_code live
side by side in one process.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import scaled_dot_product_attention

from .attention_tiles import Plan, Tile
from .cpu_products import by_products, product_gradients, products
from .sparsity import record_scores

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_NAMESPACE = "jina_bert_" + re.sub(r"\W", "_", __name__)


def _plan(query, key, slopes, cu_seqlens, *, scaling: float, sparse: bool) -> tuple[Plan, torch.Tensor]:
    """The tiles, and the row of the token that stands in each row once every sequence is reversed in its place.

    That order is its own inverse; rows that belong to no sequence stay where they are.
    """
    sizes = cu_seqlens.diff()
    lengths = sizes.tolist()
    sequences = list(zip(cu_seqlens[:-1].tolist(), lengths, strict=True))
    plan = Plan(query, key, slopes, sequences, lengths, scaling=scaling, sparse=sparse)
    rows = torch.arange(len(query))
    rows[: plan.rows] = (cu_seqlens[:-1] + cu_seqlens[1:] - 1).repeat_interleave(sizes) - rows[: plan.rows]
    return plan, rows


def short_attention(query, key, value, bias: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """Attention of one short sequence in inference: a few operations, where a plan of tiles would take longer.

    Args:
        query: `(tokens, heads, head_dim)`; rows from the length of the bias on belong to no sequence, and get zeros.
        key: The same shape and dtype.
        value: The same shape and dtype.
        bias: `(heads, length, length)`, float32 or wider.
        scaling: Factor on the dot products.

    Returns:
        The context, in the shape of the query.
    """
    heads, length, _ = bias.shape
    record_scores(heads * length * length, heads * length * length)
    context = torch.zeros_like(query)
    query, key, value = (x[:length].transpose(0, 1) for x in (query, key, value))
    if by_products(query.dtype):  # with its roundings: batch equals single
        query, key, value = (x.contiguous() for x in (query, key, value))
        scores = torch.baddbmm(bias.to(query.dtype), query, key.mT, alpha=scaling)
        found = scores.softmax(dim=-1) @ value
    else:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        found = scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0), scale=scaling)[0]
    context[:length] = found.transpose(0, 1)
    return context


def _reorder(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``packed[rows]`` of a contiguous `(tokens, heads, head_dim)`, as rows that are copied whole: far faster."""
    return packed.flatten(1).index_select(0, rows).view(packed.shape)


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
        cu_seqlens: `(sequences + 1,) int64`, first row of each sequence, ascending from 0 to at most `tokens`. Rows
            from there on belong to no sequence; their context is finite and means nothing.
        scaling: Factor on the dot products.
        sparse: Leave out what `sparsity.window_bound` proves to be below rounding.
        differentiable: Whether there may be a backward pass.

    Returns:
        The context `(tokens, heads, head_dim)`, and, where the backward pass will need it, the log-sum-exp of the
        scores `(tokens, heads)`, each sequence in reverse order; else `(0, heads)`.
    """
    if by_products(query.dtype):
        context = products(query, key, value, slopes, cu_seqlens, scaling=scaling, sparse=sparse)
        return context, slopes.new_empty(0, query.shape[1])
    plan, order = _plan(query, key, slopes, cu_seqlens, scaling=scaling, sparse=sparse)
    reverse = _reorder(query, order)
    context = torch.empty_like(reverse)
    context[plan.rows :] = 0
    statistics = slopes.new_empty(reverse.shape[:2])
    for tile in plan.tiles():
        result, logsumexp = _forward_kernel(
            plan.queries(reverse, tile), plan.keys(key, tile), plan.keys(value, tile),
            attn_mask=plan.mask(tile), scale=scaling,
        )  # fmt: skip
        plan.queries(context, tile).copy_(result)
        plan.queries(statistics, tile).copy_(logsumexp)
    return _reorder(context, order), statistics if differentiable else slopes.new_empty(0, plan.heads)


@alibi_attention.register_fake
def _(query, key, value, slopes, cu_seqlens, scaling, sparse, differentiable):
    kept = query.shape[0] if differentiable and not by_products(query.dtype) else 0
    statistics = slopes.new_empty(kept, query.shape[1])
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
    if by_products(query.dtype):
        return product_gradients(gradient, query, key, value, slopes, cu_seqlens, scaling=scaling, sparse=sparse)
    plan, order = _plan(query, key, slopes, cu_seqlens, scaling=scaling, sparse=sparse)
    gradient, reverse, context = (_reorder(x, order) for x in (gradient, query, context))
    of_query = torch.zeros_like(reverse)
    # Tiles overlap in their keys: their shares are added in float32 or wider.
    of_key = torch.zeros(key.shape, dtype=slopes.dtype)
    of_value = torch.zeros(value.shape, dtype=slopes.dtype)

    def run(group: list[Tile]):
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
    return _reorder(of_query, order), of_key.to(key.dtype), of_value.to(value.dtype)


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
