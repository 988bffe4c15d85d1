"""Runs MTEB: the paper's 56 English tasks, any other task or benchmark, LoCo, or local sets; resumable.

    python -m evaluation.mteb_run --model hub_repo/tiny --tasks paper --output FOLDER
    python -m evaluation.mteb_run --model jinaai/jina-embeddings-v2-small-en --tasks long loco \
        --max-length 128 512 2048 8192 --output FOLDER

FOLDER/results is mteb's own format (MODEL/REVISION/TASK.json with model_meta.json and run_settings.jsonl, another
maximum length under experiments/), which `mteb submit-results --output-folder FOLDER` takes: for the leaderboard
evaluate the model on the Hub by its name, so that its revision is a commit. FOLDER/scores.json holds what decides
each score: maximum length, dtype, revision, weights, normalisation, versions, command. FOLDER/table.md is the paper's
table.

Laws: a task that has a result of the same model, settings and data is not run again; a result that an interruption
broke, or of other data, is. A task that fails does not stop the others; it is named at the end, with exit status 1.
"""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .command_line import ending
from .loading import DTYPES
from .mteb_model import NORMALIZE, TextEncoder, mteb_name
from .mteb_tasks import (
    CATEGORIES,
    LOCO,
    PAPER,
    PUBLISHED,
    PUBLISHED_LENGTHS,
    load_task,
    mteb_names,
    paper_tasks,
    select_tasks,
)
from .mteb_training import TINY, Training
from .records import read_records, versions, write_records
from .sets import EvaluationError

try:
    import mteb
    from mteb.abstasks import AbsTask
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.cache import ResultCache
    from mteb.results import TaskResult
except ImportError as error:
    raise ImportError("evaluation.mteb_run needs: pip install -e '.[evaluate,mteb]'") from error

logger = logging.getLogger(__name__)

SCORES, TABLE = "scores.json", "table.md"
_ANY_REVISION = "main"  # of a task whose data are loaded as they are on the Hub now


def known_result(cache: ResultCache, task: AbsTask, encoder: TextEncoder) -> TaskResult | None:
    """The result of an earlier run, if it is whole and of the data that the task has now.

    mteb itself goes by the splits alone: it takes a result of another revision of the data for this one's.
    """
    try:
        result = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
    except ValueError as error:  # json's and pydantic's errors are ValueErrors
        logger.warning("%s: the result in %s is broken, run again (%s).", task.metadata.name, cache.cache_path, error)
        return None
    if result is None or result.get_missing_evaluations(task):
        return None
    revision = task.metadata.revision
    if revision not in (_ANY_REVISION, result.dataset_revision):
        logger.warning("%s: result of other data (%s), run again.", task.metadata.name, result.dataset_revision)
        return None
    return result


def run_task(cache: ResultCache, task: AbsTask, encoder: TextEncoder, *, force: bool = False) -> TaskResult:
    """The result of one task, from `cache` or computed.

    Raises:
        EvaluationError: Its data cannot be had.
        ValueError: A vector with NaN or infinity.
    """
    known = None if force else known_result(cache, task, encoder)
    if known is not None:
        logger.info("%s: already scored", task.metadata.name)
        return known
    encoder.texts.pop(task.metadata.name, None)
    encoder.truncated.pop(task.metadata.name, None)
    loaded = task.data_loaded
    if not isinstance(task, AbsTaskAggregate):  # its parts are loaded one by one
        load_task(task)
    (result,) = mteb.evaluate(
        encoder,
        task,
        cache=cache,
        co2_tracker=False,
        overwrite_strategy="always" if force or _unusable(cache, task, encoder) else "only-missing",
        encode_kwargs={"batch_size": 32, "show_progress_bar": sys.stderr.isatty()},
        show_progress_bar=False,
    ).task_results
    if task.data_loaded and not loaded:
        task.unload_data()
    return result


def _unusable(cache: ResultCache, task: AbsTask, encoder: TextEncoder) -> bool:
    """Whether mteb would stumble over a broken file, or take a result of other data for one of these."""
    try:
        result = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
    except ValueError:
        return True
    return result is not None and result.dataset_revision != task.metadata.revision


def record_of(result: TaskResult, task: AbsTask, encoder: TextEncoder, command: str) -> dict[str, Any]:
    """What is kept beside a score; sizes are those of the run that computed it."""
    name = task.metadata.name
    sizes = {"texts": encoder.texts[name], "truncated_texts": encoder.truncated[name]}
    return {
        "model": encoder.mteb_model_meta.name,
        "set": name,
        "settings": encoder.settings,
        "metrics": {task.metadata.main_score: float(result.get_score())},
        "sizes": sizes if encoder.texts[name] else {},
        "type": task.metadata.type,
        "dataset_revision": result.dataset_revision,
        "versions": {**versions(), "mteb": mteb.__version__},
        "command": command,
    }


def evaluate(
    encoder: TextEncoder, tasks: Sequence[AbsTask], output: Path, *, command: str, force: bool = False
) -> list[str]:
    """Runs tasks, and writes mteb's results and `SCORES` after each.

    Returns:
        One line for each task that failed.
    """
    cache = ResultCache(cache_path=output)
    failures = []
    for task in tasks:
        name = task.metadata.name
        try:
            result = run_task(cache, task, encoder, force=force)
        except (EvaluationError, ValueError, OSError, RuntimeError) as error:
            failures.append(f"{name}: {' '.join(str(error).removeprefix(f'{name}: ').split())}")
            logger.error("%s", failures[-1])
            continue
        if not np.isfinite(result.get_score()):
            failures.append(f"{name}: the score is {result.get_score()}.")
            continue
        record = record_of(result, task, encoder, command)
        records = read_records(output / SCORES)
        same = [r for r in records if all(r[key] == record[key] for key in ("model", "set", "settings"))]
        # A score read again from mteb's file is rounded there, and its sizes are those of the run that computed it.
        if not (same and not record["sizes"] and abs(_score(same[0]) - _score(record)) < 1e-6):
            write_records(output / SCORES, [r for r in records if r not in same] + [record])
        logger.info("%s at %s tokens: %s", name, encoder.settings["max_length"], record["metrics"])
    return failures


def category_means(scores: dict[str, float]) -> dict[str, tuple[float, int, int]]:
    """The paper's columns.

    Args:
        scores: Task -> main score, 0 to 1.

    Returns:
        Column -> mean of the tasks there are in percent, their number, and the number that the paper has; "average"
        is over tasks, not over columns. Columns without a task are left out.
    """
    found: dict[str, tuple[float, int, int]] = {}
    tasks = {name: CATEGORIES[task.metadata.type] for name, task in paper_tasks().items()}
    for column in (*CATEGORIES.values(), "average"):
        members = [name for name, of in tasks.items() if column in (of, "average")]
        values = [100 * scores[name] for name in members if name in scores]
        if values:
            found[column] = (float(np.mean(values)), len(values), len(members))
    return found


def _score(record: dict[str, Any]) -> float:
    return next(iter(record["metrics"].values()))


def _systems(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records by what a row of the table is: the model, and what was set."""
    systems: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        settings = record["settings"]
        vectors = "length 1" if settings["normalized"] else "not normalised"
        name = f"{record['model']}, {settings['max_length']} tokens, {settings['dtype']}, {vectors}"
        systems.setdefault(f"{name}, {settings['revision'][:20]}", []).append(record)
    return systems


def _paper_table(records: Sequence[dict[str, Any]]) -> list[str]:
    columns = (*CATEGORIES.values(), "average")
    lines = [f"| model | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for model, row in PUBLISHED.items():
        cells = [f"{row[column]:.2f}" if column in row else "-" for column in columns]
        lines.append(f"| {model} (published) | {' | '.join(cells)} |")
    for name, of_system in _systems(records).items():
        means = category_means({record["set"]: _score(record) for record in of_system})
        if not means:
            continue
        cells = []
        for column in columns:
            mean, done, of = means.get(column, (0.0, 0, 0))
            cells.append("-" if not done else f"{mean:.2f}" if done == of else f"{mean:.2f} ({done} of {of} tasks)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _lengths_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """The paper's tasks by maximum length: those that were run, all of them without a record; none if none was."""
    rows = [record for record in records if record["set"] in PUBLISHED_LENGTHS]
    tasks = dict.fromkeys(record["set"] for record in rows) if records else PUBLISHED_LENGTHS
    if not tasks:
        return []
    lengths = {record["settings"]["max_length"] for record in rows}
    lengths = sorted(lengths | {length for task in tasks for length in PUBLISHED_LENGTHS[task]})
    lines = [f"| task | model | {' | '.join(f'{n:,}' for n in lengths)} |", "|---|---|" + "---:|" * len(lengths)]
    for task in tasks:
        of_model = {"jina-embeddings-v2-base-en (published)": dict(PUBLISHED_LENGTHS[task])}
        for record in rows:
            if record["set"] == task:
                of_model.setdefault(record["model"], {})[record["settings"]["max_length"]] = 100 * _score(record)
        for model, found in of_model.items():
            cells = [f"{found[length]:.1f}" if length in found else "" for length in lengths]
            lines.append(f"| {task} | {model} | {' | '.join(cells)} |")
    return lines


def markdown(records: Sequence[dict[str, Any]] = ()) -> str:
    """The paper's table with its published rows, its table of lengths, and every score with what decided it.

    Args:
        records: Of `SCORES`; none leaves what was published.
    """
    lines = [
        f"# {PAPER} and others", "",
        "Scores in percent. Published rows: arXiv 2310.19923, and for columns that we have not read there the model "
        "cards of jina-embeddings-v2-small-en and thenlper/gte-base. An average over fewer than all tasks says so and "
        "is not comparable.", "",
        *_paper_table(records), "",
    ]  # fmt: skip
    if lengths := _lengths_table(records):
        note = " LoCo's data are those of LoCoV1, not of the paper's release." if _has_loco(records) else ""
        lines += ["## By maximum length (tokens)", "", f"Main scores in percent.{note}", "", *lengths, ""]
    if not records:
        return "\n".join(lines)
    lines += ["## Every score", "", "| model and settings | task | type | measure | score | truncated texts |"]
    lines.append("|---|---|---|---|---:|---:|")
    for name, of_system in _systems(records).items():
        for record in of_system:
            ((measure, value),) = record["metrics"].items()
            sizes = record["sizes"]
            cut = f"{sizes['truncated_texts']:,} of {sizes['texts']:,}" if sizes else "-"
            lines.append(f"| {name} | {record['set']} | {record['type']} | {measure} | {100 * value:.2f} | {cut} |")
    commands = dict.fromkeys(record["command"] for record in records)
    return "\n".join([*lines, "", "```bash", *commands, "```"]) + "\n"


def _has_loco(records: Iterable[dict[str, Any]]) -> bool:
    return any(record["set"] in LOCO for record in records)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for an unknown option."""
    parser = argparse.ArgumentParser(prog="evaluation.mteb_run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", required=True, help="sentence-transformers folder, Hub repository, all-MiniLM-L6-v2"
    )
    parser.add_argument("--name", help="OWNER/NAME in the results (default: from --model)")
    parser.add_argument("--revision", help="commit or branch of the Hub repository")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["paper"],
        help="of mteb: tasks, benchmarks; paper, long, loco; local: ir/NAME, clustering/NAME",
    )
    parser.add_argument("--data", type=Path, help="folder that has eval/, for local sets")
    parser.add_argument("--output", required=True, type=Path, help="folder; a run goes on from what it holds")
    parser.add_argument("--max-length", nargs="+", type=int, help="tokens a text is cut at; several are a sweep")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--normalize", choices=NORMALIZE, default="model", help="length 1: as modules.json, or not")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--trained-on", nargs="+", help="mteb's names of the training data, or tiny: the shipped model's"
    )
    parser.add_argument("--force", action="store_true", help="compute scores again that the output has")
    return parser.parse_args(argv)


def _encoder(arguments: argparse.Namespace, max_length: int | None) -> TextEncoder:
    training = None
    if arguments.trained_on:
        training = TINY if arguments.trained_on == ["tiny"] else Training(frozenset(arguments.trained_on))
    encoder = TextEncoder(
        arguments.model,
        arguments.revision,
        device=arguments.device,
        max_length=max_length,
        dtype=arguments.dtype,
        normalize=arguments.normalize,
        training=training,
    )
    if arguments.name:
        encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update={"name": arguments.name})
    return encoder


def run(arguments: argparse.Namespace, *, command: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs what the command line names.

    Returns:
        All records of the output, and one line for each task that failed.

    Raises:
        EvaluationError: Something it names is missing or malformed.
    """
    for length in arguments.max_length or ():
        if length < 3:
            raise EvaluationError(f"--max-length {length}: the least is 3 tokens ([CLS], one of the text, [SEP]).")
    name = arguments.name or mteb_name(arguments.model)
    if name.count("/") != 1:
        raise EvaluationError(f"--name {name}: is not OWNER/NAME.")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise EvaluationError(f"--output {arguments.output}: is a file.")
    tasks = select_tasks(arguments.tasks, arguments.data)
    if arguments.trained_on and arguments.trained_on != ["tiny"]:
        for unknown in set(arguments.trained_on) - mteb_names() - set(LOCO):
            logger.warning("--trained-on %s: is no task of mteb; none is called trained on by it.", unknown)
    arguments.output.mkdir(parents=True, exist_ok=True)
    read_records(arguments.output / SCORES)
    failures = []
    for length in dict.fromkeys(arguments.max_length or [None]):
        encoder = _encoder(arguments, length)
        failures += evaluate(encoder, tasks, arguments.output, command=command, force=arguments.force)
    records = read_records(arguments.output / SCORES)
    if records:
        (arguments.output / TABLE).write_text(markdown(records), encoding="utf-8")
    return records, failures


def main(argv: Sequence[str] | None = None):
    """Entry point; a failed task is one line each and status 1, else it ends as `evaluation.command_line` says."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    arguments = parse_arguments(argv)
    with ending(arguments.output):
        records, failures = run(arguments, command=shlex.join(["python", "-m", "evaluation.mteb_run", *argv]))
    if records:
        print((arguments.output / TABLE).read_text(encoding="utf-8"), end="")
        print(json.dumps({"scores": str(arguments.output / SCORES), "table": str(arguments.output / TABLE)}))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
