"""One system on one set: what is asked of it, and what is kept of its answers.

Law: everything that decides a score beside the system and the set is in the protocol, which the record carries.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from .classification import FOLDS, cross_validated, from_examples
from .clustering import BATCH, clusterings
from .metrics import TASK_MEASURES, retrieval_samples, scores
from .records import Samples
from .sets import EvaluationSet, PairSet, RetrievalSet, TextSet
from .systems import System

logger = logging.getLogger(__name__)

RETRIEVED = 100  # documents for each query
SEED = 42  # of mteb


@dataclass(frozen=True)
class Protocol:
    """How sets are scored.

    Attributes:
        max_texts: Sets with more queries, documents, pairs or texts are cut to a sample; None takes them whole.
        runs: Clusterings of a clustering set, and experiments of a classification set that has examples.
        samples_per_label: Examples that a classifier learns from.
    """

    max_texts: int | None = None
    runs: int = 10
    samples_per_label: int = 8

    def cut(self, dataset: EvaluationSet) -> EvaluationSet:
        """The set, or its sample."""
        return dataset if self.max_texts is None else dataset.cut(self.max_texts)

    def of(self, dataset: EvaluationSet) -> dict[str, Any]:
        """What decides the scores of this (uncut) set, for its record."""
        found: dict[str, Any] = {}
        if isinstance(dataset, RetrievalSet):
            found = {"retrieved": RETRIEVED}
        elif isinstance(dataset, TextSet) and dataset.task == "clustering":
            found = {"clusterings": self.runs, "seed": SEED, "batch": BATCH}
        elif isinstance(dataset, TextSet):
            way = {"experiments": self.runs} if dataset.example_texts else {"folds": FOLDS}
            found = {**way, "samples_per_label": self.samples_per_label, "seed": SEED}
        if self.cut(dataset) is not dataset:
            found |= {"max_texts": self.max_texts, "cut_from": dataset.sizes}
        return found


@dataclass(frozen=True)
class Scored:
    """The answers of a system.

    Attributes:
        metrics: Measure -> score, None where it is undefined.
        sizes: Of the set, what is odd about it, and how many of its texts the system truncated.
        samples: What the scores follow from; None where they are undefined.
    """

    metrics: dict[str, float | None]
    sizes: dict[str, int]
    samples: Samples | None


def score(system: System, dataset: EvaluationSet, protocol: Protocol) -> Scored:
    """Scores of one system on one set, which is already cut.

    Raises:
        EvaluationError: A vector of the system is not finite.
    """
    if isinstance(dataset, RetrievalSet):
        samples, truncated = _retrieval(system, dataset)
    elif isinstance(dataset, PairSet):
        samples, truncated = _similarity(system, dataset), {}
    else:
        samples, truncated = _texts(system, dataset, protocol)
    sizes = {**dataset.sizes, **dataset.oddities, **truncated}
    if samples is None:
        return Scored(dict.fromkeys(TASK_MEASURES[dataset.task]), sizes, None)
    found = scores(dataset.task, samples)
    if dataset.task == "pair-classification" and found["ap"] < samples["gold"].mean():
        logger.warning("%s on %s: worse than chance. Does label 1 mean alike there?", system.name, dataset.name)
    return Scored(found, sizes, samples)


def _retrieval(system: System, dataset: RetrievalSet) -> tuple[Samples, dict[str, int]]:
    identifiers = list(dataset.documents)
    found, truncated = system.rank(list(dataset.queries.values()), list(dataset.documents.values()), RETRIEVED)
    runs = {
        query: {identifiers[index]: value for index, value in run.items()}
        for query, run in zip(dataset.queries, found, strict=True)
    }
    return retrieval_samples(runs, dataset.qrels), {"truncated_documents": truncated}


def _similarity(system: System, dataset: PairSet) -> Samples | None:
    similarity = system.similarity(dataset.first, dataset.second)
    if similarity is None:
        return None
    if np.ptp(similarity) == 0 or len(set(dataset.scores)) == 1:
        logger.warning("%s on %s: all similarities are equal, no score.", system.name, dataset.name)
        return None
    kind = np.uint8 if dataset.task == "pair-classification" else np.float32
    return {"similarity": similarity.astype(np.float32), "gold": np.asarray(dataset.scores, dtype=kind)}


def _texts(system: System, dataset: TextSet, protocol: Protocol) -> tuple[Samples | None, dict[str, int]]:
    answer = system.vectors(dataset.texts)
    if answer is None:
        return None, {}
    vectors, truncated = answer
    number = {label: i for i, label in enumerate(sorted({*dataset.labels, *dataset.example_labels}))}
    gold = [number[label] for label in dataset.labels]
    if dataset.task == "clustering":
        assigned = clusterings(vectors, len(set(gold)), range(SEED, SEED + protocol.runs))
    elif dataset.example_texts:
        assigned = from_examples(
            lambda texts: system.vectors(texts)[0],
            vectors,
            dataset.example_texts,
            [number[label] for label in dataset.example_labels],
            samples_per_label=protocol.samples_per_label,
            experiments=protocol.runs,
            seed=SEED,
        )
    else:
        assigned = cross_validated(vectors, gold, samples_per_label=protocol.samples_per_label, seed=SEED)
    return {"assigned": assigned, "gold": np.asarray(gold, dtype=np.uint16)}, {"truncated_texts": truncated}
