"""Retrieval and sentence similarity on local files, for embedding models and BM25.

    python -m evaluation.local --model hub_repo/tiny --data DATA --baseline bm25 --output results.json

Laws: everything wrong with names and files is reported before the first text is embedded; a score already in the
output, of the same set, model, weights and settings, is not computed again. The measures are trec_eval's (linear gain,
ties broken by document id, descending) and scipy's.
COST: all sets and models of a run are held in memory.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .sets import EvaluationError, PairSet, RetrievalSet, available_sets, load_set
from .systems import System, load_system

try:
    import pytrec_eval
    from rich.console import Console
    from rich.table import Table
    from scipy.stats import spearmanr
except ImportError as error:
    raise ImportError("evaluation.local needs: pip install 'modeling-jina-bert[evaluate]'") from error

logger = logging.getLogger(__name__)

RETRIEVED = 100  # documents for each query
CUTOFF = 10  # documents the retrieval measures look at
MEASURES = {
    f"ndcg_at_{CUTOFF}": f"nDCG@{CUTOFF}",
    f"mrr_at_{CUTOFF}": f"MRR@{CUTOFF}",
    f"recall_at_{CUTOFF}": f"recall@{CUTOFF}",
    "spearman": "Spearman",
}
_PACKAGES = ("torch", "transformers", "sentence-transformers", "numpy", "scipy", "bm25s", "pytrec-eval-terrier")


def retrieval_scores(runs: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]]) -> dict[str, float]:
    """Means over the judged queries of trec_eval's measures; a query without a retrieved document counts 0.

    Args:
        runs: Query id -> {document id: score}.
        qrels: Query id -> {document id: relevance}; relevant from 1 on.

    Returns:
        The retrieval measures, 0 to 1.
    """
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{CUTOFF}", f"recall.{CUTOFF}", "recip_rank"})
    queries = evaluator.evaluate({query: runs.get(query, {}) for query in qrels}).values()
    # trec_eval has no cut-off for the reciprocal rank: one below 1 / CUTOFF lies behind the cut.
    reciprocal = [query["recip_rank"] if query["recip_rank"] >= 1 / CUTOFF else 0.0 for query in queries]
    return {
        f"ndcg_at_{CUTOFF}": float(np.mean([query[f"ndcg_cut_{CUTOFF}"] for query in queries])),
        f"mrr_at_{CUTOFF}": float(np.mean(reciprocal)),
        f"recall_at_{CUTOFF}": float(np.mean([query[f"recall_{CUTOFF}"] for query in queries])),
    }


def score(system: System, dataset: RetrievalSet | PairSet) -> dict[str, Any]:
    """Scores of one system on one set, with the sizes of the set; `spearman` is None where it is undefined."""
    if isinstance(dataset, PairSet):
        similarity = system.similarity(dataset.first, dataset.second)
        if similarity is not None and (np.ptp(similarity) == 0 or np.ptp(dataset.scores) == 0):
            logger.warning("%s on %s: all similarities are equal, no correlation.", system.name, dataset.name)
            similarity = None
        spearman = None if similarity is None else float(spearmanr(similarity, dataset.scores).statistic)
        return {"metrics": {"spearman": spearman}, "sizes": dataset.sizes}
    document_ids = list(dataset.documents)
    found, truncated = system.rank(list(dataset.queries.values()), list(dataset.documents.values()), RETRIEVED)
    runs = {
        query: {document_ids[index]: value for index, value in run.items()}
        for query, run in zip(dataset.queries, found, strict=True)
    }
    sizes = {**dataset.sizes, "truncated_documents": truncated}
    return {"metrics": retrieval_scores(runs, dataset.qrels), "sizes": sizes}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the scores."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run; none if there is no such file.

    Raises:
        EvaluationError: The file is not one of ours.
    """
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        if not all({"model", "set", "settings", "metrics", "sizes"} <= set(record) for record in records):
            raise KeyError("model, set, settings, metrics or sizes")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            f"--output {path}: exists and holds no results of this program; name another file."
        ) from error
    return records


def write_records(path: Path, records: list[dict[str, Any]]):
    """Replaces the file at once, so that an interrupted run leaves a whole one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"records": records}, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def evaluate(
    systems: Sequence[System],
    datasets: Sequence[RetrievalSet | PairSet],
    output: Path,
    *,
    command: str,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Scores every system on every set, and writes `output` after each.

    Args:
        systems: What to evaluate.
        datasets: On what.
        output: JSON file; records of other systems, settings and sets in it are kept.
        command: Command line, for the records.
        force: Compute scores again that `output` has.

    Returns:
        The records of `systems` x `datasets`, set by set.

    Raises:
        EvaluationError: `output` holds something else.
        ValueError: A vector with NaN or infinity.
    """
    records = read_records(output)
    provenance = {"versions": versions(), "command": command}
    settings = [system.settings for system in systems]
    results = []
    for dataset in datasets:
        for system, its_settings in zip(systems, settings, strict=True):
            key = {"model": system.name, "set": dataset.name, "settings": its_settings}
            known = [record for record in records if key.items() <= record.items()]
            if known and not force:
                logger.info("%s on %s: already scored", system.name, dataset.name)
                results.append(known[0])
                continue
            record = {**key, **score(system, dataset), **provenance}
            records = [other for other in records if other not in known] + [record]
            write_records(output, records)
            results.append(record)
            logger.info("%s on %s: %s", system.name, dataset.name, record["metrics"])
    return results


def table_rows(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """One row a set and measure, one column a system.

    Args:
        records: What `evaluate` returns.

    Returns:
        The header, and the rows: set, its size, measure, scores to four decimals ("-": undefined).
    """
    systems: list[tuple[str, Any]] = []
    for record in records:
        if _column(record) not in systems:
            systems.append(_column(record))
    header = ["set", "queries x documents", "measure"] + [
        name if limit is None else f"{name} ({limit} tokens)" for name, limit in systems
    ]
    cells: dict[tuple[str, str, str], dict[tuple[str, Any], str]] = {}
    for record in records:
        sizes = record["sizes"]
        size = f"{sizes['pairs']} pairs" if "pairs" in sizes else f"{sizes['queries']} x {sizes['documents']}"
        for measure, value in record["metrics"].items():
            row = cells.setdefault((record["set"], size, MEASURES[measure]), {})
            row[_column(record)] = "-" if value is None else f"{value:.4f}"
    return header, [[*row, *(scores.get(system, "") for system in systems)] for row, scores in cells.items()]


def _column(record: dict[str, Any]) -> tuple[str, int | None]:
    return record["model"], record["settings"].get("max_length")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """The table in Markdown, the scores aligned to the right.

    Example:
        >>> print(markdown_table(["set", "size", "measure", "bm25"], [["ir/A", "9 x 70", "MRR@10", "0.5"]]), end="")
        | set | size | measure | bm25 |
        |---|---|---|---:|
        | ir/A | 9 x 70 | MRR@10 | 0.5 |
    """
    rule = "|" + "---|" * 3 + "---:|" * (len(header) - 3)
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def print_table(header: list[str], rows: list[list[str]]):
    """Prints the table; set and size once for the measures of a set."""
    table = Table()
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position < 3 else "right", overflow="fold")
    previous = None
    for row in rows:
        if previous is not None and row[0] != previous:
            table.add_section()
        table.add_row(*(["", "", *row[2:]] if row[0] == previous else row))
        previous = row[0]
    Console().print(table)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for an unknown option."""
    parser = argparse.ArgumentParser(prog="evaluation.local", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="sentence-transformers folder or Hub repository")
    parser.add_argument(
        "--baseline", action="append", default=[], help="bm25, all-MiniLM-L6-v2, or as --model; repeatable"
    )
    parser.add_argument("--data", required=True, type=Path, help="folder that has eval/")
    parser.add_argument("--sets", nargs="+", help="names, separated by commas or spaces (default: all there are)")
    parser.add_argument("--output", required=True, type=Path, help="JSON file; a run goes on from what it holds")
    parser.add_argument("--markdown", type=Path, help="file for the table in Markdown")
    parser.add_argument("--max-length", type=int, help="tokens a text is cut at (default: the model's own limit)")
    parser.add_argument("--force", action="store_true", help="compute scores again that the output has")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, *, command: str) -> list[dict[str, Any]]:
    """Loads what the command line names and evaluates it.

    Raises:
        EvaluationError: Something it names is missing or malformed.
    """
    if arguments.model is None and not arguments.baseline:
        raise EvaluationError("nothing to evaluate: give --model, --baseline, or both.")
    if arguments.max_length is not None and arguments.max_length < 3:
        raise EvaluationError(
            f"--max-length {arguments.max_length}: the least is 3 tokens ([CLS], one of the text, [SEP])."
        )
    for path in filter(None, (arguments.output, arguments.markdown)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise EvaluationError(f"{path}: is a folder, or lies in none.")
    read_records(arguments.output)
    names = [name for item in arguments.sets for name in item.split(",") if name] if arguments.sets else None
    datasets = [load_set(arguments.data, name) for name in dict.fromkeys(names or available_sets(arguments.data))]
    if not datasets:
        raise EvaluationError(f"--data {arguments.data}: no sets in its folder eval.")
    systems = [load_system(arguments.model, max_length=arguments.max_length)] if arguments.model else []
    for name in dict.fromkeys(arguments.baseline):
        if name != arguments.model:
            systems.append(load_system(name, max_length=arguments.max_length, baseline=True))
    return evaluate(systems, datasets, arguments.output, command=command, force=arguments.force)


def main(argv: Sequence[str] | None = None):
    """Entry point; a wrong input ends it with one line and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    arguments = parse_arguments(argv)
    try:
        records = run(arguments, command=shlex.join(["python", "-m", "evaluation.local", *argv]))
    except (EvaluationError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    header, rows = table_rows(records)
    print_table(header, rows)
    if arguments.markdown:
        arguments.markdown.write_text(markdown_table(header, rows), encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
