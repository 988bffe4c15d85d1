"""Whether the difference of two models is more than chance, set by set.

    python -m evaluation.compare tiny.json all-MiniLM-L6-v2.json bm25.json --markdown table.md

Files of `evaluation.local`; the model of the first file is the one the others are compared with. The tests are those
of `evaluation.significance`; a difference counts where the p-value, adjusted by Holm's method over all differences of
the table, is at most 0.05.

Laws: scores are compared where both are of the same texts and protocol, and nowhere else; what cannot be compared is
said. COST: seconds a set.
"""

import argparse
import logging
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .metrics import MEASURES, TASK_MEASURES
from .records import Samples, read_records, read_samples, samples_path, write_records
from .sets import EvaluationError
from .significance import Difference, differences, holm
from .tables import cell, column_of, column_title, markdown_table, print_table, size_text

logger = logging.getLogger(__name__)

LEVEL = 0.05
_SAME = ("set", "protocol", "data_sha256")  # what two records must have in common


@dataclass(frozen=True)
class Model:
    """The records of one model in one file.

    Attributes:
        title: Its name, with the limit in tokens.
        records: Its records.
        samples: Samples by the name in the records.
    """

    title: str
    records: list[dict[str, Any]]
    samples: dict[str, Samples]

    def find(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Its record of the same set, texts and protocol, and with samples."""
        wanted = {name: record[name] for name in _SAME}
        return next((x for x in self.records if wanted.items() <= x.items() and x["samples"] in self.samples), None)


def read_models(path: Path, model: str | None = None) -> list[Model]:
    """The models of a file of `evaluation.local`, each with those of its records that can be compared.

    Args:
        path: JSON file.
        model: Only the model of that name; None takes all.

    Raises:
        EvaluationError: No such file, nothing of that model, or nothing that can be compared.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file.")
    records = [x for x in read_records(path) if model is None or x["model"] == model]
    if not records:
        raise EvaluationError(f"{path}: no results{'' if model is None else f' of {model}'}.")
    samples = read_samples(samples_path(path))
    whole = [x for x in records if x.get("samples") in samples and set(_SAME) <= set(x)]
    scored = [x for x in records if any(value is not None for value in x["metrics"].values())]
    if len(whole) < len(scored):
        missing = len(scored) - len(whole)
        logger.warning("%s: %d records without samples; python -m evaluation.local makes them.", path, missing)
    if not whole:
        raise EvaluationError(f"{path}: no record has samples in {samples_path(path)}; score again.")
    groups = [[x for x in whole if (x["model"], x["settings"]) == key] for key in _distinct(whole)]
    return [Model(column_title(column_of(group[0])), group, samples) for group in groups]


def _distinct(records: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of every model, each once, in the order of the records."""
    found: list[tuple[str, dict[str, Any]]] = []
    for record in records:
        if (record["model"], record["settings"]) not in found:
            found.append((record["model"], record["settings"]))
    return found


def compare(first: Model, second: Model, *, measures: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The differences on the sets that both have, not yet adjusted.

    Args:
        first: What `second` is compared with.
        second: The other model.
        measures: Names in `MEASURES`; None takes the main one of each task.

    Returns:
        Records: "set", "measure", "models", "scores", "difference", "interval", "p".
    """
    found, missing = [], []
    for record in first.records:
        other = second.find(record)
        if other is None:
            missing.append(record["set"])
            continue
        wanted = [x for x in TASK_MEASURES[record["task"]] if measures is None or x in measures]
        samples = first.samples[record["samples"]], second.samples[other["samples"]]
        of_set = differences(record["task"], *samples)
        for measure in wanted if measures else wanted[:1]:
            found.append(_record(of_set[measure], record, other, measure=measure, models=(first.title, second.title)))
    if missing:
        logger.warning("%s has no score of the same texts on %s: not compared.", second.title, ", ".join(missing))
    return found


def _record(
    difference: Difference, first: dict[str, Any], second: dict[str, Any], *, measure: str, models: tuple[str, str]
) -> dict[str, Any]:
    values = asdict(difference)
    return {
        "set": first["set"],
        "measure": measure,
        "models": list(models),
        "scores": [first["metrics"][measure], second["metrics"][measure]],
        "difference": values["value"],
        "interval": values["interval"],
        "p": values["p"],
    }


def adjust(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with "p_adjusted", by Holm's method over all of them, and "verdict" about the second model."""
    adjusted = holm([x["p"] for x in found])
    return [
        {**x, "p_adjusted": p, "verdict": verdict(x["difference"], p)} for x, p in zip(found, adjusted, strict=True)
    ]


def verdict(difference: float, p: float) -> str:
    """What a difference says about the second model.

    Example:
        >>> verdict(0.1, 0.03), verdict(-0.1, 0.03), verdict(0.1, 0.3)
        ('better', 'worse', 'no difference shown')
    """
    if p > LEVEL:
        return "no difference shown"
    return "better" if difference > 0 else "worse"


def difference_rows(found: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the differences, one a set, measure and model."""
    header = ["set", "measure", "model", "scores", "difference [95 %]", "p", "p (Holm)", "verdict"]
    rows = []
    for x in found:
        interval = "" if x["interval"] is None else f" [{x['interval'][0]:+.3f}, {x['interval'][1]:+.3f}]"
        rows.append(
            [
                x["set"],
                MEASURES[x["measure"]],
                x["models"][1],
                f"{x['scores'][0]:.3f}, {x['scores'][1]:.3f}",
                f"{x['difference']:+.3f}{interval}",
                f"{x['p']:.4f}",
                f"{x['p_adjusted']:.4f}",
                x["verdict"],
            ]
        )
    return header, rows


def overview_rows(models: Sequence[Model], found: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the scores of all models, one row a set and measure; ▲ and ▼ mark what differs.

    Args:
        models: The first is what the others are compared with.
        found: Of `adjust`.
    """
    marks = marks_of(found)
    first, *others = models
    rows = []
    for record in first.records:
        for measure in record["metrics"]:
            row = [record["set"], size_text(record), MEASURES[measure], cell(record, measure)]
            for other in others:
                its = other.find(record)
                mark = marks.get((record["set"], MEASURES[measure], other.title), "")
                row.append("" if its is None else cell(its, measure) + mark)
            rows.append(row)
    return ["set", "queries x documents", "measure", *(model.title for model in models)], rows


def marks_of(found: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], str]:
    """(Set, measure as shown, title of the second model) -> " ▲" or " ▼"; nothing where no difference is shown."""
    signs = {"better": " ▲", "worse": " ▼"}
    return {
        (x["set"], MEASURES[x["measure"]], x["models"][1]): signs[x["verdict"]] for x in found if x["verdict"] in signs
    }


def legend(first: Model, found: Sequence[dict[str, Any]]) -> list[str]:
    """What the intervals and marks of a table mean, lines of Markdown."""
    return [
        "Scores with 95 % intervals (bootstrap over pairs and texts, over queries in groups with the same answering",
        "document, and over the runs of clustering and classification).",
        f"▲ better and ▼ worse than {first.title}, of the measures that were tested: adjusted p <= {LEVEL} (Holm,",
        f"{len(found)} differences). (cut): the set was cut to a sample, as its record says.",
    ]


def overview(models: Sequence[Model], found: Sequence[dict[str, Any]], *, command: str) -> str:
    """The scores of all models as a page in Markdown, with how they came about."""
    lines = [
        *legend(models[0], found),
        "",
        *(f"    {x}" for x in dict.fromkeys(record["command"] for model in models for record in model.records)),
        f"    {command}",
        "",
    ]
    return "\n".join(lines) + "\n" + markdown_table(*overview_rows(models, found))


def run(arguments: argparse.Namespace) -> tuple[list[Model], list[dict[str, Any]]]:
    """Reads the files and compares every other model with the first.

    Raises:
        EvaluationError: A file or a name is wrong, or there is nothing that two models have in common.
    """
    for path in filter(None, (arguments.output, arguments.markdown)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise EvaluationError(f"{path}: is a folder, or lies in none.")
    wrong = [x for x in arguments.measures or () if x not in MEASURES]
    if wrong:
        raise EvaluationError(f"--measures {wrong[0]}: is none of {', '.join(MEASURES)}.")
    names = arguments.models or [None]
    models = with_own_titles(
        [(x, path) for path in arguments.results for name in names for x in _of(path, name, names)]
    )
    if len(models) < 2:
        raise EvaluationError(f"{', '.join(map(str, arguments.results))}: one model only; a comparison needs two.")
    found = [x for other in models[1:] for x in compare(models[0], other, measures=arguments.measures)]
    if not found:
        raise EvaluationError("the models have no set with the same texts and protocol in common.")
    return models, adjust(found)


def with_own_titles(models: Sequence[tuple[Model, Path]]) -> list[Model]:
    """The models; where two have the same title, each is told by its file and the hash of its weights."""
    count = Counter(model.title for model, _ in models)
    found = []
    for model, path in models:
        weights = str(model.records[0]["settings"].get("weights_sha256", ""))[:8]
        own = f"{model.title} {path} {weights}".strip()
        found.append(replace(model, title=own) if count[model.title] > 1 else model)
    return found


def _of(path: Path, name: str | None, names: Sequence[str | None]) -> list[Model]:
    """The models of a file; a name that one of several files has not is no fault."""
    if name is not None and len(names) > 1 and all(x["model"] != name for x in read_records(path)):
        return []
    return read_models(path, name)


def main(argv: Sequence[str] | None = None):
    """Entry point; a wrong input ends it with one line and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="evaluation.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files of evaluation.local; the first model is the one")
    parser.add_argument("--models", nargs="+", help="names in the files (default: all there are)")
    parser.add_argument("--measures", nargs="+", help="what to test (default: the main measure of each task)")
    parser.add_argument("--output", type=Path, help="JSON file for the differences")
    parser.add_argument("--markdown", type=Path, help="file for the scores and marks in Markdown")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        models, found = run(arguments)
    except (EvaluationError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print_table(*difference_rows(found), names=2, title=f"beside {models[0].title}")
    if arguments.output:
        write_records(arguments.output, found)
    if arguments.markdown:
        command = shlex.join(["python", "-m", "evaluation.compare", *argv])
        arguments.markdown.write_text(overview(models, found, command=command), encoding="utf-8")


if __name__ == "__main__":
    main()
