"""GLUE: fine-tune backbones on its tasks, score them, write the tables and the files for its test server.

    python -m evaluation.glue --model runs/mlm/final --config evaluation/recipes/glue.yaml --work runs/glue \
      --output glue.json --markdown glue.md

Laws: everything wrong with recipe, models and data is said before the first step; a finished run (a grid point and a
seed of a task) is never computed again, and one that was interrupted goes on after its last whole epoch; STS-B,
MRPC and RTE start from the encoder of the MNLI model (paper section 6.1), or the report says that they do not.
COST: (learning rates x batch sizes x seeds) fine-tunings a task, one after the other, on one device.
"""

import argparse
import importlib.metadata
import json
import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers

from .glue_data import LeftOut, TaskData, load_task
from .glue_finetuning import Backbone, Run, drop_weights, fine_tune, load_backbone, measures_of, plan, predict
from .glue_recipe import FineTuning, GlueRecipe, load_recipe
from .glue_report import (
    main_table,
    markdown,
    markdown_table,
    measures_text,
    read_output,
    record_of,
    select,
    submission,
    write_output,
)
from .glue_tasks import TASKS, decode
from .sets import EvaluationError

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn")


def read_tasks(
    recipe: GlueRecipe, settings: dict[str, FineTuning], data: Path | None
) -> tuple[dict[str, TaskData], dict[str, str]]:
    """Reads the data of all tasks.

    Returns:
        The tasks that can be scored, MNLI first; and the ones that cannot, with the reason.

    Raises:
        EvaluationError: A malformed file, or no folder `data`.
    """
    if data is not None and not data.is_dir():
        raise EvaluationError(f"--data {data}: no such folder.")
    found, left_out = {}, {}
    for name, its in settings.items():
        try:
            found[name] = load_task(
                TASKS[name],
                data,
                hub=recipe.hub,
                folder=its.folder,
                label_names=its.label_names,
                max_train_rows=its.max_train_rows,
            )
        except LeftOut as reason:
            left_out[name] = str(reason)
    left_out |= {name: "not among the tasks of the recipe" for name in TASKS if name not in settings}
    for folder in sorted(data.iterdir()) if data is not None else []:
        if folder.is_dir() and folder.name not in (*TASKS, "AX"):
            left_out[folder.name] = "no task of GLUE"
    if not found:
        raise EvaluationError(f"nothing to score: {'; '.join(f'{name}: {left_out[name]}' for name in settings)}.")
    return found, left_out


def run_grid(
    backbone: Backbone, data: TaskData, settings: FineTuning, work: Path, *, start: Run | None
) -> tuple[list[Run], Run]:
    """Carries out what is not finished of a task's grid.

    Args:
        backbone: What is fine-tuned.
        data: The task.
        settings: The grid, and how.
        work: Folder of all runs.
        start: The run whose encoder these start from; None is the backbone's.

    Returns:
        All runs, and the selected one, which is the only one with weights.
    """
    runs = plan(backbone, data, settings, work, start=start)
    for number, run in enumerate(runs, start=1):
        state = "finished before" if run.is_finished else "trained"
        result = run.result() if run.is_finished else fine_tune(run, backbone, data, settings, start=start)
        label = f"{backbone.name}, {data.task.name}, {number} of {len(runs)}"
        logger.info("%s: %s, %s: %s", label, run.folder.name, state, measures_text(result["dev"]))
        same_point = [other for other in runs[:number] if other.point == run.point]
        drop_weights(same_point, keep=select(same_point))
    chosen = select(runs)
    if not chosen.model_folder.is_dir():
        logger.info("%s: the weights of %s are gone; trained again.", data.task.name, chosen.folder.name)
        fine_tune(chosen, backbone, data, settings, start=start)
    drop_weights(runs, keep=chosen)
    return runs, chosen


def answer_tests(
    run: Run, backbone: Backbone, data: TaskData, settings: FineTuning, folder: Path
) -> dict[str, dict[str, float]]:
    """Writes the files for the test server, and scores the test sets whose labels are there.

    Args:
        run: The selected run; its predictions are kept beside it, and not computed again.
        backbone: Whose tokenizer is used.
        data: The task.
        settings: How.
        folder: Where the files go.

    Returns:
        Part -> measures.
    """
    if not data.test:
        return {}
    kept = run.folder / "test.json"
    digests = {name: split.sha256 for name, split in data.test.items()}
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if known.get("sha256") != digests:
        outputs = predict(run, backbone, data, settings, data.test)
        diagnostic = {part.name for part in data.task.parts if part.diagnostic}
        known = {"sha256": digests, "measures": {}, "files": {}}
        for name, split in data.test.items():
            known["files"][f"{name}.tsv"] = submission(data.task, decode(data.task, outputs[name]))
            if split.labels is not None and name not in diagnostic:
                known["measures"][name] = measures_of(data.task, outputs[name], split.labels)
        write_output(kept, known)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in known["files"].items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return known["measures"]


def notes_of(
    backbone: Backbone, data: TaskData, settings: FineTuning, *, start: Run | None, mnli: str | None
) -> list[str]:
    """What a reader of the scores must know and cannot see in them.

    Args:
        backbone: What was fine-tuned.
        data: The task.
        settings: How.
        start: The run it started from.
        mnli: Why there is no MNLI model; None if there is one.
    """
    task, notes = data.task, []
    if task.starts_from_mnli and start is None:
        notes.append(f"{backbone.name}: {task.name} starts from the backbone, not from the MNLI model ({mnli}).")
    if settings.label_names is not None:
        notes.append(f"{task.name}: the integer labels of the files were read as {', '.join(settings.label_names)}.")
    if data.train_rows != task.train_rows:
        notes.append(f"{task.name}: {data.train_rows:,} rows in the train split, GLUE has {task.train_rows:,}.")
    for part in task.parts:
        rows = len(data.dev[part.name]) if part.name in data.dev else part.dev_rows
        if rows != part.dev_rows:
            notes.append(f"{part.name}: {rows:,} rows in the development set, GLUE has {part.dev_rows:,}.")
        rows = len(data.test[part.name]) if part.name in data.test else part.test_rows
        if rows != part.test_rows:
            notes.append(f"{part.name}.tsv has {rows:,} rows, the test server wants {part.test_rows:,}.")
    return notes


def score_model(
    backbone: Backbone,
    tasks: dict[str, TaskData],
    settings: dict[str, FineTuning],
    arguments: argparse.Namespace,
    *,
    left_out: dict[str, str],
    command: str,
):
    """Scores a backbone on all tasks, and writes the output after each."""
    mnli: Run | None = None
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    for name, data in tasks.items():
        its = settings[name]
        start = mnli if data.task.starts_from_mnli else None
        runs, chosen = run_grid(backbone, data, its, arguments.work, start=start)
        mnli = chosen if name == "MNLI" else mnli
        answers = chosen.folder.parents[1] / "submission"
        record = {
            "model": backbone.name,
            **record_of(data, runs, chosen, answer_tests(chosen, backbone, data, its, answers)),
            "notes": notes_of(backbone, data, its, start=start, mnli=left_out.get("MNLI")),
            "versions": versions,
            "command": command,
        }
        content = read_output(arguments.output)
        others = [r for r in content["records"] if (r["model"], r["task"]) != (backbone.name, name)]
        scored = {name, *(r["task"] for r in others if r["model"] == backbone.name)}
        reasons = [entry for entry in content["left_out"] if entry["model"] != backbone.name]
        reasons += [
            {"model": backbone.name, "task": task, "reason": why}
            for task, why in left_out.items()
            if task not in scored
        ]
        write_output(arguments.output, {"records": [*others, record], "left_out": reasons})
        if arguments.markdown:
            arguments.markdown.write_text(markdown(read_output(arguments.output)), encoding="utf-8")
    if (chosen.folder.parents[1] / "submission").is_dir():
        logger.info("files for the test server: %s", chosen.folder.parents[1] / "submission")


def name_of(model: str) -> tuple[str, str]:
    """Name and path of a `--model`.

    Example:
        >>> name_of("runs/mlm/final"), name_of("bert=google-bert/bert-base-uncased")
        (('mlm', 'runs/mlm/final'), ('bert', 'google-bert/bert-base-uncased'))
    """
    name, separator, path = model.partition("=")
    if separator:
        return name, path
    folder = Path(model)
    if not folder.is_dir() and not folder.name == "final":
        return model, model
    return (folder.parent if folder.name == "final" else folder).resolve().name, model


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for an unknown option."""
    parser = argparse.ArgumentParser(prog="evaluation.glue", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        help="backbone: folder or Hub repository of a JinaBERT or of a plain model; NAME=PATH names it; repeatable",
    )
    parser.add_argument("--config", required=True, type=Path, help="recipe; evaluation/recipes holds ours")
    parser.add_argument("--data", type=Path, help="folder with TASK/{train,dev,test}.jsonl.zst (default: the Hub)")
    parser.add_argument("--work", type=Path, default=Path("runs/glue"), help="folder of the runs (default: runs/glue)")
    parser.add_argument("--output", required=True, type=Path, help="JSON file; other models and tasks in it are kept")
    parser.add_argument("--markdown", type=Path, help="file for the report in Markdown")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for example tasks=[RTE]")
    arguments = parser.parse_intermixed_args(argv)
    for override in arguments.overrides:
        if "=" not in override:
            parser.error(f"{override!r} is not of the form key=value")
    return arguments


def run(arguments: argparse.Namespace, *, command: str):
    """Carries out a command line.

    Raises:
        EvaluationError: Something it names is missing or malformed.
    """
    for path in filter(None, (arguments.output, arguments.markdown)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise EvaluationError(f"{path}: is a folder, or lies in none.")
    read_output(arguments.output)
    recipe, settings = load_recipe(arguments.config, arguments.overrides)
    backbones = [load_backbone(*name_of(model)) for model in arguments.model]
    if len({backbone.name for backbone in backbones}) < len(backbones):
        raise EvaluationError("two --model have the same name; write NAME=PATH.")
    for backbone in backbones:
        for task, its in settings.items():
            if backbone.positions is not None and its.max_length > backbone.positions:
                raise EvaluationError(
                    f"{task}: max_length={its.max_length}, but {backbone.name} has {backbone.positions} positions."
                )
    tasks, left_out = read_tasks(recipe, settings, arguments.data)
    for name, reason in left_out.items():
        logger.info("left out: %s: %s", name, reason)
    for backbone in backbones:
        score_model(backbone, tasks, settings, arguments, left_out=left_out, command=command)


def main(argv: Sequence[str] | None = None):
    """Entry point; a wrong input ends it with one line and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()  # a report on the new head for every run
    transformers.logging.disable_progress_bar()  # of loading
    arguments = parse_arguments(argv)
    try:
        run(arguments, command=shlex.join(["python", "-m", "evaluation.glue", *argv]))
    except (EvaluationError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    print(markdown_table(*main_table(read_output(arguments.output)["records"]), left=2))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
