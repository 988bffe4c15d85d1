"""The metadata of a model card: checked as the Hub checks it, offline, and filled with evaluation results.

    python -m hub_repo.model_card CARD.md [--results RESULTS.json ... --model NAME] [--tags a,b]

Laws: a card that passes here has the fields that the Hub verifies (licence, data sets, model-index) in the form that
it takes, and those that make a model found and run: tags, language, task, library. The text of a card is never
changed, but for the table of results between `TABLE_BEGIN` and `TABLE_END`, if it has these lines.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

# huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense
    zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 gemma unknown other
    """.split()
)
# Those of the Hub's tasks that this model and its heads do.
TASKS = (
    "sentence-similarity", "feature-extraction", "fill-mask", "text-classification", "token-classification",
    "question-answering", "multiple-choice", "text-ranking", "text-retrieval", "zero-shot-classification",
)  # fmt: skip
LIBRARIES = ("sentence-transformers", "transformers", "peft", "onnx", "transformers.js", "openvino", "gguf")

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError)

# Our name of a metric -> task, type and name in the words of sentence-transformers' evaluators.
_METRICS = {
    "ndcg_at_10": ("information-retrieval", "cosine_ndcg@10", "nDCG@10"),
    "mrr_at_10": ("information-retrieval", "cosine_mrr@10", "MRR@10"),
    "map_at_10": ("information-retrieval", "cosine_map@10", "MAP@10"),
    "recall_at_10": ("information-retrieval", "cosine_recall@10", "Recall@10"),
    "recall_at_100": ("information-retrieval", "cosine_recall@100", "Recall@100"),
    "spearman": ("semantic-similarity", "spearman_cosine", "Spearman cosine"),
    "pearson": ("semantic-similarity", "pearson_cosine", "Pearson cosine"),
    "ap": ("pair-classification", "cosine_ap", "Average precision"),
    "best_f1": ("pair-classification", "cosine_f1", "F1, best threshold"),
    "best_accuracy": ("pair-classification", "cosine_accuracy", "Accuracy, best threshold"),
    "v_measure": ("clustering", "v_measure", "V-measure"),
    "accuracy": ("text-classification", "accuracy", "Accuracy"),
    "macro_f1": ("text-classification", "f1", "F1, macro"),
}
TABLE_BEGIN = "<!-- results: written by hub_repo.model_card -->"
TABLE_END = "<!-- end of results -->"
_CUT = " (cut)"  # behind the size of a sample of a set

Record = dict[str, Any]


def check_card(text: str) -> list[str]:
    """What is wrong with the metadata of a card, one line for each fault; empty if it may be published.

    Args:
        text: The whole card, with its YAML block.
    """
    if not text.startswith("---"):
        return ["README.md: does not begin with a block of metadata (--- YAML ---)"]
    try:
        data = ModelCard(text).data
    except _UNREADABLE as error:
        return [f"README.md: unreadable metadata: {' '.join(str(error).split())}"]
    return [f"README.md: {problem}" for problem in _field_problems(data)]


def _field_problems(data: ModelCardData) -> Iterator[str]:
    yield from _license_problems(data)
    yield from _list_problems("language", data.language, _LANGUAGE, "an ISO 639 code, multilingual or code")
    yield from _list_problems("tags", data.tags, re.compile(r"\S(.*\S)?"), "a word")
    for name, value, valid in (
        ("pipeline_tag", data.pipeline_tag, TASKS),
        ("library_name", data.library_name, LIBRARIES),
    ):
        if value not in valid:
            yield f"{name}: {value!r} is not one of {', '.join(valid)}"
    for name, value in (("datasets", data.datasets), ("base_model", data.base_model)):
        if value is not None:
            yield from _list_problems(name, value, _HUB_ID, "a repository of the Hub")
    for result in data.eval_results or []:
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            yield f"model-index: {result.dataset_name}: {result.metric_type}: {value!r} is not a number"


def _license_problems(data: ModelCardData) -> Iterator[str]:
    found = data.license if isinstance(data.license, list) else [data.license]
    for name in found:
        if name not in LICENSES:
            yield f"license: {name!r} is not a licence of the Hub; use its identifier, or other with license_name"
    if "other" in found and not data.license_name:
        yield "license: other needs license_name, and license_link or a file LICENSE"


def _list_problems(name: str, value: Any, pattern: re.Pattern[str], wanted: str) -> Iterator[str]:
    """Faults of a field that is a string or a list of strings, and must not be empty."""
    entries = value if isinstance(value, list) else [value]
    if value is None or not entries:
        yield f"{name}: missing"
        return
    for entry in entries:
        # TRAP: YAML reads an unquoted no (Norwegian) as False.
        if not isinstance(entry, str) or not pattern.fullmatch(entry):
            yield f"{name}: {entry!r} is not {wanted}"


def records_of(records: Iterable[Record], model: str) -> list[Record]:
    """The records of one model, one a set: the first, so that whole sets go before samples of them.

    Args:
        records: Of `evaluation.local`: "model", "set", "sizes" and "metrics", name -> value or None.
        model: Whose records to take.

    Raises:
        ValueError: There is none of this model, or there are some of other weights that it had.
    """
    records = list(records)
    found: dict[str, Record] = {}
    for record in records:
        if record["model"] == model:
            found.setdefault(record["set"], record)
    if not found:
        names = ", ".join(sorted({record["model"] for record in records}))
        raise ValueError(f"no results of {model!r}; there are some of {names}.")
    weights = {record.get("settings", {}).get("weights_sha256") for record in records if record["model"] == model}
    if len(weights) > 1:
        raise ValueError(f"the results of {model!r} are of {len(weights)} different weights; leave the old ones out.")
    return list(found.values())


def evaluation_results(records: Iterable[Record], model: str) -> list[EvalResult]:
    """The records of one model as entries of a model-index.

    Args:
        records: As for `records_of`.
        model: Whose records to take.

    Raises:
        ValueError: There is none of this model, or a metric that has no entry in a model-index.
    """
    results = []
    for record in records_of(records, model):
        cut = _CUT if _is_cut(record) else ""
        for metric, value in record["metrics"].items():
            if metric not in _METRICS:
                raise ValueError(f"{record['set']}: metric {metric!r} is not one of {', '.join(_METRICS)}.")
            if value is None:
                continue
            task, kind, name = _METRICS[metric]
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_name=record["set"] + cut,
                    dataset_type=re.sub(r"[^a-z0-9]+", "-", record["set"].lower()),
                    metric_type=kind,
                    metric_name=name,
                    metric_value=round(float(value), 4),
                )
            )
    if not results:
        raise ValueError(f"no score of {model!r}.")
    return results


def _is_cut(record: Record) -> bool:
    """Whether it is of a sample of its set."""
    return "cut_from" in record.get("protocol", {})


def results_table(records: Iterable[Record], model: str, title: str) -> str:
    """One row a set of `model`: its first measure, beside the others of the same data; the best in bold.

    Args:
        records: As for `records_of`.
        model: Whose sets to show, in the first column of scores.
        title: Heading of that column.

    Raises:
        ValueError: There is none of this model.
    """
    records = list(records)
    others = dict.fromkeys(record["model"] for record in records if record["model"] != model)
    cells = {(record["model"], *_data_of(record)): record["metrics"] for record in reversed(records)}
    lines = [
        f"| set | size | measure | {' | '.join([title, *others])} |",
        "|---|---|---|" + "---:|" * (1 + len(others)),
    ]
    measures = list(_METRICS)
    rows = [(measures.index(next(iter(record["metrics"]))), record) for record in records_of(records, model)]
    for position, record in sorted(rows, key=lambda row: (row[0], row[1]["set"])):
        scores = [cells.get((name, *_data_of(record)), {}).get(measures[position]) for name in (model, *others)]
        best = max((score for score in scores if score is not None), default=None)
        shown = ["-" if x is None else f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in scores]
        measure = _METRICS[measures[position]][2].removesuffix(" cosine")  # BM25 has none
        lines.append(f"| {record['set']} | {_size(record)} | {measure} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _data_of(record: Record) -> tuple[str, str | None, str]:
    """What two scores must share to stand in one row."""
    return record["set"], record.get("data_sha256"), _size(record)


def _size(record: Record) -> str:
    sizes = record["sizes"]
    if "pairs" in sizes:
        text = f"{sizes['pairs']:,} pairs"
    elif "texts" in sizes:
        text = f"{sizes['texts']:,} texts, {sizes['labels']} labels"
    else:
        text = f"{sizes['queries']:,} x {sizes['documents']:,}"
    return text + (_CUT if _is_cut(record) else "")


def with_table(text: str, table: str) -> str:
    """The card with `table` between its two lines `TABLE_BEGIN` and `TABLE_END`.

    Raises:
        ValueError: One of the lines is missing or there twice, or they are in the wrong order.
    """
    before, begin, rest = text.partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    if not (begin and end) or any(text.count(line) != 1 for line in (TABLE_BEGIN, TABLE_END)):
        raise ValueError(f"{TABLE_BEGIN!r} and {TABLE_END!r} are not there once each, in this order.")
    return f"{before}{TABLE_BEGIN}\n\n{table}\n\n{TABLE_END}{after}"


def fill_card(
    text: str, *, tags: Sequence[str] = (), results: Sequence[EvalResult] = (), name: str | None = None
) -> str:
    """A card with tags added and its model-index replaced; its text and other metadata stay.

    Args:
        text: The whole card.
        tags: Added to those it has.
        results: The new model-index; empty leaves the old one.
        name: Of the model in the model-index; None takes the first heading of the card.

    Raises:
        ValueError: The metadata cannot be read, or there is no name.
    """
    try:
        card = ModelCard(text)
    except _UNREADABLE as error:
        raise ValueError(f"unreadable metadata: {' '.join(str(error).split())}") from None
    if tags:
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    if results:
        card.data.eval_results = list(results)
        card.data.model_name = name or _heading(card.text)
    return str(card)


def _heading(text: str) -> str:
    found = re.search(r"^# (.+)$", text, flags=re.MULTILINE)
    if found is None:
        raise ValueError("the card has no heading; name the model.")
    return found[1].strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: fills and checks a card; 2 if it may not be published, and then the file is as it was."""
    parser = argparse.ArgumentParser(
        prog="hub_repo.model_card", description="Check the metadata of a model card, and fill it."
    )
    parser.add_argument("card", type=Path, help="the card, a Markdown file; changed in place")
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        help="of evaluation.local, for model-index and table; the first counts",
    )
    parser.add_argument("--model", help="whose results to take, as named in them")
    parser.add_argument("--name", help="name in the model-index; default the heading of the card")
    parser.add_argument("--tags", default="", help="tags to add, separated by commas")
    options = parser.parse_args(argv)
    if (options.results is None) != (options.model is None):
        parser.error("--results and --model belong together")
    try:
        text = old = options.card.read_text(encoding="utf-8")
        records = [record for path in options.results or () for record in _records(path)]
        results = evaluation_results(records, options.model) if options.results else []
        tags = [tag.strip() for tag in options.tags.split(",") if tag.strip()]
        if tags or results:
            text = fill_card(old, tags=tags, results=results, name=options.name)
        if results and (TABLE_BEGIN in text or TABLE_END in text):
            text = with_table(text, results_table(records, options.model, options.name or _heading(text)))
        if problems := check_card(text):
            raise ValueError("\n".join(problems))
        if text != old:
            options.card.write_text(text, encoding="utf-8")
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {options.card}: {error}", file=sys.stderr)
        return 2
    print(f"{options.card}: {'written' if text != old else 'unchanged'}, its metadata is what the Hub takes")
    return 0


def _records(path: Path) -> list[Record]:
    """The records of a result file; an error names it."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        if not all({"model", "set", "metrics", "sizes"} <= set(record) for record in records):
            raise KeyError("model, set, metrics or sizes")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: holds no results of evaluation.local ({type(error).__name__}: {error}).") from None
    return records


if __name__ == "__main__":
    sys.exit(main())
