"""The tasks of GLUE (arXiv 1804.07461): labels, measures, sizes, and what its test server wants.

Law: label ids and column names are those of the Hub's nyu-mll/glue; the measures are scipy's and scikit-learn's.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

try:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
except ImportError as error:
    raise ImportError("evaluation.glue needs: pip install -e '.[evaluate]'") from error


@dataclass(frozen=True)
class Part:
    """A test set of a task, and the development set that goes with it.

    Attributes:
        name: Name of the file at the test server, without .tsv.
        dev_rows: Rows of GLUE's development set.
        test_rows: Rows that the server expects.
        suffix: End of the split names ("_matched").
        diagnostic: Whether it is a data set of its own with a test split only (AX, scored with the MNLI model).
    """

    name: str
    dev_rows: int
    test_rows: int
    suffix: str = ""
    diagnostic: bool = False


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        name: Its name at GLUE, and that of its local folder.
        config: Its name in the Hub's data set.
        columns: The text columns there, one or two.
        labels: Names of the labels by id, as there; none for regression.
        measures: Names in `MEASURES`; the score of the task is their mean.
        train_rows: Rows of GLUE's train split.
        parts: Its test sets; the first decides what is best.
        answers: What the server wants to read for each label id.
        starts_from_mnli: Whether fine-tuning starts from the encoder of the MNLI model (paper section 6.1).
    """

    name: str
    config: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    measures: tuple[str, ...]
    train_rows: int
    parts: tuple[Part, ...]
    answers: tuple[str, ...] = ("0", "1")
    starts_from_mnli: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return max(1, len(self.labels))


_NLI = ("entailment", "neutral", "contradiction")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_ACCURACY, _TWO = ("accuracy",), ("accuracy", "f1")
_MNLI_PARTS = (
    Part("MNLI-m", 9815, 9796, suffix="_matched"),
    Part("MNLI-mm", 9832, 9847, suffix="_mismatched"),
    Part("AX", 0, 1104, diagnostic=True),
)
# fmt: off
TASKS = {
    task.name: task
    for task in (  # MNLI first: others start from its model
        Task("MNLI", "mnli", ("premise", "hypothesis"), _NLI, _ACCURACY, 392_702, _MNLI_PARTS, _NLI),
        Task("QQP", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _TWO, 363_846,
             (Part("QQP", 40_430, 390_965),)),
        Task("QNLI", "qnli", ("question", "sentence"), _ENTAILMENT, _ACCURACY, 104_743,
             (Part("QNLI", 5463, 5463),), _ENTAILMENT),
        Task("SST-2", "sst2", ("sentence",), ("negative", "positive"), _ACCURACY, 67_349,
             (Part("SST-2", 872, 1821),)),
        Task("CoLA", "cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), 8551,
             (Part("CoLA", 1043, 1063),)),
        Task("STS-B", "stsb", _PAIR, (), ("pearson", "spearman"), 5749,
             (Part("STS-B", 1500, 1379),), starts_from_mnli=True),
        Task("MRPC", "mrpc", _PAIR, ("not_equivalent", "equivalent"), _TWO, 3668,
             (Part("MRPC", 408, 1725),), starts_from_mnli=True),
        Task("RTE", "rte", _PAIR, _ENTAILMENT, _ACCURACY, 2490,
             (Part("RTE", 277, 3000),), _ENTAILMENT, starts_from_mnli=True),
        Task("WNLI", "wnli", _PAIR, ("not_entailment", "entailment"), _ACCURACY, 635,
             (Part("WNLI", 71, 146),)),
    )
}
# fmt: on
LARGEST_SIMILARITY = 5.0  # of STS-B; the least is 0

MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": functools.partial(f1_score, zero_division=0.0),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: spearmanr(labels, predictions).statistic,
}


def decode(task: Task, logits: np.ndarray) -> np.ndarray:
    """Predictions from the outputs of a model.

    Args:
        task: Whose model it is.
        logits: `(rows, num_labels) float`.

    Returns:
        `(rows,)`: label ids, or similarities.
    """
    return logits[:, 0] if task.is_regression else logits.argmax(axis=1)


def measure(task: Task, predictions: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    """The measures of a task, as GLUE defines them.

    Args:
        task: The task.
        predictions: `(rows,)`, see `decode`.
        labels: The truth.

    Returns:
        The value of each of `task.measures`, -1 to 1. The correlation with a constant is 0, as sklearn's Matthews
        correlation with a constant is.

    Example:
        >>> measure(TASKS["MRPC"], np.array([1, 1, 1, 0]), [1, 1, 0, 0])
        {'accuracy': 0.75, 'f1': 0.8}
    """
    truth = np.asarray(labels)
    if task.is_regression and (np.ptp(predictions) == 0 or np.ptp(truth) == 0):
        return dict.fromkeys(task.measures, 0.0)
    return {name: float(MEASURES[name](truth, predictions)) for name in task.measures}


def task_score(measures: dict[str, float]) -> float:
    """The score of a task: the mean of its measures."""
    return sum(measures.values()) / len(measures)
