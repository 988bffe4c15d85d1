"""Is one vector of a long document worth it, and for what? Sweeps over the maximum length, chunking beside them.

    python -m evaluation.long_documents --model hub_repo/tiny --baseline all-MiniLM-L6-v2 --data DATA \
        --sets 'long/*' clustering/MovieReviews --output FOLDER
    python -m evaluation.long_documents --model jinaai/jina-embeddings-v2-small-en --sets long loco LongEmbed \
        --lengths 128 512 2048 8191 --output FOLDER

Sets are local ones (ir/, long/, clustering/ under DATA/eval, with patterns), or tasks and benchmarks of mteb and LoCo
by name, whose data come from the Hub. The ways in which a document becomes vectors are those of
`evaluation.document_vectors`. FOLDER/records.json has every score with its interval and what decided it,
FOLDER/records.npz the scores query by query, FOLDER/table.md the answer, FOLDER/sweep.png the figure.

Laws: all ways of a set see the same documents and queries, so that differences are paired; queries of one document are
resampled together. A score that the folder has, of the same set, model and settings, is not computed again.
Retrieval is nDCG@10; clustering the V-measure of mini-batch k-means, the mean over `SEEDS`.
NOTE: a sample of documents makes retrieval easier; records and table say how many of how many.
"""

import argparse
import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from .clustering import clusterings
from .command_line import placement_of
from .document_vectors import (
    ONE_VECTOR,
    DocumentVectors,
    Reader,
    Way,
    document_vectors,
    load_readers,
    ways_of,
)
from .late_chunking import rank
from .long_report import markdown, write_figure
from .metrics import TASK_MEASURES, retrieval_samples, scores
from .reader_runs import Answer, Store, check_readers, reader_parser, run_command
from .records import Samples, versions
from .set_types import chosen
from .sets import EvaluationError, RetrievalSet, TextSet, available_sets, load_set
from .significance import intervals

logger = logging.getLogger(__name__)

ANSWER = Answer(
    records="records.json", table="table.md", figure="sweep.png", markdown=markdown, write_figure=write_figure
)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHUNKS = (256,)
SEEDS = range(5)  # of k-means
_COUNT_BLOCK = 64  # texts tokenized at a time

Dataset = RetrievalSet | TextSet


def sample(dataset: Dataset, documents: int | None) -> Dataset:
    """A set with so many of its documents, the same ones every time; all queries that one of them answers stay.

    Args:
        dataset: The set.
        documents: How many; None or more than there are: all.

    Raises:
        EvaluationError: No query, or only one label, is left.
    """
    if isinstance(dataset, TextSet):
        return dataset if documents is None else dataset.cut(documents)
    if documents is None or documents >= len(dataset.documents):
        return dataset
    names = list(dataset.documents)
    kept = {names[index]: dataset.documents[names[index]] for index in chosen(len(names), documents)}
    qrels = {query: {d: grade for d, grade in found.items() if d in kept} for query, found in dataset.qrels.items()}
    qrels = {query: found for query, found in qrels.items() if any(grade > 0 for grade in found.values())}
    if not qrels:
        raise EvaluationError(f"--documents {documents}: {dataset.name} keeps no query.")
    return replace(dataset, documents=kept, qrels=qrels, queries={query: dataset.queries[query] for query in qrels})


def load_sets(names: Sequence[str], data: Path | None) -> list[Dataset]:
    """Sets by name, none twice.

    Args:
        names: Local sets or patterns of them ("long/*"), tasks or benchmarks of `evaluation.mteb_tasks`.
        data: Folder that has eval/.

    Raises:
        EvaluationError: An unknown name; a set of another kind; data that cannot be had.
    """
    found: dict[str, Dataset] = {}
    for name in names:
        for dataset in _local(name, data) if "/" in name else _of_mteb(name):
            if not isinstance(dataset, RetrievalSet | TextSet):
                raise EvaluationError(f"--sets {name}: is no retrieval or clustering set.")
            found.setdefault(dataset.name, dataset)
    return list(found.values())


def _local(name: str, data: Path | None) -> list[Any]:
    if data is None:
        raise EvaluationError(f"--sets {name}: is a local set, say with --data where the sets are.")
    matching = fnmatch.filter(available_sets(data), name)
    return [load_set(data, each) for each in matching or [name]]


def _of_mteb(name: str) -> list[Any]:
    from .mteb_tasks import select_tasks, sets_of  # mteb takes seconds to import, and local sets do not need it

    return [dataset for task in select_tasks([name]) for dataset in sets_of(task)]


def documents_of(dataset: Dataset) -> list[str]:
    """The texts that are long: the documents that queries ask for, or those that are clustered."""
    return list(dataset.documents.values()) if isinstance(dataset, RetrievalSet) else dataset.texts


def score_retrieval(queries: np.ndarray, found: DocumentVectors, dataset: RetrievalSet) -> Samples:
    """The retrieval measures of every query, a document scoring by its best vector; see `evaluation.metrics`.

    Args:
        queries: `(queries, hidden) float32` of length 1.
        found: The vectors of the documents, in the order of the set.
        dataset: The set.
    """
    runs = rank(queries, found.vectors, list(dataset.documents), found.first)
    return retrieval_samples(dict(zip(dataset.queries, runs, strict=True)), dataset.qrels)


def score_clustering(vectors: np.ndarray, dataset: TextSet) -> Samples:
    """The clusters of every text, once for each of `SEEDS`; see `evaluation.metrics`."""
    gold = np.unique(dataset.labels, return_inverse=True)[1].astype(np.uint16)
    return {"assigned": clusterings(vectors, len(set(dataset.labels)), SEEDS), "gold": gold}


def document_tokens(reader: Reader, texts: Sequence[str]) -> np.ndarray:
    """`(texts,) int64`: tokens of each text, special tokens included."""
    lengths = []
    for start in range(0, len(texts), _COUNT_BLOCK):
        block = list(texts[start : start + _COUNT_BLOCK])
        lengths += map(len, reader.tokenizer(block, truncation=False, verbose=False)["input_ids"])
    return np.array(lengths)


def sizes_of(dataset: Dataset, tokens: np.ndarray) -> dict[str, Any]:
    """Sizes of a set and the lengths of its documents in tokens."""
    return {
        **dataset.sizes,
        "documents": len(tokens),
        "median_tokens": int(np.median(tokens)),
        "longest_tokens": int(tokens.max()),
    }


def useful_ways(ways: Sequence[Way], task: str, longest: int) -> list[Way]:
    """Leaves out what a set cannot tell apart: lengths beyond the first that holds every document, and for clustering
    the kinds that give a document several vectors.

    Example:
        >>> ways = [Way("whole", 512), Way("whole", 1024), Way("whole", 2048), Way("best", 64)]
        >>> [way.tokens for way in useful_ways(ways, "clustering", 600)]
        [512, 1024]
    """
    enough = min((way.tokens for way in ways if way.kind == "whole" and way.tokens >= longest), default=None)
    kinds = ONE_VECTOR if task == "clustering" else ("whole", "mean", "best", "late")
    return [way for way in ways if way.kind in kinds and not (way.kind == "whole" and enough and way.tokens > enough)]


def evaluate(reader: Reader, datasets: Sequence[tuple[Dataset, int]], ways: Sequence[Way], store: Store, command: str):
    """Scores the ways of one model that the store has not, and adds each as soon as it is scored.

    Args:
        reader: The model.
        datasets: Sets of one task with the same documents, already sampled, which are embedded once for all of them;
            and how many documents each has unsampled, for the records.
        ways: See `evaluation.document_vectors`.
        store: Where scores go.
        command: Command line, for the records.
    """
    texts, task = documents_of(datasets[0][0]), datasets[0][0].task
    tokens = document_tokens(reader, texts)
    missing: dict[Way, list[tuple[Dataset, dict]]] = {}
    for way in useful_ways(ways, task, int(tokens.max())):
        for dataset, of_documents in datasets:
            settings = {**asdict(way), **reader.settings, "set_sha256": dataset.sha256}
            key = {"model": reader.name, "set": dataset.name, "settings": settings}
            if store.find(key) is None:
                sizes = {**sizes_of(dataset, tokens), "of_documents": of_documents}
                missing.setdefault(way, []).append((dataset, {**key, "task": task, "sizes": sizes}))
    queries = {
        dataset.name: reader.queries(list(dataset.queries.values()))
        for dataset in {id(dataset): dataset for rows in missing.values() for dataset, _ in rows}.values()
        if isinstance(dataset, RetrievalSet)
    }
    for way, found in document_vectors(reader, texts, list(missing)):
        for dataset, record in missing[way]:
            if isinstance(dataset, RetrievalSet):
                samples = score_retrieval(queries[dataset.name], found, dataset)
            else:
                samples = score_clustering(found.vectors, dataset)
            store.add({**scored(record, samples, len(found.vectors), command), **reader.placed}, samples)


def scored(record: dict[str, Any], samples: Samples, vectors: int, command: str) -> dict[str, Any]:
    """A record with its score and interval, and with what it was computed by."""
    task = record["task"]
    measure = TASK_MEASURES[task][0]
    metrics = {measure: scores(task, samples)[measure], "interval_95": intervals(task, samples)[measure]}
    settings = record["settings"]
    logger.info(
        "%s on %s, %s %s: %.4f",
        record["model"], record["set"], settings["kind"], f"{settings['tokens']:,}", metrics[measure],
    )  # fmt: skip
    sizes = {**record["sizes"], "vectors": vectors}
    return {**record, "metrics": metrics, "sizes": sizes, "versions": versions(), "command": command}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for an unknown option."""
    parser = reader_parser("evaluation.long_documents", __doc__)
    parser.add_argument("--data", type=Path, help="folder that has eval/, for local sets")
    parser.add_argument("--sets", required=True, nargs="+", help="local sets ('long/*'), tasks of mteb, long, loco")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens read of a document")
    parser.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS), help="tokens of a chunk")
    parser.add_argument("--documents", type=int, help="documents of a set at most, a random sample (default: all)")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace):
    """Raises `EvaluationError` for numbers and paths that cannot be meant."""
    check_readers(arguments)
    for option, least in (("lengths", 3), ("chunks", 1)):
        for value in getattr(arguments, option):
            if value < least:
                raise EvaluationError(f"--{option} {value}: the least is {least}.")
    if arguments.documents is not None and arguments.documents < 2:
        raise EvaluationError(f"--documents {arguments.documents}: the least is 2.")


def run(arguments: argparse.Namespace, *, command: str) -> Store:
    """Loads what the command line names, and scores it set by set.

    Raises:
        EvaluationError: Something it names is missing or malformed.
    """
    check(arguments)
    placement = placement_of(arguments)
    store = ANSWER.store(arguments.output)
    datasets = load_sets(arguments.sets, arguments.data)
    sampled = [sample(dataset, arguments.documents) for dataset in datasets]
    readers = load_readers(arguments.model, arguments.baseline, placement)
    together: dict[tuple[str, ...], list[tuple[Dataset, int]]] = {}
    for whole, dataset in zip(datasets, sampled, strict=True):
        key = (dataset.task, *documents_of(dataset))
        together.setdefault(key, []).append((dataset, len(documents_of(whole))))
    for group in together.values():
        for reader in readers:
            evaluate(reader, group, ways_of(reader, arguments.lengths, arguments.chunks), store, command)
    return store


def main(argv: Sequence[str] | None = None):
    """Entry point; it ends as `evaluation.command_line` says."""
    run_command(argv, module="evaluation.long_documents", logger=logger, parse=parse_arguments, run=run, answer=ANSWER)


if __name__ == "__main__":
    main()
