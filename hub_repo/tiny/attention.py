"""Self-attention under a symmetric ALiBi bias and a padding mask, in interchangeable implementations.

Law: ``softmax(q k^T * scaling - slope * |i - j| + padding) v``, the same numbers from every implementation. Padding
adds `finfo.min`, not -inf: a sequence without a valid token attends uniformly to all its positions and stays finite.

Memory: `eager` holds (batch, heads, length, length). `sdpa` holds a dense bias only up to `DENSE_LENGTH` tokens;
beyond, the bias is a strided view (CPU) or built one block of queries at a time (elsewhere), and memory is linear in
the length, forward and backward.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .alibi import alibi_bias, alibi_hankel

DENSE_LENGTH = 512
"""Tokens up to which a padded batch uses one dense (batch, heads, length, length) bias, built once for all layers.
Measured on two cores: one SDPA call for the batch beats one per sequence by up to 12x at 64 tokens, 1.2x at 512."""
QUERY_BLOCK = 1024
"""Queries whose bias is held at a time where the device's kernels do not read a strided view."""


class AttentionBias:
    """What attention adds to the scores: the ALiBi slopes and the padding of one forward pass, shared by all layers.

    Args:
        slopes: One Python float a head.
        attention_mask: `(batch, length) bool`, True at valid tokens, or None when every token is valid.
        length: Tokens of the (padded) batch.
        dtype: Dtype of the hidden states; the bias is float32, or float64 for float64.
        device: Device of the hidden states.
    """

    def __init__(
        self,
        slopes: tuple[float, ...],
        attention_mask: torch.Tensor | None,
        length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        # NOTE: bfloat16 cannot even count to 512; the bias stays in float32 under half precision and autocast.
        bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.slopes = torch.tensor(slopes, dtype=bias_dtype, device=device)
        self.attention_mask = attention_mask
        self.length = length

    @cached_property
    def dense(self) -> torch.Tensor:
        """`(1 or batch, heads, length, length)` additive bias, padding included."""
        bias = alibi_bias(self.slopes, self.length)
        if self.attention_mask is None:
            return bias
        minimum = torch.finfo(bias.dtype).min
        return bias.masked_fill(~self.attention_mask[:, None, None, :], minimum)

    @cached_property
    def has_empty_rows(self) -> bool:
        """Whether a sequence has no valid token at all."""
        return self.attention_mask is not None and not bool(self.attention_mask.any(dim=1).all())

    @cached_property
    def hankel(self) -> torch.Tensor:
        """`(1, heads, length, length)` bias for reversed queries, a view without memory of its own; no padding."""
        return alibi_hankel(self.slopes, self.length)

    @cached_property
    def spans(self) -> list[tuple[int, int] | None]:
        """Per sequence, [start, stop) of its valid tokens; None where they are not contiguous. Empty: (0, 0)."""
        spans: list[tuple[int, int] | None] = []
        assert self.attention_mask is not None
        for row in self.attention_mask.tolist():
            valid = sum(row)
            start = row.index(True) if valid else 0
            spans.append((start, start + valid) if all(row[start : start + valid]) else None)
        return spans


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: AttentionBias,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference attention: every score in memory, softmax in float32 or wider.

    Args:
        query: `(batch, heads, length, head_dim)`.
        key: The same shape.
        value: The same shape.
        bias: ALiBi slopes and padding of this forward pass.
        scaling: Factor on the scores, 1 / sqrt(head_dim).
        dropout: Probability on the attention probabilities.

    Returns:
        The context `(batch, heads, length, head_dim)` and the probabilities `(batch, heads, length, length)`.
    """
    scores = (query @ key.transpose(-1, -2)) * scaling
    probabilities = nn.functional.softmax(scores + bias.dense, dim=-1).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=dropout > 0)
    return probabilities @ value, probabilities


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: AttentionBias,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """`torch.nn.functional.scaled_dot_product_attention`, memory linear in the length.

    Same arguments and context as `eager_attention`. COST: attention dropout > 0 makes torch fall back to a kernel that
    holds all probabilities; every released model has 0.
    """
    length = query.shape[2]
    options = {"scaling": scaling, "dropout": dropout}
    if bias.attention_mask is None:
        return _whole_sequences(query, key, value, bias, **options), None
    # TRAP: under finfo.min everywhere, the CPU kernel's backward loses log(length) in its statistics and returns
    # gradients `length` times too large; sequences without a valid token therefore take the loop below.
    if length <= DENSE_LENGTH and not bias.has_empty_rows:
        return _sdpa(query, key, value, bias.dense, **options), None
    rows = []
    for row, span in enumerate(bias.spans):
        sequence = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        if span is None:
            rows.append(_blockwise(*sequence, bias, padding=~bias.attention_mask[row], **options))
        elif span[0] == span[1]:  # no valid token: uniform attention over all positions
            rows.append(sequence[2].mean(dim=2, keepdim=True).expand_as(sequence[2]))
        else:
            rows.append(_whole_sequences(*sequence, bias, span=span, **options))
    return torch.cat(rows), None


def _sdpa(query, key, value, additive, *, scaling, dropout):
    if additive.dtype != query.dtype and query.device.type != "cpu":
        additive = additive.to(query.dtype)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=additive, dropout_p=dropout, scale=scaling
    )


def _whole_sequences(query, key, value, bias, *, span=None, **options):
    """All queries against the keys of `span`, [start, stop), or against all keys."""
    start, stop = span or (0, bias.length)
    key, value = key[:, :, start:stop], value[:, :, start:stop]
    if query.device.type == "cpu" and not options["dropout"]:
        # Slicing the key axis of the Hankel view moves its origin: still a view, still exact.
        return _sdpa(query.flip(2), key, value, bias.hankel[..., start:stop], **options).flip(2)
    return _blockwise(query, key, value, bias, span=(start, stop), **options)


def _blockwise(query, key, value, bias, *, padding=None, span=None, **options):
    """Blocks of queries, each with its own slice of the bias; recomputed in backward so that none is kept.

    `padding` is a `(length,) bool` mask of the keys to leave out of one sequence whose valid tokens have holes.
    """
    start, stop = span or (0, bias.length)

    def block(first: int, last: int, query, key, value):
        reversed_block = bias.hankel[:, :, bias.length - last : bias.length - first, start:stop]
        additive = reversed_block.flip(2)
        if padding is not None:
            additive = additive.masked_fill(padding, torch.finfo(additive.dtype).min)
        return _sdpa(query, key, value, additive, **options)

    blocks = []
    for first in range(0, bias.length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, bias.length)
        arguments = (first, last, query[:, :, first:last], key, value)
        if torch.is_grad_enabled() and query.requires_grad:
            blocks.append(checkpoint(block, *arguments, use_reentrant=False))
        else:
            blocks.append(block(*arguments))
    return torch.cat(blocks, dim=2)


ATTENTION_FUNCTIONS: dict[str, Callable] = {"eager": eager_attention, "sdpa": sdpa_attention}
"""Values of `attn_implementation` and what computes them."""
