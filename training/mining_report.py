"""What mining did: for each source what became of every candidate, of every row, and examples.

Law: the numbers are counted where candidates are removed and rows are written, kept beside each output file, and
summed; if they do not add up there is no report. Nothing in it depends on when or how often the run was interrupted.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from .mining_recipe import MiningRecipe
from .mining_texts import Collection, replacing
from .negative_filters import Candidates, Reason

_EXAMPLES = 3
_EXAMPLE_NEGATIVES = 3
_CHARACTERS = 160
_PACKAGES = ("sentence-transformers", "transformers", "torch", "faiss-cpu", "bm25s", "datasets", "numpy")
_LABELS = {
    Reason.POSITIVE: "known positive",
    Reason.QUERY: "text of the query",
    Reason.SKIPPED: "skipped ranks",
    Reason.DEEPER: "beyond depth",
    Reason.REPEATED: "found twice",
    Reason.TEACHER: "teacher",
    Reason.UNREAD: "not read",
    Reason.CROSS_ENCODER: "cross-encoder",
}


@dataclass
class Tally:
    """Counts of some rows of one source.

    Attributes:
        rows: Rows looked at.
        retrieved: Candidates of all retrievers.
        reasons: Candidates by `Reason`; what is LEFT may be more than what is taken.
        complete: Rows with enough mined negatives.
        filled: Rows that random passages completed.
        short: Rows written with fewer negatives.
        dropped: Rows left out.
        mined: Mined negatives of the written rows.
        random: Random ones.
        rank_sum: Sum of the ranks of the mined ones.
        taken: Mined negatives by retriever.
        examples: Rows with texts cut short.
    """

    rows: int = 0
    retrieved: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    complete: int = 0
    filled: int = 0
    short: int = 0
    dropped: int = 0
    mined: int = 0
    random: int = 0
    rank_sum: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def count(self, candidates: Candidates):
        """Adds what became of candidates."""
        found = np.bincount(candidates.reasons.ravel(), minlength=len(Reason)).tolist()
        found[Reason.NOTHING] = 0
        self.retrieved += sum(found)
        counts = {reason.name: count for reason, count in zip(Reason, found, strict=True) if count}
        self.reasons = dict(Counter(self.reasons) + Counter(counts))

    def row(self, outcome: str) -> str:
        """Adds a row: "complete", "filled", "short" or "dropped", which is returned."""
        self.rows += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        return outcome

    def negatives(self, retrievers: list[str], ranks: list[int], *, random: int):
        """Adds the negatives of a written row: of each mined one the retriever and the rank."""
        self.mined += len(ranks)
        self.random += random
        self.rank_sum += sum(ranks)
        self.taken = dict(Counter(self.taken) + Counter(retrievers))

    def add(self, other: "Tally"):
        """Adds the counts of other rows."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, dict(sorted((Counter(mine) + Counter(value)).items())))
            else:
                setattr(self, name, mine + value)
        self.examples = self.examples[:_EXAMPLES]


def wants_example(tally: Tally, *, place: int, rows: int) -> bool:
    """Whether a row is the next example: one of each third of the rows of an output file."""
    return len(tally.examples) < _EXAMPLES and place >= len(tally.examples) * rows // _EXAMPLES


def example(row: dict[str, Any], score: float, negatives: list[tuple[str, int, str, float]]) -> dict[str, Any]:
    """A row for the report: its texts cut short, and some of its mined negatives.

    Args:
        row: An output row.
        score: The judge's, of the positive; NaN where there is no judge.
        negatives: Text, rank, retriever and score of each.
    """
    return {
        "query": _short(row["query"]),
        "positive": _short(row["positive"]),
        **_score(score),
        "negatives": [
            {"rank": rank, "retriever": retriever, **_score(score), "text": _short(text)}
            for text, rank, retriever, score in negatives[:_EXAMPLE_NEGATIVES]
        ],
    }


def _score(score: float) -> dict[str, float]:
    return {} if np.isnan(score) else {"score": round(float(score), 3)}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "..."


def write_report(recipe: MiningRecipe, collection: Collection, root: Path) -> dict[str, Any]:
    """Sums the counts of all output files; writes `report.json` and `report.md` into the output folder.

    Returns:
        The report.

    Raises:
        RuntimeError: Rows or candidates were lost or doubled.
    """
    sources = {}
    for number, source in enumerate(recipe.sources):
        total = Tally()
        for file in sorted((root / "work" / "counts" / source.name).glob("*.json")):
            total.add(Tally(**json.loads(file.read_text(encoding="utf-8"))))
        expected = int(collection.source_starts[number + 1] - collection.source_starts[number])
        _check(total, expected, source.name)
        sources[source.name] = {**collection.counts[number], **asdict(total)}
    resolved = OmegaConf.to_container(OmegaConf.structured(recipe))
    for key in ("output_dir", "embeddings_dir"):  # where, not what
        resolved.pop(key)
    report = {
        "recipe": resolved,
        "versions": {package: _version(package) for package in _PACKAGES},
        "queries": len(collection.queries),
        "passages": len(collection.passages),
        "sources": sources,
    }
    for name, text in (
        ("report.json", json.dumps(report, indent=1, ensure_ascii=False)),
        ("report.md", markdown(report)),
    ):
        with replacing(root / name) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return report


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check(total: Tally, expected: int, name: str):
    done = total.complete + total.filled + total.short + total.dropped
    if total.rows != expected or done != expected or sum(total.reasons.values()) != total.retrieved:
        raise RuntimeError(
            f"source {name}: rows or candidates were lost or doubled: {expected} rows, {total.rows} looked at, {done} "
            f"accounted for; {total.retrieved} candidates, {sum(total.reasons.values())} accounted for."
        )


def markdown(report: dict[str, Any]) -> str:
    """The report as tables and examples."""
    recipe, sources = report["recipe"], report["sources"]
    lines = [
        "# Hard-negative mining",
        "",
        f"{report['queries']:,} different queries, {report['passages']:,} different passages. Ranked by "
        f"{', '.join(_retriever(retriever) for retriever in recipe['retrievers'])}; {_rules(recipe)}.",
        "",
        "## Rows",
        "",
        "Rows are different pairs. Complete: enough negatives were mined; mean rank: of the mined ones, in the "
        "ranking of their retriever without known positives.",
        "",
        *_row_table(sources),
        "",
        "## Candidates",
        "",
        "Each is counted once, by the first filter that removed it; what is left is more than what is taken.",
        "",
        *_candidate_table(sources),
        "",
        "## Examples",
        "",
    ]
    for name, counts in sources.items():
        lines += [f"### {name}", "", *(line for row in counts["examples"] for line in _example_lines(row)), ""]
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items() if number)
    return "\n".join([*lines, f"Made with {versions}. The recipe is in report.json."])


def _retriever(retriever: dict[str, Any]) -> str:
    length = f" at {retriever['max_length']} tokens" if retriever["max_length"] else ""
    quota = f", quota {retriever['quota']}" if retriever["quota"] is not None else ""
    return f"{retriever['name']} ({retriever['model']}{length}{quota})"


def _rules(recipe: dict[str, Any]) -> str:
    rules = [f"ranks {recipe['skip'] + 1} to {recipe['depth']}", f"fill: {recipe['fill']}"]
    for key in ("teacher", "cross_encoder"):
        judge = recipe[key]
        if judge:
            margins = [f"{name} {judge[name]}" for name in ("margin", "relative_margin") if judge[name] is not None]
            rules.append(f"{key.replace('_', '-')} {judge['model']}, {', '.join(margins)}")
    return "; ".join(rules)


def _row_table(sources: dict[str, Any]) -> list[str]:
    names = sorted({name for counts in sources.values() for name in counts["taken"]})
    heads = [
        "source",
        "read",
        "empty",
        "query = positive",
        "repeated",
        "rows",
        "complete",
        "filled",
        "short",
        "dropped",
    ]
    heads += ["mined", "random", "mean rank", *(f"from {name}" for name in names)]
    rows = [_line(heads), _line(["---", *["--:"] * (len(heads) - 1)])]
    keys = [
        "read",
        "empty",
        "identical",
        "repeated",
        "rows",
        "complete",
        "filled",
        "short",
        "dropped",
        "mined",
        "random",
    ]
    for source, counts in sources.items():
        mean = f"{counts['rank_sum'] / counts['mined']:.1f}" if counts["mined"] else "-"
        taken = [f"{counts['taken'].get(name, 0):,}" for name in names]
        rows.append(_line([source, *(f"{counts[key]:,}" for key in keys), mean, *taken]))
    return rows


def _candidate_table(sources: dict[str, Any]) -> list[str]:
    used = [reason for reason in _LABELS if any(reason.name in counts["reasons"] for counts in sources.values())]
    heads = ["source", "retrieved", *(_LABELS[reason] for reason in used), "left", "taken"]
    rows = [_line(heads), _line(["---", *["--:"] * (len(heads) - 1)])]
    for source, counts in sources.items():
        removed = [f"{counts['reasons'].get(reason.name, 0):,}" for reason in used]
        left = counts["reasons"].get(Reason.LEFT.name, 0)
        rows.append(_line([source, f"{counts['retrieved']:,}", *removed, f"{left:,}", f"{counts['mined']:,}"]))
    return rows


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _example_lines(row: dict[str, Any]) -> list[str]:
    def score(entry: dict[str, Any]) -> str:
        return f", score {entry['score']}" if "score" in entry else ""

    lines = [f"- **{_plain(row['query'])}**", f"  - positive{score(row)}: {_plain(row['positive'])}"]
    return lines + [
        f"  - rank {entry['rank']} of {entry['retriever']}{score(entry)}: {_plain(entry['text'])}"
        for entry in row["negatives"]
    ]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "`" + text.replace("`", "'") + "`"
