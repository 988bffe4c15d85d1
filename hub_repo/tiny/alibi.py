"""Symmetric ALiBi: the slopes, and the bias ``-slope * |i - j|`` they stand for (arXiv 2108.12409, 2310.19923).

Law: the bias depends on ``i - j`` alone, so one vector of ``2 * length - 1`` values a head says everything. With the
queries in reverse order the matrix is a Hankel matrix (constant along anti-diagonals), and a Hankel matrix is a
strided view of that vector: ``alibi_hankel`` costs ``heads * (2 * length - 1)`` numbers, whatever reads it as a
matrix.
"""

import math

import torch


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slope of each head, in the head order of the released models.

    For a power of two n: ``2 ** (-8k / n)``, k = 1..n. Otherwise, with c the largest power of two below n, the slopes
    for c followed by every second slope of those for 2c. Not sorted: the order is part of the checkpoint.

    Args:
        num_heads: Number of attention heads, at least 1.

    Returns:
        Tuple of `num_heads` Python floats (float64 precision; they become tensors only in `forward`).

    Raises:
        ValueError: `num_heads` is smaller than 1.

    Example:
        >>> alibi_slopes(4)
        (0.25, 0.0625, 0.015625, 0.00390625)
        >>> alibi_slopes(6)
        (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: at least one head is needed.")
    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * k / closest) for k in range(1, closest + 1)]
    finer = [2.0 ** (-8.0 * k / (2 * closest)) for k in range(1, 2 * closest + 1)]
    return tuple(slopes + finer[0::2][: num_heads - closest])


def alibi_hankel(slopes: torch.Tensor, length: int) -> torch.Tensor:
    """ALiBi bias for queries in reverse order, as a view with strides (1, 1) over one vector a head.

    Args:
        slopes: `(heads,) float`, its dtype and device are the result's.
        length: Number of tokens n.

    Returns:
        `(1, heads, length, length)`; entry [0, h, i, j] is ``-slopes[h] * |(length - 1 - i) - j|``. All rows share the
        same ``heads * (2 * length - 1)`` numbers: read it, never write to it, and do not call `contiguous()` on it.

    Example:
        >>> alibi_hankel(torch.tensor([1.0]), 3)[0, 0].flip(0)
        tensor([[-0., -1., -2.],
                [-1., -0., -1.],
                [-2., -1., -0.]])
    """
    positions = torch.arange(2 * length - 1, device=slopes.device, dtype=slopes.dtype)
    vector = -slopes[:, None] * (positions - (length - 1)).abs()
    return vector.as_strided((1, slopes.shape[0], length, length), (0, 2 * length - 1, 1, 1))


def alibi_bias(slopes: torch.Tensor, length: int) -> torch.Tensor:
    """The dense ALiBi bias. COST: ``heads * length ** 2`` numbers; for short sequences and for reference.

    Args:
        slopes: `(heads,) float`.
        length: Number of tokens n.

    Returns:
        `(1, heads, length, length)`; entry [0, h, i, j] is ``-slopes[h] * |i - j|``.
    """
    positions = torch.arange(length, device=slopes.device, dtype=slopes.dtype)
    distance = (positions[:, None] - positions[None, :]).abs()
    return -slopes[None, :, None, None] * distance
