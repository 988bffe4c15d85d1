"""Is one long vector worth it? The table and the figure from the records of `evaluation.long_documents`.

Law: everything here is computed from the records and their samples; a difference is paired, document by document, and
called one only where its 95 % interval excludes 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .length_plot import COLOURS, MARKERS, matplotlib_figure
from .metrics import MEASURES, TASK_MEASURES
from .records import Samples, model_of
from .significance import Difference, differences

SHORT = 512  # tokens of the models that a long one is compared with

ASKED = {
    "long/FairytaleQA-stories": "a question about a detail",
    "long/SQuAD-dev-articles": "a question about a detail",
    "long/QMSum-long": "a summary, or a question with its answer",
    "long/DepthPassage": "a paragraph taken out of the last third",
    "long/DepthPassage/middle": "a paragraph taken out of the middle",
    "long/DepthPassage/early": "a paragraph taken out of the first third",
    "clustering/MovieReviews": "clusters: liked or not",
    "clustering/BBCNews": "clusters: the topic",
    "NarrativeQARetrieval": "a question about a detail",
    "WikiCitiesClustering": "clusters: the country",
    "BigPatentClustering": "clusters: the class",
    "LoCoSummScreenFDRetrieval": "a summary",
    "LoCoGovReportRetrieval": "a summary",
    "LoCoQMSumRetrieval": "a question",
    "LoCoQasperTitleRetrieval": "a title",
    "LoCoQasperAbstractRetrieval": "an abstract",
}
"""Set -> what is asked of a document."""

CONTRASTS = {
    "whole - first": ("whole", "first"),
    "whole - mean of chunks": ("whole", "mean"),
    "whole - best chunk": ("whole", "best"),
    "late - best chunk": ("late", "best"),
    "best chunk - first": ("best", "first"),
}
"""Heading -> the two ways; "first" is the first `SHORT` tokens."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The ways of one model on one set.

    Attributes:
        ways: "first", "whole", "mean", "best", "late" -> record; those that the model and the set have. A model whose
            limit is shorter than the documents has no "whole": the most that it reads is "first".
        contrasts: Heading of `CONTRASTS` -> paired difference, where both ways are there.
    """

    ways: dict[str, Record]
    contrasts: dict[str, Difference]

    @property
    def record(self) -> Record:
        """Any of the records: their model, set and sizes are the same."""
        return next(iter(self.ways.values()))


def measure_of(record: Record) -> str:
    """The measure that a record is about."""
    return TASK_MEASURES[record["task"]][0]


def score_of(record: Record) -> float:
    """Its score, 0 to 1."""
    return record["metrics"][measure_of(record)]


def grouped(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each set (or sample of it), in the order in which they were written."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["set"], record["settings"]["set_sha256"]), []).append(record)
    return list(groups.values())


def by_model(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each model, of other weights or another pipeline apart."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault((record["model"], *model_of(record)), []).append(record)
    return list(groups.values())


def whole_records(records: Sequence[Record]) -> list[Record]:
    """Those of one vector of the first so many tokens, by length."""
    whole = [record for record in records if not _chunked(record)]
    return sorted(whole, key=lambda record: record["settings"]["tokens"])


def answer(records: Sequence[Record], samples: dict[str, Samples]) -> Answer | None:
    """The ways of one model on one set: the longest length, and the smallest chunks; None without any length.

    Args:
        records: Of one model and set.
        samples: `samples` of a record -> what was measured.
    """
    whole = whole_records(records)
    if not whole:
        return None
    limit = whole[-1]["settings"]["limit"]
    ways = {"whole": whole.pop()} if limit is None or limit >= whole[-1]["sizes"]["longest_tokens"] else {}
    short = [record for record in whole if record["settings"]["tokens"] <= SHORT]
    ways |= {"first": short[-1]} if short else {}
    for record in sorted(records, key=lambda record: record["settings"]["tokens"]):
        if _chunked(record):
            ways.setdefault(record["settings"]["kind"], record)
    contrasts = {
        heading: paired(ways[one], ways[other], samples)
        for heading, (one, other) in CONTRASTS.items()
        if one in ways and other in ways
    }
    return Answer(ways, contrasts)


def paired(record: Record, other: Record, samples: dict[str, Samples]) -> Difference:
    """What a record has more than another of the same set."""
    found = differences(record["task"], samples[other["samples"]], samples[record["samples"]])
    return found[measure_of(record)]


def answers(records: Sequence[Record], samples: dict[str, Samples]) -> list[Answer]:
    """One answer a set and model, set by set."""
    found = [answer(of_model, samples) for of_set in grouped(records) for of_model in by_model(of_set)]
    return [each for each in found if each is not None]


def sign(difference: Difference) -> int:
    """1, -1, or 0 where the interval holds 0 or is undefined."""
    if difference.interval is None:
        return 0
    low, high = difference.interval
    return int(low > 0) - int(high < 0)


def _set_cells(record: Record) -> list[str]:
    sizes = record["sizes"]
    count = f"{sizes['documents']:,}"
    if sizes["of_documents"] != sizes["documents"]:
        count += f" of {sizes['of_documents']:,}"
    queries = f"{sizes['queries']:,} x {count}" if "queries" in sizes else count
    tokens = f"{sizes['median_tokens']:,} ({sizes['longest_tokens']:,})"
    return [record["set"], ASKED.get(record["set"], "-"), queries, tokens]


def _way_cell(record: Record | None) -> str:
    if record is None:
        return "-"
    return f"{score_of(record):.3f} ({record['settings']['tokens']:,})"


def _difference_cell(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    value = f"{difference.value:+.3f}"
    if sign(difference):
        value = f"**{value}**"
    if difference.interval is None:
        return value
    return f"{value} [{difference.interval[0]:+.3f}, {difference.interval[1]:+.3f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    rule = "|" + "---|" * left + "---:|" * (len(header) - left)
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def summary(found: Sequence[Answer]) -> list[str]:
    """One line for each contrast: on which sets it is above, below, or neither."""
    lines = []
    for heading in CONTRASTS:
        places: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for each in found:
            if heading in each.contrasts:
                name = f"{each.record['set']} ({each.record['model']})"
                places[sign(each.contrasts[heading])].append(name)
        parts = [
            f"{word}: {', '.join(places[of])}"
            for of, word in ((1, "above 0"), (-1, "below 0"), (0, "no difference"))
            if places[of]
        ]
        if parts:
            lines.append(f"- **{heading}** {'; '.join(parts)}.")
    return lines


def markdown(records: Sequence[Record], samples: dict[str, Samples]) -> str:
    """The answer, and every score behind it, in Markdown."""
    if not records:
        return "No scores.\n"
    found = answers(records, samples)
    measures = ", ".join(MEASURES[name] for name in dict.fromkeys(map(measure_of, records)))
    lines = [
        "# Is one vector of a long document worth it?", "",
        f"{measures}. `first` is the first {SHORT} tokens, or the most up to that which the model reads; `whole` the "
        "longest length that was run, or the first that holds every document; in brackets the tokens read, or "
        "those of a chunk. Differences are paired; 95 % intervals from a bootstrap over documents, bold where they "
        "exclude 0.",
        "", *summary(found), "",
    ]  # fmt: skip
    header = ["set", "asked for by", "queries x documents", "tokens: median (longest)", "model"]
    header += ["first", "whole", "mean of chunks", "best chunk", "late, best chunk"]
    kinds = ("first", "whole", "mean", "best", "late")
    rows = [
        [*_set_cells(each.record), each.record["model"], *(_way_cell(each.ways.get(kind)) for kind in kinds)]
        for each in found
    ]
    lines += [*_table(header, rows, 5), "", "## Differences", ""]
    rows = []
    for each in found:
        best = each.ways.get("best")
        vectors = f"{best['sizes']['vectors'] / best['sizes']['documents']:.0f}" if best else "-"
        cells = [_difference_cell(each.contrasts.get(heading)) for heading in CONTRASTS]
        rows.append([each.record["set"], each.record["model"], *cells, vectors])
    lines += _table(["set", "model", *CONTRASTS, "vectors a document for chunks"], rows, 2)
    lines += _across(found, samples)
    lines += ["", "## Every score", "", *_every_score(records), "", "```bash"]
    commands = dict.fromkeys(record["command"] for record in records)
    return "\n".join([*lines, *commands, "```"]) + "\n"


def _across(found: Sequence[Answer], samples: dict[str, Samples]) -> list[str]:
    """One long vector of a model against what a model with a limit makes of the same documents; none without both."""
    kinds = {"first": "its first tokens", "mean": "the mean of its chunks", "best": "its best chunk"}
    rows = []
    for long in (each for each in found if "whole" in each.ways):
        for short in (each for each in found if "whole" not in each.ways):
            if long.record["settings"]["set_sha256"] == short.record["settings"]["set_sha256"]:
                cells = [
                    _difference_cell(
                        paired(long.ways["whole"], short.ways[kind], samples) if kind in short.ways else None
                    )
                    for kind in kinds
                ]
                rows.append([long.record["set"], f"{long.record['model']} - {short.record['model']}", *cells])
    if not rows:
        return []
    return ["", "## One long vector against a model that reads less", "", *_table(
        ["set", "models", *(f"whole - {name}" for name in kinds.values())], rows, 2)]  # fmt: skip


def _every_score(records: Sequence[Record]) -> list[str]:
    rows = []
    for record in (record for of_set in grouped(records) for record in of_set):
        interval = record["metrics"]["interval_95"]
        rows.append(
            [
                record["set"], record["model"], record["settings"]["kind"], f"{record['settings']['tokens']:,}",
                f"{score_of(record):.4f}", f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "-",
                f"{record['sizes']['vectors']:,}",
            ]
        )  # fmt: skip
    return _table(["set", "model", "way", "tokens", "score", "95 % interval", "vectors"], rows, 3)


def figure_of(records: Sequence[Record]) -> Any:
    """The figure: a panel a set, the score against the tokens read, chunking as horizontal lines; bands are intervals.

    Returns:
        matplotlib's `Figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups = grouped(records)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    systems = {(r["model"], r["settings"]["kind"], r["settings"]["tokens"] * _chunked(r)) for r in records}
    legend = 0.25 * -(-len(systems) // columns)  # inches
    figure = matplotlib_figure()(figsize=(4.6 * columns, 3.6 * rows + legend), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    colours: dict[str, str] = {}
    for axis, of_set in zip(axes, groups, strict=False):
        _panel(axis, of_set, colours)
    for axis in axes[len(groups) :]:
        axis.remove()
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _chunked(record: Record) -> bool:
    return record["settings"]["kind"] != "whole"


def _panel(axis: Any, records: Sequence[Record], colours: dict[str, str]):
    for number, of_model in enumerate(by_model(records)):
        name = of_model[0]["model"]
        whole = whole_records(of_model)
        colour = colours.setdefault(f"{name} whole", COLOURS[len(colours) % len(COLOURS)])
        tokens = [record["settings"]["tokens"] for record in whole]
        axis.plot(
            tokens, [score_of(record) for record in whole], color=colour, marker=MARKERS[number], markersize=4,
            label=f"{name}, one vector",
        )  # fmt: skip
        bands = [record["metrics"]["interval_95"] for record in whole]
        if all(bands):
            axis.fill_between(tokens, *zip(*bands, strict=True), color=colour, alpha=0.15, linewidth=0)
        for record in of_model:
            if not _chunked(record):
                continue
            kind = record["settings"]["kind"]
            colour = colours.setdefault(f"{name} {kind}", COLOURS[len(colours) % len(COLOURS)])
            label = {"mean": "mean of chunks", "best": "best chunk", "late": "late, best chunk"}[kind]
            axis.axhline(
                score_of(record), color=colour, linestyle={"mean": ":", "best": "--", "late": "-."}[kind],
                linewidth=1.4, label=f"{name}, {label} of {record['settings']['tokens']}",
            )  # fmt: skip
    ticks = sorted({record["settings"]["tokens"] for record in whole_records(records)})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set(xlabel="tokens read", ylabel=MEASURES[measure_of(records[0])])
    axis.set_title(f"{records[0]['set']}\n{ASKED.get(records[0]['set'], '')}", fontsize=9)
    axis.grid(alpha=0.3)


def write_figure(path: Path, records: Sequence[Record]):
    """Writes the figure (.png, .svg or .pdf, by the name), if there is a record; see `figure_of`."""
    if records:
        figure_of(records).savefig(path, dpi=150)
