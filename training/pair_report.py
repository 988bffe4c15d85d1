"""What pair preparation did: pairs of every source through every step, examples of what went, what lies in the files.

Law: the numbers are datatrove's own statistics of the finished tasks, summed; if they and the files do not add up,
there is no report. Files: `report.json` and `report.md` in the output folder.
"""

import gzip
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from omegaconf import OmegaConf

from .corpus_report import totals
from .mining_texts import replacing
from .pair_recipe import step_names

_EXAMPLES = 3  # of each step and source
_EXAMPLE_CHARACTERS = 110  # of each text
_PACKAGES = ("datatrove", "lingua-language-detector", "faiss-cpu", "sentence-transformers", "datasets", "transformers")
_STAGES = {"empty": "read", "identical": "read", "duplicate": "clean", "language": "clean"}
_MEANING = {
    "empty": "a text is empty",
    "identical": "query and positive are the same but for case and whitespace",
    "duplicate": "a copy, but for case and whitespace, of a pair that stays",
    "language": "lingua is sure of another language",
    "sample": "not judged: outside the sample of its source",
    "consistency": "the positive is not among the nearest of the pool",
}

Counts = dict[str, int]  # pairs by source, and "all"


class WriteReport(PipelineStep):
    """Last step of the last task: checks that nothing was lost and writes the report."""

    type = "REPORT"
    name = "report"

    def __init__(self, output_dir: str):
        super().__init__()
        self.output_dir = output_dir

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1):
        root = Path(self.output_dir)
        report = pair_report(root)
        for name, text in (
            ("report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
            ("report.md", markdown(report)),
        ):
            with replacing(root / name) as partial:
                partial.write_text(text, encoding="utf-8")


def pair_report(root: Path) -> dict[str, Any]:
    """The report of a finished run.

    Args:
        root: Its output folder.

    Returns:
        `recipe`, without the folders of this machine; `versions`; `steps`, each with the pairs `before`, `removed` and
        `kept` and the `share` removed by source, `reasons` and `examples` by source; `consistency`, the pool's size
        and the teacher; `seconds`, the time in datatrove's steps by stage, summed over tasks; `files` of each source.

    Raises:
        RuntimeError: Pairs were lost or doubled between steps, or files are missing.
    """
    recipe = OmegaConf.structured(OmegaConf.load(root / "recipe.yaml"))
    sources = [source.name for source in recipe.sources]
    stages = {stage.name: totals(stage) for stage in sorted((root / "logs").iterdir())}
    _check_flow(stages, sources, consistency=recipe.consistency is not None)
    kept = {name: int(stages["read"][f"READER: {name}"].get(f"{name}|documents", 0)) for name in sources}
    steps = []
    for name in step_names(recipe):
        counts = stages[_STAGES.get(name, "consistency")]
        before, kept = kept, _by_source(counts[f"TALLY: {name}"], sources)
        steps.append(
            {
                "step": name,
                **_difference(before, kept),
                "reasons": _reasons(counts[f"FILTER: {name}"]),
                "examples": examples(root / "removed" / name, sources),
            }
        )
    written = OmegaConf.to_container(recipe, enum_to_str=True)
    return {
        "recipe": {key: value for key, value in written.items() if key not in ("output_dir", "data_dir")},
        "versions": {package: version(package) for package in _PACKAGES},
        "steps": steps,
        "consistency": _consistency(written["consistency"], stages),
        "seconds": {
            stage: {step: round(counts["seconds"], 1) for step, counts in steps.items() if counts["seconds"] > 0}
            for stage, steps in stages.items()
        },
        "files": _files(root / "pairs", kept),
    }


def _check_flow(stages: dict[str, dict[str, Counter]], sources: list[str], *, consistency: bool):
    """Raises unless each stage read what the one before wrote."""
    passed = [("read", "TALLY: identical", "clean", "TALLY: read")]
    if consistency:
        last = "TALLY: language" if "TALLY: language" in stages["clean"] else "TALLY: duplicate"
        passed.append(("clean", last, "consistency", "TALLY: clean"))
    for stage, kept, following, read in passed:
        ours, theirs = (_by_source(stages[name][step], sources) for name, step in ((stage, kept), (following, read)))
        if ours != theirs:
            raise RuntimeError(f"pairs were lost or doubled: {stage} kept {ours}, {following} read {theirs}.")


def _by_source(counts: Counter, sources: list[str]) -> Counts:
    return {source: int(counts.get(f"{source}|documents", 0)) for source in sources}


def _difference(before: Counts, kept: Counts) -> dict[str, dict[str, Any]]:
    """Before, removed, kept and the share removed by source, and under "all" of their sums."""
    before, kept = ({**counts, "all": sum(counts.values())} for counts in (before, kept))
    removed = {source: count - kept[source] for source, count in before.items()}
    share = {source: round(removed[source] / count, 6) if count else 0.0 for source, count in before.items()}
    return {"before": before, "removed": removed, "kept": kept, "share": share}


def _reasons(counts: Counter) -> Counts:
    """What a filter counted under a reason, largest first."""
    found = {key.removeprefix("dropped_"): int(count) for key, count in counts.items() if key.startswith("dropped_")}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def examples(folder: Path, sources: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The first removed pairs of each source, cut short; reading ends when each has its examples."""
    found: dict[str, list[dict[str, Any]]] = {source: [] for source in sources}
    for file in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                shown = found[row["metadata"]["source"]]
                if len(shown) < _EXAMPLES:
                    shown.append(_example(row))
        if all(len(shown) == _EXAMPLES for shown in found.values()):
            break
    return {source: shown for source, shown in found.items() if shown}


def _example(row: dict[str, Any]) -> dict[str, Any]:
    metadata, end = row["metadata"], row["metadata"].get("query_characters", 0)
    texts = {"query": row["text"][:end], "positive": row["text"][end + 1 :]}
    reasons = {"filter_reason": "reason", "cosine": "cosine", "rival": "rival"}
    return {
        **{key: " ".join(text.split())[:_EXAMPLE_CHARACTERS] for key, text in texts.items()},
        **{name: metadata[key] for key, name in reasons.items() if key in metadata},
    }


def _consistency(recipe: dict[str, Any] | None, stages: dict[str, dict[str, Counter]]) -> dict[str, Any] | None:
    if recipe is None:
        return None
    from .consistency import describe

    return {"pool": int(stages["choose"]["SAMPLE: choose"]["pool"]), "teacher": describe(recipe)}


def _files(folder: Path, kept: Counts) -> dict[str, Any]:
    """Files and pairs of each source; reading a file's footer proves that it is whole."""
    described = {}
    for source, count in kept.items():
        files = sorted((folder / source).glob("*.parquet"))
        pairs = sum(pq.read_metadata(file).num_rows for file in files)
        if pairs != count:
            raise RuntimeError(f"pairs were lost or doubled: {folder / source} has {pairs}, kept were {count}.")
        described[source] = {"files": len(files), "pairs": pairs}
    return described


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    steps = report["steps"]
    lines = ["# Pair preparation", "", "Pairs, all sources together.", "", *_summary(steps)]
    lines += ["", "Removed by source: pairs, and share of those that came to the step.", "", *_by_source_table(steps)]
    lines += ["", *_rules(report), "", "## Sources", "", *_sources(report["recipe"]["sources"])]
    lines += ["", "## What was removed, examples", ""]
    for step in steps:
        if step["step"] == "sample" or not step["examples"]:
            continue
        lines += [f"### {step['step']}: {_MEANING[step['step']]}", ""]
        if step["reasons"]:
            counts = ", ".join(f"{reason} {count:,}" for reason, count in step["reasons"].items())
            lines += [f"By language: {counts}.", ""]
        for source, rows in step["examples"].items():
            lines += [f"- {source}: {_shown(row)}" for row in rows]
        lines.append("")
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    return "\n".join([*lines, f"Made with {versions}. The recipe is in report.json.", ""])


def _summary(steps: list[dict[str, Any]]) -> list[str]:
    rows = ["| step | pairs in | removed | | kept | what goes |", "|---|--:|--:|--:|--:|---|"]
    for step in steps:
        name, share = step["step"], step["share"]["all"]
        before, removed, kept = (step[key]["all"] for key in ("before", "removed", "kept"))
        rows.append(f"| {name} | {before:,} | {removed:,} | {share:.2%} | {kept:,} | {_MEANING[name]} |")
    return rows


def _by_source_table(steps: list[dict[str, Any]]) -> list[str]:
    names = [step["step"] for step in steps]
    rows = [f"| source | pairs | {' | '.join(names)} | kept |", "|---|--:|" + "--:|" * (len(names) + 1)]
    for source, pairs in steps[0]["before"].items():
        cells = [f"{step['removed'][source]:,} ({step['share'][source]:.1%})" for step in steps]
        rows.append(f"| {source} | {pairs:,} | {' | '.join(cells)} | {steps[-1]['kept'][source]:,} |")
    return rows


def _sources(sources: list[dict[str, Any]]) -> list[str]:
    rows = ["| source | kind | licence | origin |", "|---|---|---|---|"]
    for source in sources:
        kind = source["kind"] and source["kind"].replace("_", " ")
        cells = [source["name"], kind, source["licence"], source["url"] or source["hub"] or source["path"]]
        rows.append(f"| {' | '.join(cell or 'not stated' for cell in cells)} |")
    return rows


def _rules(report: dict[str, Any]) -> list[str]:
    """What the language and consistency steps were told, in words."""
    language, consistency = report["recipe"]["language"], report["recipe"]["consistency"]
    lines = []
    if language:
        lines.append(
            f"Language: a pair goes if lingua gives one language that is not {' or '.join(language['keep'])} at least "
            f"{language['sure']:.0%} of its confidence for the two texts together."
        )
    if consistency:
        made, teacher = report["consistency"], report["consistency"]["teacher"]
        lines.append(
            f"Consistency: a pair stays if its positive is in the top {consistency['top']} for its query among "
            f"{made['pool']:,} different positives of all sources and itself. Teacher {teacher['name']}, "
            f"{teacher['max_length']} tokens, weights {teacher['weights_sha256'][:16]}..."
        )
    if consistency and consistency["pairs_per_source"]:
        count = consistency["pairs_per_source"]
        lines.append(f"At most {count:,} pairs of each source were judged, chosen by a hash.")
    return lines


def _shown(row: dict[str, Any]) -> str:
    reason = f" ({row['reason']})" if "reason" in row else ""
    cosines = f" (cosine {row['cosine']:.2f}, the pool's {row['rival']:.2f})" if "cosine" in row else ""
    return f"{_quoted(row['query'])} - {_quoted(row['positive'])}{reason}{cosines}"


def _quoted(text: str) -> str:
    return "`" + (text.replace("`", "'") or " ") + "`"
