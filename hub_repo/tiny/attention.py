"""Self-attention under a symmetric ALiBi bias, in interchangeable implementations.

Law: ``softmax(q k^T * scaling - slope * |i - j| + padding) v``, the same numbers from every implementation. Padding
adds `finfo.min`, not -inf: a sequence without a valid token attends uniformly to all its positions and stays finite.

All take `(tokens, heads, head_dim)` for packed sequences (`Sequences.cu_seqlens` is set) and `(batch, length, heads,
head_dim)` for a batch with padding left in it, and return the context in the shape of the query.

| name | where | memory | leaves out what is below rounding |
|---|---|---|---|
| eager | everywhere; the reference | quadratic | no |
| sdpa | CPU: cpu_attention.py; elsewhere blocks of queries | linear | on the CPU |
| flex_attention | CUDA, compiled; CPU: forward only, uncompiled | linear on CUDA | on CUDA, by blocks |
| flash_attention_2 | CUDA, half precision, package flash-attn | linear | no |
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .alibi import alibi_bias, alibi_hankel
from .cpu_attention import alibi_attention, short_attention
from .packing import Sequences, is_traced
from .sparsity import window_bound

DENSE_LENGTH = 512
"""Tokens up to which devices without a packed kernel use one dense (batch, heads, length, length) bias."""
SHORT_LENGTH = 128
"""Tokens up to which a sequence of its own, such as a search query, is computed with a dense bias on the CPU."""
BLOCK_SCORES = 2**24
"""Scores (heads x queries x keys) whose bias is held at a time where it has to be written out."""
_FLEX_BLOCK = 128


def _dense_bias(sequences: Sequences) -> torch.Tensor:
    """`(1 or batch, heads, length, length)` additive bias, padding included."""
    bias = alibi_bias(sequences.slopes, sequences.length)
    if sequences.attention_mask is None:
        return bias
    return bias.masked_fill(~sequences.attention_mask[:, None, None, :], torch.finfo(bias.dtype).min)


def _heads_first(x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """-> `(batch, heads, length, head_dim)`."""
    if sequences.cu_seqlens is not None:
        x = sequences.pad(x)
    return x.transpose(1, 2)


def _tokens_first(context: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """`(batch, heads, length, head_dim)` -> the shape of the query."""
    context = context.transpose(1, 2)
    return sequences.unpad(context) if sequences.cu_seqlens is not None else context


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reference attention: every score in memory, softmax in float32 or wider.

    Args:
        query: `(tokens, heads, head_dim)`, or `(batch, length, heads, head_dim)`; see the top of this file.
        key: The same shape.
        value: The same shape.
        sequences: Slopes, padding and packing of this forward pass.
        scaling: Factor on the scores, 1 / sqrt(head_dim).
        dropout: Probability on the attention probabilities.

    Returns:
        The context in the shape of `query`, and the probabilities `(batch, heads, length, length)`.
    """
    query, key, value = (_heads_first(x, sequences) for x in (query, key, value))
    scores = (query @ key.transpose(-1, -2)) * scaling
    probabilities = nn.functional.softmax(scores + _dense_bias(sequences), dim=-1).to(query.dtype)
    if dropout:
        probabilities = nn.functional.dropout(probabilities, p=dropout)
    return _tokens_first(probabilities @ value, sequences), probabilities


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """torch's fused kernels, memory linear in the length.

    Same arguments and context as `eager_attention`. COST: with dropout > 0 torch has no fused kernel on the CPU;
    blocks of queries are then computed one by one, and again in the backward pass. Every released model has 0.
    """
    if is_traced():
        additive = _dense_bias(sequences)
        query, key, value = (_heads_first(x, sequences) for x in (query, key, value))
        return _tokens_first(_sdpa(query, key, value, additive, scaling=scaling, dropout=dropout), sequences), None
    if sequences.cu_seqlens is not None and query.device.type == "cpu" and not dropout:
        if _is_short(sequences):
            length = int(sequences.cu_seqlens[-1])  # of the batch of one it may be padded to more
            bias = sequences.bias[:, :length, :length]
            return short_attention(query, key, value, bias, scaling=scaling), None
        context, _ = alibi_attention(
            query, key, value, sequences.slopes, sequences.cu_seqlens, scaling, sequences.sparse,
            torch.is_grad_enabled(),
        )  # fmt: skip
        return context, None
    options = {"scaling": scaling, "dropout": dropout}
    if sequences.cu_seqlens is not None and sequences.length > DENSE_LENGTH:
        return _one_by_one(query, key, value, sequences, **options), None
    query, key, value = (_heads_first(x, sequences) for x in (query, key, value))
    if sequences.cu_seqlens is not None:
        context = _sdpa(query, key, value, _dense_bias(sequences), **options)
    else:
        context = _row_by_row(query, key, value, sequences, **options)
    return _tokens_first(context, sequences), None


def _is_short(sequences: Sequences) -> bool:
    return (
        sequences.batch == 1
        and sequences.length <= SHORT_LENGTH
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def _sdpa(query, key, value, additive, *, scaling, dropout):
    if additive.dtype != query.dtype and query.device.type != "cpu":
        additive = additive.to(query.dtype)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=additive, dropout_p=dropout, scale=scaling
    )


def _one_by_one(query, key, value, sequences, **options):
    """One packed sequence at a time, each at its own length; `(tokens, heads, head_dim)`."""
    sizes = sequences.cu_seqlens.diff().tolist()
    contexts = []
    for rows in zip(*(x.split(sizes) for x in (query, key, value)), strict=True):
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in rows)
        hankel = alibi_hankel(sequences.slopes, query.shape[2])
        contexts.append(_blockwise(query, key, value, hankel, **options).squeeze(0).transpose(0, 1))
    return torch.cat(contexts) if contexts else torch.zeros_like(query)


def _row_by_row(query, key, value, sequences, **options):
    """One sequence of a padded batch at a time."""
    hankel = alibi_hankel(sequences.slopes, sequences.length)
    rows = []
    for row in range(sequences.batch):
        valid = sequences.attention_mask[row] if sequences.attention_mask is not None else None
        sequence = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        if valid is not None and not valid.any():
            # TRAP: under finfo.min everywhere, the CPU kernel's backward loses log(length) in its statistics and
            # returns gradients `length` times too large. Uniform attention is the mean of the values.
            rows.append(sequence[2].mean(dim=2, keepdim=True).expand_as(sequence[2]))
        else:
            rows.append(_blockwise(*sequence, hankel, padding=None if valid is None else ~valid, **options))
    return torch.cat(rows) if rows else torch.zeros_like(query)


def _blockwise(query, key, value, hankel, *, padding=None, **options):
    """Blocks of queries of one sequence, each with its own slice of the bias; recomputed in the backward pass.

    `padding` is `(length,) bool`, the keys to leave out.
    """
    length = query.shape[2]

    def block(first: int, last: int, query, key, value):
        additive = hankel[:, :, length - last : length - first].flip(2)
        if padding is not None:
            additive = additive.masked_fill(padding, torch.finfo(additive.dtype).min)
        return _sdpa(query, key, value, additive, **options)

    size = max(16, BLOCK_SCORES // (query.shape[1] * length))
    blocks = []
    for first in range(0, length, size):
        last = min(first + size, length)
        arguments = (first, last, query[:, :, first:last], key, value)
        if torch.is_grad_enabled() and query.requires_grad:
            blocks.append(checkpoint(block, *arguments, use_reentrant=False))
        else:
            blocks.append(block(*arguments))
    return torch.cat(blocks, dim=2)


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """torch's flex_attention over packed tokens; blocks that are proven negligible are not visited.

    Same arguments and context as `eager_attention`. A batch that could not be packed takes the `sdpa` path.

    Raises:
        ValueError: dropout > 0, which flex_attention does not have; gradients on the CPU, where torch has none for it.
    """
    if dropout:
        raise ValueError(
            f"flex_attention has no dropout and attention_probs_dropout_prob is {dropout}: use sdpa or eager."
        )
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("flex_attention is forward only on the CPU: train with sdpa, or under torch.no_grad().")
    if sequences.cu_seqlens is None:
        return sdpa_attention(query, key, value, sequences, scaling=scaling)
    from torch.nn.attention.flex_attention import flex_attention as uncompiled
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    slopes = sequences.slopes
    documents = torch.repeat_interleave(sequences.cu_seqlens.diff(), output_size=len(query)).to(query.device)

    def alibi(score, batch, head, row, column):
        return score - slopes[head] * (row - column).abs()

    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    mask = _flex_block_mask(query, key, sequences, documents, scaling=scaling)
    function: Any = uncompiled
    if query.device.type == "cuda":
        function = compile_friendly_flex_attention
    query, key, value = query[None], key[None], value[None]
    context = function(query, key, value, score_mod=alibi, block_mask=mask, scale=scaling)
    return context[0].transpose(0, 1), None


@torch.no_grad()
def _flex_block_mask(query, key, sequences, documents, *, scaling):
    """BlockMask of the pairs inside one sequence, without the blocks beyond the proven window of their head."""
    from torch.nn.attention.flex_attention import BlockMask

    heads, tokens, _ = query.shape
    blocks = -(-tokens // _FLEX_BLOCK)
    first = torch.arange(blocks, device=query.device) * _FLEX_BLOCK
    last = (first + _FLEX_BLOCK).clamp(max=tokens) - 1
    # Documents ascend with the rows, so two blocks share one if their ranges overlap.
    keep = (documents[first][:, None] <= documents[last]) & (documents[last][:, None] >= documents[first])
    keep = keep.expand(heads, blocks, blocks)
    if sequences.sparse:
        window = window_bound(
            query, key, sequences.slopes, scaling=scaling, block=_FLEX_BLOCK, dtype=query.dtype, documents=documents
        )
        distance = torch.maximum(first[None, :] - last[:, None], first[:, None] - last[None, :])
        keep = keep & (distance <= window[:, :, None])

    def same_document(batch, head, row, column):
        return documents[row] == documents[column]

    return BlockMask.from_kv_blocks(
        keep.sum(dim=-1, dtype=torch.int32)[None],
        keep.int().argsort(dim=-1, descending=True, stable=True).int()[None],
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=same_document,
        seq_lengths=(tokens, tokens),
    )


def flash_attention_2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """FlashAttention over packed tokens with `alibi_slopes`, from the package flash-attn (CUDA, half precision).

    Same arguments and context as `eager_attention`. A batch that could not be packed takes the `sdpa` path.

    Raises:
        ImportError: The package is not installed.
    """
    if sequences.cu_seqlens is None:
        return sdpa_attention(query, key, value, sequences, scaling=scaling, dropout=dropout)
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ImportError("flash_attention_2 needs the package flash-attn: pip install flash-attn") from error
    offsets = sequences.cu_seqlens.to(device=query.device, dtype=torch.int32)
    context = flash_attn_varlen_func(
        query, key, value, offsets, offsets, sequences.length, sequences.length,
        dropout_p=dropout, softmax_scale=scaling, causal=False, alibi_slopes=sequences.slopes,
    )  # fmt: skip
    return context, None


ATTENTION_FUNCTIONS: dict[str, Callable] = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
    "flex_attention": flex_attention,
    "flash_attention_2": flash_attention_2,
}
"""Values of `attn_implementation` and what computes them."""
