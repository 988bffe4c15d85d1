"""How sure a score is, and whether two systems differ: paired bootstrap and paired permutation.

Resampled are the items (pairs, texts, or queries in groups of those that one document answers best: they are not
independent) and, where a score is a mean over clusterings or classifiers, these too. Two systems get the same draws.

Laws: an interval is the middle 95 % of the resampled scores, moved so that their mean is the score: a sample with
repetitions makes a V-measure greater, and its plain percentiles may miss the score. What the move carries beyond the
range of the measure (a nDCG of 1.003) is cut off there. The p-value of a mean over queries
is that of random signs of the differences of groups (two-sided), of any other measure that of the resampled
differences about their mean; the least is 1 / (resamples + 1).
COST: `RESAMPLES` x items x runs additions, in blocks of `BLOCK` weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .metrics import CORRELATIONS, TASK_MEASURES, items, runs, scores, statistic
from .records import Samples

RESAMPLES = 2000
PERMUTATIONS = 10_000
LEVEL = 95  # percent
BLOCK = 2**20  # weights in memory at a time

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """What another system has more than the first, in one measure.

    Attributes:
        value: The difference of the scores.
        interval: Of the difference; None where too many resamples leave the measure undefined.
        p: Probability of a difference as great if the two do not differ, two-sided.
    """

    value: float
    interval: Interval | None
    p: float


def resampled_weights(samples: Samples, *, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each item and each run is drawn, in `RESAMPLES` resamples.

    Args:
        samples: What was measured; its "group" says what is drawn together.
        seed: Of the draws; the same for two systems on the same set.

    Yields:
        Blocks of weights `(block, items)` and `(block, runs)`, float64.
    """
    generator = np.random.default_rng(seed)
    groups = samples.get("group", np.arange(items(samples)))
    size = max(1, BLOCK // len(groups))
    for start in range(0, RESAMPLES, size):
        block = min(size, RESAMPLES - start)
        weights = _drawn(generator, block, int(groups.max()) + 1)[:, groups]
        yield weights, _drawn(generator, block, runs(samples))


def _drawn(generator: np.random.Generator, block: int, count: int) -> np.ndarray:
    """`(block, count) float64`: of `count` things drawn `count` times with replacement, how often each is."""
    drawn = generator.integers(count, size=(block, count)) + count * np.arange(block)[:, None]
    return np.bincount(drawn.ravel(), minlength=block * count).reshape(block, count).astype(np.float64)


def resampled_scores(task: str, samples: Samples, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Measure -> its value in each resample, `(RESAMPLES,)`."""
    of = statistic(task, samples)
    blocks = [of(*weights) for weights in resampled_weights(samples, seed=seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in TASK_MEASURES[task]}


def bounds(measure: str) -> Interval:
    """The range of a measure."""
    return (-1.0, 1.0) if measure in CORRELATIONS else (0.0, 1.0)


def middle(resampled: np.ndarray, score: float, within: Interval) -> Interval | None:
    """The interval of a score from its resamples; None where more than half of them are undefined.

    Args:
        resampled: `(resamples,)`, NaN where undefined.
        score: On the whole sample.
        within: The range of the measure; the interval ends there at the latest.

    Example:
        >>> middle(np.arange(101.0), 60.0, (0.0, 100.0))
        (12.5, 100.0)
    """
    defined = resampled[np.isfinite(resampled)]
    if 2 * len(defined) < len(resampled):
        return None
    low, high = np.percentile(defined - defined.mean() + score, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(max(low, within[0])), float(min(high, within[1]))


def intervals(task: str, samples: Samples) -> dict[str, Interval | None]:
    """The interval of every measure of a task."""
    of_all = scores(task, samples)
    return {name: middle(x, of_all[name], bounds(name)) for name, x in resampled_scores(task, samples).items()}


def differences(task: str, first: Samples, second: Samples, *, seed: int = 0) -> dict[str, Difference]:
    """What `second` has more than `first`, measure by measure.

    Args:
        task: A key of `TASK_MEASURES`.
        first: Samples of the one system.
        second: Samples of the other, on the same items in the same order.
        seed: Of the draws.
    """
    of_first, of_second = scores(task, first), scores(task, second)
    drawn = [resampled_scores(task, samples, seed=seed) for samples in (first, second)]
    found = {}
    for name in TASK_MEASURES[task]:
        value = of_second[name] - of_first[name]
        resampled = drawn[1][name] - drawn[0][name]
        if task == "retrieval":
            p = permutation_p(second[name] - first[name], first["group"], seed=seed)
        else:
            defined = resampled[np.isfinite(resampled)]
            p = _share(np.abs(defined - defined.mean()), abs(value)) if len(defined) else 1.0
        low, high = bounds(name)
        found[name] = Difference(value, middle(resampled, value, (low - high, high - low)), p)
    return found


def permutation_p(differences: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference: the signs of whole groups are exchanged at random.

    Args:
        differences: `(queries,)`, second minus first.
        groups: `(queries,) int`, the group of each query.
        seed: Of the signs.

    Example:
        >>> permutation_p(np.array([0.5, -0.5, 0.0]), np.array([0, 1, 2]))
        1.0
    """
    sums = np.bincount(groups, weights=differences)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    generator = np.random.default_rng(seed)
    size = max(1, BLOCK // len(sums))
    totals = [
        generator.choice(np.array([-1.0, 1.0]), size=(min(size, PERMUTATIONS - start), len(sums))) @ sums
        for start in range(0, PERMUTATIONS, size)
    ]
    return _share(np.abs(np.concatenate(totals)), abs(sums.sum()))


def _share(chance: np.ndarray, observed: float) -> float:
    """Share of the values that are as great as the observed one, which counts as one of them."""
    return float((1 + (chance >= observed - 1e-12).sum()) / (1 + len(chance)))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for that many comparisons (Holm 1979), in their order.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(values, kind="stable")
    raised = np.array(values, dtype=np.float64)[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted.tolist()
