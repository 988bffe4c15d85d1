r"""Which keys a query cannot see: a proven bound on what ALiBi pushes below the rounding of the dtype.

Law: what is left out changes an output coordinate by at most one unit roundoff u of its dtype, relative to the largest
value in that coordinate. Nothing is assumed about the model; where the bound does not hold, everything is computed.

Proof. Row i of one head has scores ``s_ij = c q_i.k_j - m |i - j|`` (c the scaling, m the slope). For any vector z,
with R = max_j |k_j - z| (Cauchy-Schwarz):

    s_ij <= t_i - m |i - j|,   t_i = c (q_i.z + |q_i| R).

Leave out every key further away than w. Both sides together, a geometric series:

    skipped_i = sum_{|i - j| > w} exp(s_ij) <= 2 exp(t_i - m (w + 1)) / (1 - exp(-m)).

What is kept is at least the sum over any kept keys; take those of a small block around i, computed exactly:
``kept_i >= exp(l_i)``. Hence skipped_i / kept_i <= d if

    m (w + 1) >= t_i - l_i + log(2 / (1 - exp(-m))) - log d.                                                    (*)

With p the skipped share of the softmax (p <= d), the output is off by p times the difference between the mean of the
skipped and that of the kept values, at most 2 p max|v|; d = u / 2 makes that u max|v|. Gradients are averages over the
same probabilities and off in proportion. `window_bound` evaluates (*) for each row and takes the largest window of a
block of rows; z is the mean of the keys, which cancels what all keys have in common. The rounding of the bound itself
(dot products of n numbers, relative error at most n eps) is added to t_i, four times over; autocast is off for it, and
where a GPU may multiply in TF32 eps is 2^-10. Infinite or undefined norms give an unlimited window.

COST: one product with `LOCAL` keys a query, about LOCAL / length of the attention itself.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

LOCAL = 32
"""Keys around a query that give the lower bound of its softmax denominator."""


@dataclass(eq=False)  # each count is one of its own, whatever it has counted
class ScoreCount:
    """Scores (query-key pairs, summed over heads, layers and sequences) of the calls inside `count_scores`.

    Attributes:
        total: All pairs of the plain computation.
        computed: The pairs that were computed.
    """

    total: int = 0
    computed: int = 0

    @property
    def skipped_share(self) -> float:
        """Share of the scores that was proven negligible and left out."""
        return 1 - self.computed / self.total if self.total else 0.0


_counts: list[ScoreCount] = []


@contextmanager
def count_scores() -> Iterator[ScoreCount]:
    """Counts the attention scores that the `sdpa` path computes on the CPU inside the block, and those it skips.

    Example:
        >>> with count_scores() as count:
        ...     pass
        >>> count.total
        0
    """
    count = ScoreCount()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def record_scores(total: int, computed: int):
    """Adds to every open `count_scores`."""
    for count in _counts:
        count.total += total
        count.computed += computed


def window_bound(
    query: torch.Tensor,
    key: torch.Tensor,
    slopes: torch.Tensor,
    *,
    scaling: float,
    block: int,
    dtype: torch.dtype,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Distance that each block of queries of each head has to look, proven as above.

    Args:
        query: `(heads, length, head_dim)`, any float dtype.
        key: `(heads, length, head_dim)`.
        slopes: `(heads,) float`, ALiBi slopes m, at least 0.
        scaling: Factor c on the dot products.
        block: Queries in a block.
        dtype: Dtype of the attention output, whose rounding is the measure.
        documents: `(length,) int`, for packed sequences the number of each token's sequence; None for one sequence.

    Returns:
        `(heads, blocks) int64`, the window w of each block of queries: keys with |i - j| > w are negligible for all
        its rows. At most length - 1, which leaves nothing out.
    """
    with torch.autocast(query.device.type, enabled=False):  # it would multiply in half precision
        return _window_bound(query, key, slopes, scaling, block, dtype, documents)


def _window_bound(query, key, slopes, scaling, block, dtype, documents) -> torch.Tensor:
    heads, length, head_dim = query.shape
    blocks = math.ceil(length / block)
    work = torch.promote_types(query.dtype, torch.float32)
    query, key, slopes = query.to(work), key.to(work), slopes.to(work)
    centre = key.mean(dim=1, keepdim=True)
    radius = torch.linalg.vector_norm(key - centre, dim=2).amax(dim=1, keepdim=True)
    slack = 4 * head_dim * _eps(query) * (torch.linalg.vector_norm(centre, dim=2) + radius)
    upper = scaling * ((query @ centre.mT)[..., 0] + torch.linalg.vector_norm(query, dim=2) * (radius + slack))
    tail = (2 / -torch.expm1(-slopes)).clamp(max=2 * length).log()
    needed = upper - _local_logsumexp(query, key, slopes, scaling, documents)
    needed = (needed + tail[:, None] - math.log(_negligible(dtype))) / slopes[:, None]
    needed = torch.nn.functional.pad(needed, (0, blocks * block - length), value=-math.inf)
    largest = needed.view(heads, blocks, block).amax(dim=2).nan_to_num(nan=math.inf)
    return largest.ceil().clamp(0, length - 1).long()


def _eps(query: torch.Tensor) -> float:
    """Relative rounding of a product of these."""
    if query.device.type != "cuda" or query.dtype != torch.float32:
        return torch.finfo(query.dtype).eps
    try:
        allowed = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # it was set in torch's newer way, which the older one refuses to tell
        allowed = True
    return 2**-10 if allowed else torch.finfo(query.dtype).eps


def least_window(slopes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `window_bound` gives at least, whatever the queries and keys are: nothing is gained where that is too far.

    No l_i exceeds ``t_i + log((1 + exp(-m)) / (1 - exp(-m)))``, as the scores of the block are at most
    ``t_i - m |i - j|``; put into (*).

    Args:
        slopes: `(heads,) float`, ALiBi slopes m, at least 0.
        dtype: Dtype of the attention output.

    Returns:
        `(heads,) float`, infinite for slope 0.

    Example:
        >>> least_window(torch.tensor([0.5, 2**-8]), torch.float32)
        tensor([  35., 4436.])
    """
    return ((math.log(2) - torch.exp(-slopes).log1p() - math.log(_negligible(dtype))) / slopes - 1).ceil()


def _negligible(dtype: torch.dtype) -> float:
    """d of (*): half of the unit roundoff."""
    return torch.finfo(dtype).eps / 4


def _local_logsumexp(
    query: torch.Tensor, key: torch.Tensor, slopes: torch.Tensor, scaling: float, documents: torch.Tensor | None
) -> torch.Tensor:
    """`(heads, length)`: log of the sum of exp(score) over the keys of each query's own block of `LOCAL`."""
    length = query.shape[1]
    blocks = math.ceil(length / LOCAL)
    missing = blocks * LOCAL - length
    query, key = (torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(1, (blocks, LOCAL)) for x in (query, key))
    positions = torch.arange(LOCAL, device=query.device, dtype=query.dtype)
    scores = scaling * (query @ key.mT) - slopes[:, None, None, None] * (positions[:, None] - positions).abs()
    if documents is None:
        documents = torch.zeros(length, dtype=torch.int64, device=query.device)
    documents = torch.nn.functional.pad(documents, (0, missing), value=-1).view(blocks, LOCAL)
    scores = scores.masked_fill(documents[:, :, None] != documents[:, None, :], -math.inf)
    return scores.logsumexp(dim=3).flatten(1)[:, :length]
