"""The measures, each as a function of how often every item counts, which gives scores and resampled scores alike.

What is measured is kept item by item (`Samples`), for each task:

    retrieval             one array a measure `(queries,) float64`; "group" `(queries,) int32`, the document that
                          answers the query best: queries of one document are resampled together
    similarity            "similarity" and "gold", `(pairs,) float32`
    pair-classification   "similarity" `(pairs,) float32`, "gold" `(pairs,) uint8`, 1 for alike
    clustering            "assigned" `(runs, texts) uint16`, the cluster; "gold" `(texts,) uint16`, the label
    classification        "assigned" `(runs, texts) uint16`, the predicted label; "gold" as above

Laws: the measures are those of trec_eval (linear gain, ties broken by document id, descending), scipy and
scikit-learn, thresholds as in mteb; a weight of 2 is the same as the item twice.
"""

from collections.abc import Callable

import numpy as np

from .records import Samples

try:
    import pytrec_eval
    from scipy import sparse
except ImportError as error:
    raise ImportError("evaluation.metrics needs: pip install -e '.[evaluate]'") from error

CUTOFF = 10  # documents the retrieval measures look at
MEASURES = {
    f"ndcg_at_{CUTOFF}": f"nDCG@{CUTOFF}",
    f"mrr_at_{CUTOFF}": f"MRR@{CUTOFF}",
    f"map_at_{CUTOFF}": f"MAP@{CUTOFF}",
    f"recall_at_{CUTOFF}": f"recall@{CUTOFF}",
    "recall_at_100": "recall@100",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "ap": "average precision",
    "best_f1": "F1, best threshold",
    "best_accuracy": "accuracy, best threshold",
    "v_measure": "V-measure",
    "accuracy": "accuracy",
    "macro_f1": "F1, macro",
}
TASK_MEASURES = {  # the first is the one that MTEB ranks by
    "retrieval": tuple(MEASURES)[:5],
    "similarity": ("spearman", "pearson"),
    "pair-classification": ("ap", "best_f1", "best_accuracy"),
    "clustering": ("v_measure",),
    "classification": ("accuracy", "macro_f1"),
}
CORRELATIONS = TASK_MEASURES["similarity"]  # from -1 to 1; every other measure is from 0 to 1

# (weights `(resamples, items)`, weights of the runs `(resamples, runs)`) -> measure -> `(resamples,) float64`.
Statistic = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


def retrieval_samples(runs: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]]) -> Samples:
    """trec_eval's measures of each query, in the order of `qrels`; without a retrieved document all are 0.

    Args:
        runs: Query id -> {document id: score}.
        qrels: Query id -> {document id: relevance}; relevant from 1 on.
    """
    names = {f"ndcg_cut.{CUTOFF}", f"map_cut.{CUTOFF}", f"recall.{CUTOFF},100", "recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate({query: runs.get(query, {}) for query in qrels})
    queries = [found[query] for query in qrels]
    reciprocal = np.array([query["recip_rank"] for query in queries])
    best = [max(judged, key=judged.__getitem__) for judged in qrels.values()]
    samples = {
        f"ndcg_at_{CUTOFF}": [query[f"ndcg_cut_{CUTOFF}"] for query in queries],
        # trec_eval has no cut-off for the reciprocal rank: one below 1 / CUTOFF lies behind the cut.
        f"mrr_at_{CUTOFF}": np.where(reciprocal >= 1 / CUTOFF, reciprocal, 0.0),
        f"map_at_{CUTOFF}": [query[f"map_cut_{CUTOFF}"] for query in queries],
        f"recall_at_{CUTOFF}": [query[f"recall_{CUTOFF}"] for query in queries],
        "recall_at_100": [query["recall_100"] for query in queries],
    }
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in samples.items()}
    return arrays | {"group": np.unique(best, return_inverse=True)[1].astype(np.int32)}


def retrieval_scores(runs: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]]) -> dict[str, float]:
    """Means over the judged queries of `retrieval_samples`, 0 to 1."""
    return scores("retrieval", retrieval_samples(runs, qrels))


def items(samples: Samples) -> int:
    """How many queries, pairs or texts there are."""
    return len(samples["gold"] if "gold" in samples else samples["group"])


def runs(samples: Samples) -> int:
    """How many clusterings or classifiers there are; 1 for other tasks."""
    return len(samples["assigned"]) if "assigned" in samples else 1


def scores(task: str, samples: Samples) -> dict[str, float]:
    """The measures of a task, every item counted once.

    Example:
        >>> samples = {"similarity": np.array([0.1, 0.5, 0.3]), "gold": np.array([0.0, 1.0, 5.0])}
        >>> round(scores("similarity", samples)["spearman"], 12)
        0.5
    """
    found = statistic(task, samples)(np.ones((1, items(samples))), np.ones((1, runs(samples))))
    return {name: float(found[name][0]) for name in TASK_MEASURES[task]}


def statistic(task: str, samples: Samples) -> Statistic:
    """The measures of a task as a function of weights; NaN where a measure is undefined.

    Args:
        task: A key of `TASK_MEASURES`.
        samples: What was measured.

    Returns:
        The function; weights are whole numbers >= 0.
    """
    return {
        "retrieval": _means,
        "similarity": _correlations,
        "pair-classification": _thresholds,
        "clustering": _v_measure,
        "classification": _accuracies,
    }[task](samples)


def _means(samples: Samples) -> Statistic:
    names = TASK_MEASURES["retrieval"]
    values = np.stack([samples[name] for name in names], axis=1)  # (queries, measures)

    def of(weights: np.ndarray, _: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, (weights @ values / weights.sum(axis=1, keepdims=True)).T, strict=True))

    return of


class _Groups:
    """Items in ascending order of a value, those with the same value together.

    Args:
        values: `(items,)`.
    """

    def __init__(self, values: np.ndarray):
        self.order = np.argsort(values, kind="stable")
        new = np.diff(values[self.order], prepend=np.nan) != 0  # NaN differs: the first item starts a group
        self.starts = np.flatnonzero(new)
        self.of_item = np.empty(len(values), dtype=np.int64)
        self.of_item[self.order] = np.cumsum(new) - 1

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """`(resamples, items)` -> `(resamples, groups)`."""
        return np.add.reduceat(weights[:, self.order], self.starts, axis=1)

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """Rank of each item, that of ties the mean, in the sample that the weights make, `(resamples, items)`."""
        sums = self.sums(weights)
        return (np.cumsum(sums, axis=1) - sums + (sums + 1) / 2)[:, self.of_item]


def _pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted correlation of rows, `(resamples,)`; x and y `(resamples or 1, items)`."""
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    covariance, of_x, of_y = ((weights * a * b).sum(axis=1) for a, b in ((x, y), (x, x), (y, y)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return covariance / np.sqrt(of_x * of_y)


def _correlations(samples: Samples) -> Statistic:
    x, y = (samples[name].astype(np.float64) for name in ("similarity", "gold"))
    groups = _Groups(x), _Groups(y)

    def of(weights: np.ndarray, _: np.ndarray) -> dict[str, np.ndarray]:
        ranks = (group.ranks(weights) for group in groups)
        return {"spearman": _pearson(*ranks, weights), "pearson": _pearson(x[None], y[None], weights)}

    return of


def _thresholds(samples: Samples) -> Statistic:
    gold = samples["gold"].astype(np.float64)
    groups = _Groups(-samples["similarity"].astype(np.float64))  # the most alike first

    def of(weights: np.ndarray, _: np.ndarray) -> dict[str, np.ndarray]:
        count = weights.sum(axis=1, keepdims=True)
        positive = (weights @ gold)[:, None]
        hits = groups.sums(weights * gold)
        true, taken = np.cumsum(hits, axis=1), np.cumsum(groups.sums(weights), axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = (hits * np.where(taken > 0, true / taken, 0.0)).sum(axis=1) / positive[:, 0]
        # A threshold separates: taking every pair is none.
        true, taken = true[:, :-1], taken[:, :-1]
        return {
            "ap": precision,
            "best_f1": (2 * true / (taken + positive)).max(axis=1, initial=0.0),
            "best_accuracy": ((2 * true - taken + count - positive) / count).max(axis=1, initial=0.0),
        }

    return of


def _indicator(groups: np.ndarray) -> sparse.csr_matrix:
    """`(groups, items)`, 1 where the item is of the group: it sums weights by group."""
    numbers = np.unique(groups, return_inverse=True)[1]
    return sparse.csr_matrix((np.ones(len(groups)), (numbers, np.arange(len(groups)))))


def _entropy(indicator: sparse.csr_matrix, weights: np.ndarray) -> np.ndarray:
    """Entropy in nats of the groups, `(resamples,)`."""
    shares = (indicator @ weights.T) / weights.sum(axis=1)  # (groups, resamples)
    return -(shares * np.log(shares, where=shares > 0, out=np.zeros_like(shares))).sum(axis=0)


def _over_runs(values: list[np.ndarray], run_weights: np.ndarray) -> np.ndarray:
    return (np.stack(values, axis=1) * run_weights).sum(axis=1) / run_weights.sum(axis=1)


def _v_measure(samples: Samples) -> Statistic:
    gold, assigned = samples["gold"].astype(np.int64), samples["assigned"].astype(np.int64)
    labels = _indicator(gold)
    tables = [(_indicator(x), _indicator(x * (gold.max() + 1) + gold)) for x in assigned]

    def of(weights: np.ndarray, run_weights: np.ndarray) -> dict[str, np.ndarray]:
        of_labels, found = _entropy(labels, weights), []
        for clusters, cells in tables:
            total = of_labels + _entropy(clusters, weights)
            information = np.maximum(total - _entropy(cells, weights), 0.0)
            # One label and one cluster agree wholly.
            found.append(np.divide(2 * information, total, where=total > 0, out=np.ones_like(total)))
        return {"v_measure": _over_runs(found, run_weights)}

    return of


def _accuracies(samples: Samples) -> Statistic:
    gold, assigned = samples["gold"].astype(np.int64), samples["assigned"].astype(np.int64)
    kinds = range(int(max(gold.max(), assigned.max())) + 1)

    def by_label(labels: np.ndarray, correct: np.ndarray) -> sparse.csr_matrix:
        return sparse.csr_matrix((correct, (labels, np.arange(len(labels)))), shape=(len(kinds), len(labels)))

    of_gold = by_label(gold, np.ones(len(gold)))
    tables = [(by_label(x, np.ones(len(x))), by_label(gold, (x == gold).astype(np.float64))) for x in assigned]

    def of(weights: np.ndarray, run_weights: np.ndarray) -> dict[str, np.ndarray]:
        actual, accuracy, f1 = of_gold @ weights.T, [], []
        for of_predicted, of_true in tables:
            true, seen = of_true @ weights.T, actual + of_predicted @ weights.T  # (labels, resamples)
            accuracy.append(true.sum(axis=0) / weights.sum(axis=1))
            each = np.divide(2 * true, seen, where=seen > 0, out=np.zeros_like(seen))
            f1.append(each.sum(axis=0) / (seen > 0).sum(axis=0))
        return {"accuracy": _over_runs(accuracy, run_weights), "macro_f1": _over_runs(f1, run_weights)}

    return of
