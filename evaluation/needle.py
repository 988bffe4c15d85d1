"""Where in a long document may the relevant passage be? Real passages inserted at every depth of real text.

    python -m evaluation.needle --model hub_repo/tiny --baseline all-MiniLM-L6-v2 --data DATA --output FOLDER

A needle is a query and the passage that answers it (`--needles`, a retrieval set); a haystack is a stretch of other
text (`--haystacks`). In every document of a cell of the figure the needle lies at the same depth, each document has
another needle, and each query looks for its own: as nothing but the needle tells which document it is, the score of a
document without its needle is chance, which is measured, too.

Laws: the same needles and haystacks at every length, depth and way, so that differences are paired; a document has as
many tokens as the cell says, the needle and special tokens included, up to a token or two (counted by the first
model's tokenizer); a needle stands between two sentences, nearest to its depth. The score is nDCG@10.
COST: every document is embedded anew for each depth.
NOTE: for a paragraph at its natural place see the sets long/DepthPassage of `evaluation.long_documents`.
"""

import argparse
import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_jina_bert import sentence_spans

from .command_line import placement_of
from .document_vectors import KINDS, SPECIAL_TOKENS, Reader, Way, document_vectors, load_readers, ways_of
from .late_chunking import rank
from .length_plot import matplotlib_figure
from .metrics import retrieval_samples, scores
from .reader_runs import Answer, Store, check_readers, reader_parser, run_command
from .records import Samples, of_last_weights, versions
from .sets import EvaluationError, RetrievalSet, load_set
from .significance import differences, intervals

logger = logging.getLogger(__name__)

LENGTHS = (512, 1024, 2048, 4096, 8192)
DEPTHS = (0, 25, 50, 75, 100)  # percent
SHORT = 512
NEEDLE_TOKENS = 128  # of a needle at most
MEASURE = "ndcg_at_10"
_SEPARATOR = "\n\n"
_SEED = 0


@dataclass(frozen=True)
class Needle:
    """A query, the passage that answers it, and the tokens of that."""

    query: str
    passage: str
    tokens: int


def pick_needles(dataset: RetrievalSet, count: int, tokenizer) -> list[Needle]:
    """Queries drawn at random, each with another passage of `NEEDLE_TOKENS` tokens at most.

    Raises:
        EvaluationError: The set has not so many.
    """
    best = {query: max(judged, key=judged.__getitem__) for query, judged in dataset.qrels.items()}
    queries = list(dataset.queries)
    found: dict[str, Needle] = {}
    for index in np.random.default_rng(_SEED).permutation(len(queries)):
        passage = best[queries[index]]
        text = dataset.documents[passage].strip()
        if passage in found or not text:
            continue
        tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokens <= NEEDLE_TOKENS:
            found[passage] = Needle(dataset.queries[queries[index]], text, tokens)
        if len(found) == count:
            return list(found.values())
    raise EvaluationError(
        f"--documents {count}: {dataset.name} has {len(found)} passages of at most {NEEDLE_TOKENS} tokens."
    )


def pick_haystacks(texts: Sequence[str], tokens: int, count: int, tokenizer) -> list[str]:
    """Stretches of consecutive documents, none in two of them, of `tokens` tokens at least.

    Raises:
        EvaluationError: There are not so many.
    """
    haystacks: list[str] = []
    parts: list[str] = []
    length = 0
    for text in texts:
        parts.append(text.strip())
        length += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if length >= tokens:
            haystacks.append(_SEPARATOR.join(parts))
            parts, length = [], 0
        if len(haystacks) == count:
            return haystacks
    raise EvaluationError(f"--documents {count}: the haystacks hold {len(haystacks)} stretches of {tokens:,} tokens.")


class Haystack:
    """A text into which needles are put.

    Args:
        text: At least as many tokens as the longest document.
        tokenizer: A fast tokenizer.
    """

    def __init__(self, text: str, tokenizer):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.text = text
        self.ends = [end for _, end in encoded["offset_mapping"]]
        self.starts = [start for start, _ in sentence_spans(text)]

    def with_needle(self, needle: Needle | None, tokens: int, depth: float) -> str:
        """A document.

        Args:
            needle: None for the same document without one.
            tokens: Of the document, special ones included.
            depth: Percent of the haystack's tokens that come before the needle.
        """
        budget = tokens - SPECIAL_TOKENS - (needle.tokens if needle else 0)
        end = self.ends[budget - 1]
        if needle is None:
            return self.text[:end]
        before = round(budget * depth / 100)
        wanted = self.ends[before - 1] if before else 0
        places = [*self.starts[: bisect_left(self.starts, end)], end]
        place = min(places, key=lambda start: abs(start - wanted))
        parts = (self.text[:place].rstrip(), needle.passage, self.text[place:end].lstrip())
        return _SEPARATOR.join(part for part in parts if part)


def score(reader: Reader, queries: np.ndarray, texts: Sequence[str], ways: Sequence[Way]) -> dict[Way, Samples]:
    """Ranks the documents for every query, whose own is the one with its number; see `evaluation.metrics`."""
    names = [str(number) for number in range(len(texts))]
    found = {}
    for way, vectors in document_vectors(reader, texts, ways):
        runs = rank(queries, vectors.vectors, names, vectors.first)
        qrels = {name: {name: 1} for name in names}
        found[way] = retrieval_samples(dict(zip(names, runs, strict=True)), qrels)
    return found


@dataclass(frozen=True)
class Plan:
    """What is put where.

    Attributes:
        needles: One for each document.
        haystacks: As many.
        source: What decides them, for the records.
        lengths: Tokens of the documents.
        depths: Percent; None is the control without needles.
    """

    needles: list[Needle]
    haystacks: list[Haystack]
    source: dict[str, Any]
    lengths: Sequence[int]
    depths: Sequence[float | None]

    def texts(self, length: int, depth: float | None) -> list[str]:
        """The documents of one cell."""
        return [
            haystack.with_needle(None if depth is None else needle, length, depth or 0)
            for haystack, needle in zip(self.haystacks, self.needles, strict=True)
        ]


def evaluate(reader: Reader, plan: Plan, store: Store, *, kinds: Sequence[str], chunk: int, command: str):
    """Scores every cell that the store has not, and adds each as soon as it is scored.

    Args:
        reader: The model.
        plan: Documents.
        store: Where scores go.
        kinds: Of `document_vectors.KINDS`; "whole" is also the first `SHORT` tokens.
        chunk: Tokens of a chunk.
        command: Command line, for the records.
    """
    queries = None
    for length in plan.lengths:
        ways = [way for way in ways_of(reader, [SHORT, length], [chunk]) if way.kind in kinds and way.tokens <= length]
        for depth in plan.depths:
            used = [way for way in ways if depth is not None or way.kind == "whole"]
            keys = {way: _key(reader, plan, way, length=length, depth=depth) for way in used}
            missing = [way for way in used if store.find(keys[way]) is None]
            if not missing:
                continue
            queries = reader.queries([needle.query for needle in plan.needles]) if queries is None else queries
            texts = plan.texts(length, depth)
            for way, samples in score(reader, queries, texts, missing).items():
                value = scores("retrieval", samples)[MEASURE]
                metrics = {MEASURE: value, "interval_95": intervals("retrieval", samples)[MEASURE]}
                record = {**keys[way], "task": "retrieval", "metrics": metrics, "sizes": {"documents": len(texts)}}
                store.add({**record, **reader.placed, "versions": versions(), "command": command}, samples)
                logger.info(
                    "%s, %s of %s tokens, %s %s, depth %s: %.3f",
                    reader.name, len(texts), f"{length:,}", way.kind, way.tokens, depth, value,
                )  # fmt: skip


def _key(reader: Reader, plan: Plan, way: Way, *, length: int, depth: float | None) -> dict[str, Any]:
    settings = {**asdict(way), "length": length, "depth": depth, **plan.source, **reader.settings}
    return {"model": reader.name, "set": "needle", "settings": settings}


_OF_A_READER = ("kind", "tokens", "length", "depth", "dtype", "weights_sha256", "pipeline_sha256", "limit")


def _source_of(record: dict[str, Any]) -> dict[str, Any]:
    """What was read and asked, without by whom and where."""
    return {name: value for name, value in record["settings"].items() if name not in _OF_A_READER}


Rows = dict[tuple[str, str], dict[tuple[int, float | None], dict[str, Any]]]


def rows_of(records: Sequence[dict[str, Any]]) -> Rows:
    """(Model, way) -> (length, depth) -> record, of the needles and haystacks of the last record."""
    rows: Rows = {}
    for record in of_last_weights(records):
        settings = record["settings"]
        if _source_of(record) != _source_of(records[-1]):  # others have another chance, and cannot be paired
            continue
        if settings["kind"] == "whole":
            way = "whole" if settings["tokens"] == settings["length"] else f"first {settings['tokens']}"
        else:
            way = f"{settings['kind']} of {settings['tokens']}"
        rows.setdefault((record["model"], way), {})[settings["length"], settings["depth"]] = record
    return rows


def markdown(records: Sequence[dict[str, Any]], samples: dict[str, Samples]) -> str:
    """Scores by length and depth, and what the end of a document costs against its start."""
    rows = rows_of(records)
    depths = sorted({depth for cells in rows.values() for _, depth in cells if depth is not None})
    source = records[-1]["settings"]
    lines = [
        "# Where in a long document may the relevant passage be?", "",
        f"nDCG@10 of {source['documents']} queries over as many documents: passages of {source['needles']} at a depth "
        f"(percent) of text of {source['haystacks']}. `none` is the control without the passages: chance. "
        "`last - first`: the last depth less the first, paired, with a 95 % interval from a bootstrap over queries; "
        "bold where it excludes 0.", "",
        f"| model | way | tokens | none | {' | '.join(f'{depth:g}' for depth in depths)} | last - first |",
        "|---|---|---:|" + "---:|" * (len(depths) + 2),
    ]  # fmt: skip
    for (model, way), cells in rows.items():
        for length in sorted({length for length, _ in cells}):
            found = [cells.get((length, depth)) for depth in (None, *depths)]
            shown = [f"{record['metrics'][MEASURE]:.3f}" if record else "-" for record in found]
            ends = _difference(found[1], found[-1], samples) if len(depths) > 1 else "-"
            lines.append(f"| {model} | {way} | {length:,} | {' | '.join(shown)} | {ends} |")
    commands = dict.fromkeys(record["command"] for record in records)
    return "\n".join([*lines, "", "```bash", *commands, "```"]) + "\n"


def _difference(first: dict | None, last: dict | None, samples: dict[str, Samples]) -> str:
    if first is None or last is None:
        return "-"
    found = differences("retrieval", samples[first["samples"]], samples[last["samples"]])[MEASURE]
    if found.interval is None:
        return f"{found.value:+.3f}"
    low, high = found.interval
    value = f"**{found.value:+.3f}**" if low > 0 or high < 0 else f"{found.value:+.3f}"
    return f"{value} [{low:+.3f}, {high:+.3f}]"


def write_figure(path: Path, records: Sequence[dict[str, Any]]):
    """A panel for each model and way: lengths by depths, the score in every cell.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = rows_of(records)
    lengths = sorted({length for cells in rows.values() for length, _ in cells})
    depths = sorted({depth for cells in rows.values() for _, depth in cells if depth is not None})
    columns = min(3, len(rows))
    figure = matplotlib_figure()(figsize=(4.2 * columns, 3.2 * -(-len(rows) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(rows) // columns), columns, squeeze=False).ravel()
    for axis, ((model, way), cells) in zip(axes, rows.items(), strict=False):
        grid = np.array([[_value(cells.get((length, depth))) for length in lengths] for depth in depths])
        axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if value < 0.6 else "black")  # fmt: skip
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
        axis.set(xlabel="tokens of a document", ylabel="depth of the passage, %")
        axis.set_title(f"{model}, {way}", fontsize=9)
    for axis in axes[len(rows) :]:
        axis.remove()
    figure.suptitle(
        f"nDCG@10 of {records[-1]['settings']['documents']} passages, each in its own document", fontsize=10
    )
    figure.savefig(path, dpi=150)


def _value(record: dict[str, Any] | None) -> float:
    return float("nan") if record is None else record["metrics"][MEASURE]


ANSWER = Answer(
    records="needle.json", table="needle.md", figure="needle.png", markdown=markdown, write_figure=write_figure
)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for an unknown option."""
    parser = reader_parser("evaluation.needle", __doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder that has eval/")
    parser.add_argument("--needles", default="ir/SQuAD-dev", help="retrieval set with short passages")
    parser.add_argument("--haystacks", default="long/DepthPassage", help="retrieval set with long documents")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens of a document")
    parser.add_argument("--depths", nargs="+", type=float, default=list(DEPTHS), help="percent")
    parser.add_argument("--documents", type=int, default=32, help="documents and needles")
    parser.add_argument(
        "--kinds", nargs="+", default=["whole", "best"], choices=KINDS, help="ways to embed a document"
    )
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a chunk")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace):
    """Raises `EvaluationError` for numbers and paths that cannot be meant."""
    check_readers(arguments)
    for length in arguments.lengths:
        if length < 2 * NEEDLE_TOKENS:
            raise EvaluationError(f"--lengths {length}: the least is {2 * NEEDLE_TOKENS}, twice a needle.")
    for depth in arguments.depths:
        if not 0 <= depth <= 100:
            raise EvaluationError(f"--depths {depth:g}: is not in 0 ... 100 percent.")
    for option, least in (("documents", 2), ("chunk", 1)):
        if getattr(arguments, option) < least:
            raise EvaluationError(f"--{option} {getattr(arguments, option)}: the least is {least}.")


def plan_of(arguments: argparse.Namespace, tokenizer) -> Plan:
    """Chooses needles and haystacks.

    Raises:
        EvaluationError: Sets that are not there, are no retrieval sets, or hold too little.
    """
    sets = {}
    for option in ("needles", "haystacks"):
        dataset = load_set(arguments.data, getattr(arguments, option))
        if not isinstance(dataset, RetrievalSet):
            raise EvaluationError(f"--{option} {dataset.name}: is no retrieval set.")
        sets[option] = dataset
    needles = pick_needles(sets["needles"], arguments.documents, tokenizer)
    texts = list(sets["haystacks"].documents.values())
    stretches = pick_haystacks(texts, max(arguments.lengths), arguments.documents, tokenizer)
    haystacks = [Haystack(text, tokenizer) for text in stretches]
    source = {option: dataset.name for option, dataset in sets.items()}
    source |= {f"{option}_sha256": dataset.sha256 for option, dataset in sets.items()}
    # How far a haystack reaches depends on the longest length.
    source |= {"documents": arguments.documents, "stretch": max(arguments.lengths)}
    return Plan(needles, haystacks, source, arguments.lengths, [None, *arguments.depths])


def run(arguments: argparse.Namespace, *, command: str) -> Store:
    """Loads what the command line names, and scores it.

    Raises:
        EvaluationError: Something it names is missing or malformed.
    """
    check(arguments)
    placement = placement_of(arguments)
    store = ANSWER.store(arguments.output)
    readers = load_readers(arguments.model, arguments.baseline, placement)
    plan = plan_of(arguments, readers[0].tokenizer)
    for reader in readers:
        evaluate(reader, plan, store, kinds=arguments.kinds, chunk=arguments.chunk, command=command)
    return store


def main(argv: Sequence[str] | None = None):
    """Entry point; it ends as `evaluation.command_line` says."""
    run_command(argv, module="evaluation.needle", logger=logger, parse=parse_arguments, run=run, answer=ANSWER)


if __name__ == "__main__":
    main()
