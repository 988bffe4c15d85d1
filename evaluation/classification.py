"""Classification as MTEB (arXiv 2210.07316) does it: logistic regression on the vectors of a few texts of each label.

With a file of examples, every experiment draws its own; without one, the texts are split into `FOLDS` parts, and
each part is predicted from examples out of the others.

Law: the draws are those of `mteb.abstasks.AbsTaskClassification` with the same seed, so that scores can be compared.
COST: only the examples that some experiment draws are embedded.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

try:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold
except ImportError as error:
    raise ImportError("evaluation.classification needs: pip install -e '.[evaluate]'") from error

FOLDS = 5
ITERATIONS = 100  # of the optimiser, as in mteb: a part of the protocol, converged or not


def draws(labels: Sequence[int], samples_per_label: int, experiments: int, *, seed: int) -> list[list[int]]:
    """For each experiment the positions of at most `samples_per_label` texts of each label.

    Args:
        labels: Label of each text.
        samples_per_label: Texts; fewer where a label has no more.
        experiments: How many.
        seed: Of all experiments: each shuffles the order of the one before in the same way, as mteb does.

    Example:
        >>> [len(draw) for draw in draws([0, 1, 1, 1], 2, 3, seed=42)]
        [3, 3, 3]
    """
    order, found = list(range(len(labels))), []
    for _ in range(experiments):
        order, drawn = _draw(labels, order, samples_per_label, seed=seed)
        found.append(drawn)
    return found


def _draw(
    labels: Sequence[int], order: list[int], samples_per_label: int, *, seed: int
) -> tuple[list[int], list[int]]:
    """The order shuffled, and the first texts of each label in it."""
    order = list(order)
    np.random.RandomState(seed).shuffle(order)
    count: Counter[int] = Counter()
    drawn = []
    for position in order:
        if count[labels[position]] < samples_per_label:
            drawn.append(position)
            count[labels[position]] += 1
    return order, drawn


def predictions(examples: np.ndarray, labels: Sequence[int], vectors: np.ndarray, *, seed: int) -> np.ndarray:
    """Labels that a logistic regression on the examples gives to the vectors, `(texts,) uint16`.

    Args:
        examples: `(examples, hidden) float32`.
        labels: Label of each example; two kinds at least.
        vectors: `(texts, hidden) float32`.
        seed: Of the optimiser.
    """
    model = LogisticRegression(max_iter=ITERATIONS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(examples, labels).predict(vectors).astype(np.uint16)


def from_examples(
    embed: Callable[[list[str]], np.ndarray],
    vectors: np.ndarray,
    example_texts: Sequence[str],
    example_labels: Sequence[int],
    *,
    samples_per_label: int,
    experiments: int,
    seed: int,
) -> np.ndarray:
    """Predictions of every experiment, `(experiments, texts) uint16`.

    Args:
        embed: Texts -> `(texts, hidden) float32`, for the examples that are drawn.
        vectors: `(texts, hidden) float32`, of the texts that are predicted.
        example_texts: Texts to draw from.
        example_labels: Label of each.
        samples_per_label: See `draws`.
        experiments: See `draws`.
        seed: Of the draws and of the optimiser.
    """
    drawn = draws(example_labels, samples_per_label, experiments, seed=seed)
    needed = sorted(set().union(*drawn))
    found = embed([example_texts[i] for i in needed])
    place = {i: row for row, i in enumerate(needed)}
    return np.stack(
        [
            predictions(found[[place[i] for i in draw]], [example_labels[i] for i in draw], vectors, seed=seed)
            for draw in drawn
        ]
    )


def cross_validated(vectors: np.ndarray, labels: Sequence[int], *, samples_per_label: int, seed: int) -> np.ndarray:
    """Each text predicted from examples of the other parts, `(1, texts) uint16`.

    Args:
        vectors: `(texts, hidden) float32`.
        labels: Label of each.
        samples_per_label: See `draws`.
        seed: Of the parts, the draws and the optimiser.
    """
    labels = np.asarray(labels)
    found = np.empty((1, len(labels)), dtype=np.uint16)
    order: list[int] = []
    for train, test in KFold(FOLDS, shuffle=True, random_state=seed).split(labels):
        order, drawn = _draw(labels[train], order or list(range(len(train))), samples_per_label, seed=seed)
        chosen = train[drawn]
        found[0, test] = predictions(vectors[chosen], labels[chosen], vectors[test], seed=seed)
    return found
