"""What corpus preparation did: documents and words of every source through every step, reasons, examples, shards.

Law: the numbers are datatrove's own statistics of the finished tasks, summed; if they and the shards do not add up,
there is no report. Files: `report.json` and `report.md` in the output folder, `tokens/corpus.json` beside the shards.
"""

import gzip
import json
import os
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupSignature
from omegaconf import OmegaConf

_UNITS = ("documents", "words", "characters")
_EXAMPLES = 3  # of each step and reason
_EXAMPLE_CHARACTERS = 160
_SOLE_REASONS = {"empty": "no_text", "minhash": "near_duplicate"}
_PACKAGES = ("datatrove", "lingua-language-detector", "datasets", "tokenizers", "transformers")

Counts = dict[str, dict[str, int]]  # {source: {unit: count}}


class WriteReport(PipelineStep):
    """Last step of the last task: checks that nothing was lost and writes the report and `corpus.json`."""

    type = "REPORT"
    name = "report"

    def __init__(self, output_dir: str):
        super().__init__()
        self.output_dir = output_dir

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1):
        root = Path(self.output_dir)
        report = corpus_report(root)
        _write(root / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        _write(root / "report.md", markdown(report))
        _write(root / "tokens" / "corpus.json", json.dumps(report["corpus"], indent=1) + "\n")


def corpus_report(root: Path) -> dict[str, Any]:
    """The report of a finished run.

    Args:
        root: Its output folder.

    Returns:
        `recipe`, `versions`; `steps`, each with counts `before`, `removed` and `kept` by source and unit, documents
        by `reasons`, removed `lines` and `examples`; `seconds`, the time in datatrove's steps by stage, summed over
        tasks; `corpus`, what lies in the shards.

    Raises:
        RuntimeError: Documents were lost or doubled between steps, or shards are missing or of another tokenizer.
    """
    recipe = OmegaConf.to_container(OmegaConf.load(root / "recipe.yaml"))
    sources = [source["name"] for source in recipe["sources"]]
    stages = {stage.name: totals(stage) for stage in sorted((root / "logs").iterdir())}
    filtering, tokenising = stages["filter"], stages["tokens"]
    _check_flow(recipe, sources, stages)
    kept = {name: _by_source(filtering[f"READER: {name}"], sources)[name] for name in sources}
    steps = []
    for name in step_names(recipe):
        counts, before = tokenising if name == "minhash" else filtering, kept
        kept = _by_source(counts[f"TALLY: {name}"], sources)
        steps.append(_step(name, counts[f"FILTER: {name}"], before, kept) | {"examples": {}})
        steps[-1]["examples"] = examples(root / "removed" / name, steps[-1]["reasons"])
    return {
        "recipe": recipe,
        "versions": {package: version(package) for package in _PACKAGES},
        "steps": steps,
        "seconds": {
            stage: {step: round(counts["seconds"], 1) for step, counts in steps.items() if counts["seconds"] > 0}
            for stage, steps in stages.items()
        },
        "corpus": {
            **corpus(root / "tokens", tokenising["WRITER: token shards"], kept),
            "heldout_share": recipe["heldout_share"],
        },
    }


def _step(name: str, counts: Counter, before: Counts, kept: Counts) -> dict[str, Any]:
    """One step of the report; `counts` are its filter's own: reasons and lines."""
    difference = _difference(before, kept)
    reasons = _counted(counts, "dropped_")
    if name in _SOLE_REASONS and difference["removed"]["all"]["documents"]:
        reasons = {_SOLE_REASONS[name]: difference["removed"]["all"]["documents"]}
    return {"step": name, **difference, "reasons": reasons, "lines": _counted(counts, "line-filter-")}


def _check_flow(recipe: dict[str, Any], sources: list[str], stages: dict[str, dict[str, Counter]]):
    """Raises unless each stage read what the one before wrote: duplicates are known by their place in it."""
    last = [name for name in step_names(recipe) if name != "minhash"][-1]
    kept = _by_source(stages["filter"][f"TALLY: {last}"], sources)
    read = _by_source(stages["tokens"]["TALLY: filtered"], sources)
    _same(read, kept, "the writer of shards read", "the filters kept")
    if recipe["minhash"]:
        signed = stages["signatures"][f"{MinhashDedupSignature.type}: {MinhashDedupSignature.name}"]
        _same(int(signed["total"]), _sum(kept)["documents"], "signatures have", "the filters kept")


def step_names(recipe: dict[str, Any]) -> list[str]:
    """The steps that remove documents, in order."""
    names = ["empty"] + ["language"] * bool(recipe["language"])
    names += [quality["name"] or quality["filter"] for quality in recipe["quality"]]
    return names + ["minhash"] * bool(recipe["minhash"])


def totals(stage: Path) -> dict[str, Counter]:
    """Statistics of a stage summed over its tasks: {step: {key: total, "seconds": time in the step}}."""
    sums: dict[str, Counter] = defaultdict(Counter)
    for file in sorted((stage / "stats").glob("*.json")):
        for step in json.loads(file.read_text(encoding="utf-8")):
            for key, value in {**step["stats"], "seconds": step["time_stats"]}.items():
                sums[step["name"]][key] += value["total"] if isinstance(value, dict) else value
    return sums


def _by_source(counts: Counter, sources: list[str]) -> Counts:
    return {source: {unit: int(counts.get(f"{source}|{unit}", 0)) for unit in _UNITS} for source in sources}


def _difference(before: Counts, after: Counts) -> dict[str, Counts]:
    """Before, removed and kept by source, and under "all" their sums."""
    before, after = ({**counts, "all": _sum(counts)} for counts in (before, after))
    removed = {
        source: {unit: int(count - after[source][unit]) for unit, count in counts.items()}
        for source, counts in before.items()
    }
    return {"before": before, "removed": removed, "kept": after}


def _sum(counts: Counts) -> dict[str, int]:
    return {unit: int(sum(source[unit] for source in counts.values())) for unit in _UNITS}


def _counted(counts: Counter, prefix: str) -> dict[str, int]:
    """The counts under a prefix, largest first."""
    found = {key.removeprefix(prefix): int(count) for key, count in counts.items() if key.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _same(counts: Any, others: Any, what: str, other: str):
    if counts != others:
        raise RuntimeError(f"documents were lost or doubled: {what} {counts}, {other} {others}.")


def examples(folder: Path, reasons: dict[str, int]) -> dict[str, list[dict[str, str]]]:
    """The first removed texts of each reason, cut short, spread over sources where there are several.

    Args:
        folder: What the step's exclusion writer wrote.
        reasons: Documents by reason; reading ends when each has its examples.
    """
    found: dict[str, dict[str, list[str]]] = {reason: defaultdict(list) for reason in reasons}
    wanting = {reason: min(_EXAMPLES, count) for reason, count in reasons.items()}
    for file in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                reason = row["metadata"].get("filter_reason", next(iter(reasons), None))
                texts = found[reason][row["metadata"]["source"]]
                if len(texts) < _EXAMPLES:
                    texts.append(" ".join(row["text"].split())[:_EXAMPLE_CHARACTERS])
        if all(sum(map(len, found[reason].values())) >= count for reason, count in wanting.items()):
            break
    return {reason: _spread(texts) for reason, texts in found.items()}


def _spread(texts: dict[str, list[str]]) -> list[dict[str, str]]:
    """The first text of each source, then the second of each, up to `_EXAMPLES`."""
    rows = [
        {"source": source, "text": of_source[index]}
        for index in range(_EXAMPLES)
        for source, of_source in texts.items()
        if index < len(of_source)
    ]
    return rows[:_EXAMPLES]


def corpus(folder: Path, written: Counter, expected: Counts) -> dict[str, Any]:
    """What lies in the shards, from their own metadata.

    Args:
        folder: With SPLIT/SOURCE/*.parquet.
        written: The writers' counts of documents, under "SOURCE|SPLIT".
        expected: What the last step kept.

    Returns:
        The column, the tokenizer's identity, documents and tokens in all and for each split and source.

    Raises:
        RuntimeError: See `corpus_report`.
    """
    identities, splits = set(), {"train": {}, "heldout": {}}
    for split, sources in splits.items():
        for name in expected:
            shards = [_shard(file) for file in sorted((folder / split / name).glob("*.parquet"))]
            identities |= {
                tuple(shard[key] for key in ("tokenizer", "vocab_size", "tokenizer_sha256")) for shard in shards
            }
            sources[name] = {unit: sum(int(shard[unit]) for shard in shards) for unit in ("documents", "tokens")}
            sources[name]["shards"] = len(shards)
            _same(
                sources[name]["documents"],
                int(written.get(f"{name}|{split}", 0)),
                f"{split}/{name} has",
                "written were",
            )
    for name, counts in expected.items():
        present = sum(splits[split][name]["documents"] for split in splits) + written.get(f"{name}|without_tokens", 0)
        _same(int(present), counts["documents"], f"the shards of {name} have", "the last step kept")
    if len(identities) != 1:
        raise RuntimeError(f"{folder}: shards of {len(identities)} tokenizers: {sorted(identities)}.")
    ((tokenizer, vocab_size, sha256),) = identities
    return {
        "column": "input_ids",
        "special_tokens": False,
        "tokenizer": tokenizer,
        "vocab_size": int(vocab_size),
        "tokenizer_sha256": sha256,
        "documents": sum(counts["documents"] for sources in splits.values() for counts in sources.values()),
        "tokens": sum(counts["tokens"] for sources in splits.values() for counts in sources.values()),
        "without_tokens": int(sum(count for key, count in written.items() if key.endswith("|without_tokens"))),
        "splits": splits,
    }


def _shard(file: Path) -> dict[str, str]:
    """A shard's key-value metadata; reading its footer proves that it is whole."""
    metadata = {key.decode(): value.decode() for key, value in pq.read_metadata(file).metadata.items()}
    return {key: value for key, value in metadata.items() if not key.startswith("ARROW:")}


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = ["# Corpus preparation", "", "Documents and words, all sources together.", "", *_table(report, ["all"])]
    lines += ["", "By source.", "", *_table(report, [name for name in report["steps"][0]["kept"] if name != "all"])]
    lines += ["", "## Token shards", "", *_shard_table(report["corpus"]), "", "## What was removed, and examples", ""]
    for step in report["steps"]:
        if not step["reasons"] and not step["lines"]:
            continue
        lines += [f"### {step['step']}", ""]
        for reason, count in step["reasons"].items():
            lines.append(f"- **{reason}**: {count:,} documents")
            lines += [f"  - {row['source']}: {_quoted(row['text'])}" for row in step["examples"].get(reason, [])]
        lines += [f"- lines, {reason}: {count:,}" for reason, count in step["lines"].items()]
        lines.append("")
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    lines += [_times(report["seconds"]), "", f"Made with {versions}. The recipe is in report.json.", ""]
    return "\n".join(lines)


def _times(seconds: dict[str, dict[str, float]]) -> str:
    """Shares of the time, one run on one machine; below 1 % left out."""
    total = sum(sum(steps.values()) for steps in seconds.values()) or 1.0
    shares = [
        (count / total, f"{step} ({stage})") for stage, steps in seconds.items() for step, count in steps.items()
    ]
    large = ", ".join(f"{name} {share:.0%}" for share, name in sorted(shares, reverse=True) if share >= 0.01)
    return f"Where the time went, reading aside: {large}."


def _table(report: dict[str, Any], sources: list[str]) -> list[str]:
    rows = ["| step | source | documents in | removed | | words in | removed | |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for step in report["steps"]:
        for source in sources:
            cells = [step["step"], source]
            for unit in ("documents", "words"):
                before, removed = step["before"][source][unit], step["removed"][source][unit]
                cells += [f"{before:,}", f"{removed:,}", f"{removed / max(before, 1):.2%}"]
            rows.append(f"| {' | '.join(cells)} |")
    kept = report["steps"][-1]["kept"]
    rows += [f"| kept | {name} | {kept[name]['documents']:,} | | | {kept[name]['words']:,} | | |" for name in sources]
    return rows


def _shard_table(corpus: dict[str, Any]) -> list[str]:
    rows = [
        f"Tokenizer {corpus['tokenizer']} ({corpus['vocab_size']:,} entries, tokenizer.json sha256 "
        f"{corpus['tokenizer_sha256'][:16]}...), column `{corpus['column']}`, a document a row, no special tokens.",
        "",
        "| split | source | documents | tokens | files |",
        "|---|---|--:|--:|--:|",
    ]
    for split, sources in corpus["splits"].items():
        for name, counts in sources.items():
            rows.append(f"| {split} | {name} | {counts['documents']:,} | {counts['tokens']:,} | {counts['shards']} |")
    return rows


def _quoted(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
