"""Late chunking beside naive chunking: nDCG@10 of passages, each ranked by its best chunk.

    python -m evaluation.late_chunking --model hub_repo/tiny --data DATA --sets ir/SQuAD-dev --output results.json

Naive: every chunk is embedded alone. Late: its document is embedded once, and the tokens of the chunk are averaged
(`encode_chunks`). A document is what belongs together of a set, in the order of the file and without titles: passages
of one title, as the paragraphs of an article, or of one id up to its last "#", as the sections of a story. Any other
passage, behind its title, is a document by itself; that is the protocol of the paper (arXiv 2409.04701, section 4).

Laws: both ways embed the same characters in each chunk, and the same queries; a passage scores the greatest cosine of
its chunks; the measure is trec_eval's. The interval is that of the paired difference, 95 %, from a bootstrap over
documents: queries about one document are not independent.
COST: a document is embedded once for all chunkings, naive chunks once for each; all vectors of a set are in memory.
"""

import argparse
import hashlib
import json
import logging
import shlex
import sys
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_jina_bert import JinaBertModel, sentence_spans

from .command_line import add_placement, ending, placement_of
from .loading import check_finite, load_jina_bert, pipeline_sha256, placed, weights_sha256
from .metrics import CUTOFF
from .records import read_records, versions, write_records
from .rows import read_rows, stored
from .sets import EvaluationError, RetrievalSet, load_set
from .systems import QUERY_BLOCK

try:
    import pytrec_eval
except ImportError as error:
    raise ImportError("evaluation.late_chunking needs: pip install -e '.[evaluate]'") from error

logger = logging.getLogger(__name__)

RETRIEVED = 100  # passages for each query
RESAMPLES = 10_000
SEPARATOR = "\n\n"  # between the passages of a document

Span = tuple[int, int]


@dataclass
class Document:
    """Passages that belong together.

    Attributes:
        text: Their text.
        passages: Passage id -> characters [start, end) of the text.
    """

    text: str
    passages: dict[str, Span]


@dataclass
class Chunks:
    """Chunks of all documents, those of a passage one after the other.

    Attributes:
        spans: For each document the characters [start, end) of its chunks.
        passages: Ids of the passages that have a chunk.
        first: `(passages,) int64`, the first chunk of each.
    """

    spans: list[list[Span]]
    passages: list[str]
    first: np.ndarray


def read_titles(data: Path, name: str) -> dict[str, str]:
    """Passage id -> title of a set that `load_set` has accepted; "" where there is none."""
    corpus = stored(data / "eval" / name / "corpus.jsonl")
    assert corpus is not None, "load_set has read it"
    return {str(row["_id"]): row.get("title") or "" for _, row in read_rows(corpus, {})}


def documents_of(dataset: RetrievalSet, titles: dict[str, str]) -> list[Document]:
    """Puts passages that belong together into documents; `titles` is as of `read_titles`."""
    shared = Counter(titles.values())
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for identifier, text in dataset.documents.items():
        title = titles[identifier]
        if title and shared[title] > 1:
            groups["title", title].append((identifier, text.removeprefix(f"{title} ")))
        else:
            groups["id", identifier.rpartition("#")[0] or identifier].append((identifier, text))
    documents = []
    for group in groups.values():
        document = Document("", {})
        for identifier, text in group:
            document.text += SEPARATOR if document.text else ""
            document.passages[identifier] = (len(document.text), len(document.text) + len(text))
            document.text += text
        documents.append(document)
    return documents


def _sha256(dataset: RetrievalSet, documents: Sequence[Document]) -> str:
    """Of a set, and of what its passages were put together to by their titles."""
    digest = hashlib.sha256(dataset.sha256.encode())
    for document in documents:
        digest.update(json.dumps([document.text, document.passages]).encode())
    return digest.hexdigest()


def cut(documents: Sequence[Document], chunking: str, tokenizer) -> Chunks:
    """Cuts every passage into chunks; none crosses the end of a passage, and each has a token.

    Args:
        documents: The documents.
        chunking: "whole" (a chunk is a passage), "sentences", or a number of tokens in a chunk at most.
        tokenizer: A fast tokenizer.

    Raises:
        EvaluationError: No passage has a token.
    """
    spans: list[list[Span]] = []
    passages: list[str] = []
    counts: list[int] = []
    for document in documents:
        spans.append([])
        for identifier, (start, end) in document.passages.items():
            found = _cut_passage(document.text[start:end], chunking, tokenizer)
            if found:
                spans[-1].extend((start + first, start + last) for first, last in found)
                passages.append(identifier)
                counts.append(len(found))
    if not passages:
        raise EvaluationError("no passage of the set holds a token.")
    return Chunks(spans, passages, np.cumsum([0, *counts[:-1]]))


def _cut_passage(text: str, chunking: str, tokenizer) -> list[Span]:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [start for start, _ in offsets]
    if chunking.isdecimal():
        runs = [offsets[low : low + int(chunking)] for low in range(0, len(offsets), int(chunking))]
        return [(run[0][0], run[-1][1]) for run in runs]
    spans = sentence_spans(text) if chunking == "sentences" else [(0, len(text))]
    return [(start, end) for start, end in spans if bisect_left(starts, start) < bisect_left(starts, end)]


def rank(
    queries: np.ndarray, chunks: np.ndarray, passages: Sequence[str], first: np.ndarray
) -> list[dict[str, float]]:
    """Ranks passages by their best chunk.

    Args:
        queries: `(queries, hidden) float32`, of length 1.
        chunks: `(chunks, hidden) float32`, of length 1, those of a passage one after the other.
        passages: Ids.
        first: `(passages,)`, the first chunk of each passage.

    Returns:
        For each query {passage id: score} of the `RETRIEVED` best.

    Example:
        >>> chunks = np.array([[1, 0], [0, 1], [0.6, 0.8]])
        >>> rank(np.array([[0, 1]]), chunks, ["a", "b"], np.array([0, 2]))
        [{'a': 1.0, 'b': 0.8}]
    """
    count = min(RETRIEVED, len(passages))
    runs = []
    for start in range(0, len(queries), QUERY_BLOCK):
        similarity = queries[start : start + QUERY_BLOCK] @ chunks.T  # (block, chunks)
        scores = np.maximum.reduceat(similarity, first, axis=1)  # (block, passages)
        for row, best in zip(scores, np.argsort(-scores, axis=1, kind="stable")[:, :count], strict=True):
            runs.append({passages[i]: float(row[i]) for i in best})
    return runs


def ndcg(runs: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]]) -> np.ndarray:
    """nDCG at `CUTOFF` of each query, `(queries,) float64` in the order of `qrels`."""
    found = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{CUTOFF}"}).evaluate(runs)
    return np.array([found[query][f"ndcg_cut_{CUTOFF}"] if query in found else 0.0 for query in qrels])


def interval(differences: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean difference, groups of queries being drawn with replacement.

    Args:
        differences: `(queries,)`, late minus naive.
        groups: `(queries,) int64`, the group of each query, 0 ... n - 1.
        seed: Of the draws.

    Example:
        >>> interval(np.array([0.5, 0.5, 0.5]), np.array([0, 0, 1]))
        (0.5, 0.5)
    """
    sums, counts = np.bincount(groups, weights=differences), np.bincount(groups)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)  # (resamples, groups)
    means = (draws @ sums) / np.maximum(draws @ counts, 1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def query_groups(dataset: RetrievalSet, documents: Sequence[Document]) -> np.ndarray:
    """`(queries,) int64`: the document of the most relevant passage of each query; numbers without gaps."""
    place = {passage: index for index, document in enumerate(documents) for passage in document.passages}
    of_query = [place[max(judged, key=judged.__getitem__)] for judged in dataset.qrels.values()]
    return np.unique(of_query, return_inverse=True)[1]


def vectors_of(
    model: JinaBertModel, documents: Sequence[Document], chunks: dict[str, Chunks], **window
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Embeds the chunks of every chunking both ways; `window` is `max_length` and `overlap` of `encode_chunks`.

    Yields:
        The chunking, and its chunks embedded naively and late, `(chunks, hidden) float32` of length 1.
    """
    texts = [document.text for document in documents]
    # One pass over the documents for all chunkings: spans may overlap.
    spans = [
        [span for of_one in row for span in of_one] for row in zip(*(x.spans for x in chunks.values()), strict=True)
    ]
    found = [iter(row) for row in model.encode_chunks(texts, spans, normalize_embeddings=True, **window)]
    for chunking, of_all in chunks.items():
        places = [(index, span) for index, row in enumerate(of_all.spans) for span in row]
        of_chunks = [texts[index][slice(*span)] for index, span in places]
        late = np.stack([next(found[index]).embedding for index, _ in places])
        naive = model.encode(of_chunks, normalize_embeddings=True)
        for vectors in (naive, late):
            check_finite(vectors, of_chunks, model.name_or_path)
        yield chunking, naive, late


def compare(
    model: JinaBertModel, dataset: RetrievalSet, documents: Sequence[Document], chunks: dict[str, Chunks], **window
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scores both ways on one set; arguments as in `vectors_of`.

    Yields:
        The chunking, and `metrics` and `sizes` of its record.
    """
    questions = list(dataset.queries.values())
    queries = model.encode(questions, normalize_embeddings=True)
    check_finite(queries, questions, model.name_or_path)
    groups = query_groups(dataset, documents)
    for chunking, naive, late in vectors_of(model, documents, chunks, **window):
        of_all = chunks[chunking]
        runs = [rank(queries, vectors, of_all.passages, of_all.first) for vectors in (naive, late)]
        scores = [ndcg(dict(zip(dataset.queries, found, strict=True)), dataset.qrels) for found in runs]
        difference = scores[1] - scores[0]
        metrics = {
            f"naive_ndcg_at_{CUTOFF}": float(scores[0].mean()),
            f"late_ndcg_at_{CUTOFF}": float(scores[1].mean()),
            "difference": float(difference.mean()),
            "difference_95": list(interval(difference, groups)),
        }
        sizes = {**dataset.sizes, "contexts": len(documents), "chunks": len(naive)}
        yield chunking, {"metrics": metrics, "sizes": sizes}


def evaluate(
    model: JinaBertModel,
    datasets: dict[str, tuple[RetrievalSet, list[Document]]],
    output: Path,
    *,
    chunkings: Sequence[str],
    settings: dict[str, Any],
    source: dict[str, str],
) -> list[dict[str, Any]]:
    """Scores every set and chunking that the output does not hold yet, and writes the output after each.

    Args:
        model: The model.
        datasets: Name -> set and its documents.
        output: JSON file; its other records are kept.
        chunkings: See `cut`.
        settings: `max_length` and `overlap`.
        source: Name of the model and command line, for the records.
    """
    records = read_records(output)
    hashes = {"weights_sha256": weights_sha256(model), "pipeline_sha256": pipeline_sha256(model)}
    of_model = {"dtype": str(model.dtype).removeprefix("torch."), **hashes}
    provenance = {"versions": versions(), "command": source["command"]}
    results = []
    for name, (dataset, documents) in datasets.items():
        key = {"model": source["model"], "set": name, "data_sha256": _sha256(dataset, documents)}
        keys = {x: {**key, "settings": {"chunks": x, **settings, **of_model}} for x in chunkings}
        known = {x: record for x, key in keys.items() for record in records if key.items() <= record.items()}
        missing = {x: cut(documents, x, model.tokenizer) for x in chunkings if x not in known}
        for chunking, scored in compare(model, dataset, documents, missing, **settings) if missing else ():
            known[chunking] = {**keys[chunking], **scored, **placed(model), **provenance}
            records.append(known[chunking])
            write_records(output, records)
            logger.info("%s, %s: %s", name, chunking, scored["metrics"])
        results.extend(known[chunking] for chunking in chunkings)
    return results


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """What was run, and the records as a table in Markdown."""
    settings = records[0]["settings"]
    lines = [
        f"nDCG@{CUTOFF} of passages by their best chunk: embedded alone (naive), or within its document (late).",
        f"{records[0]['model']}, {settings['dtype']}; windows of {settings['max_length']:,} tokens, overlap "
        f"{settings['overlap']}. Interval: 95 %, paired bootstrap over documents; bold where it excludes 0.",
        "",
        *(f"    {command}" for command in dict.fromkeys(record["command"] for record in records)),
        "",
        "| set | queries x passages (documents) | chunk | chunks | naive | late | late - naive |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for record in records:
        sizes, metrics, chunking = record["sizes"], record["metrics"], record["settings"]["chunks"]
        low, high = metrics["difference_95"]
        difference = f"{metrics['difference']:+.3f}"
        cells = [
            record["set"],
            f"{sizes['queries']:,} x {sizes['documents']:,} ({sizes['contexts']:,})",
            {"whole": "passage", "sentences": "sentence"}.get(chunking, f"{chunking} tokens"),
            f"{sizes['chunks']:,}",
            f"{metrics[f'naive_ndcg_at_{CUTOFF}']:.3f}",
            f"{metrics[f'late_ndcg_at_{CUTOFF}']:.3f}",
            f"{f'**{difference}**' if low > 0 or high < 0 else difference} [{low:+.3f}, {high:+.3f}]",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for an unknown option."""
    parser = argparse.ArgumentParser(prog="evaluation.late_chunking", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="JinaBERT folder or Hub repository")
    parser.add_argument("--data", required=True, type=Path, help="folder that has eval/")
    parser.add_argument("--sets", required=True, nargs="+", help="retrieval sets, like ir/NAME")
    chunkings = ["whole", "sentences", "128", "64", "32"]
    parser.add_argument("--chunks", nargs="+", default=chunkings, help="whole (passages), sentences, or most tokens")
    parser.add_argument("--max-length", type=int, default=8192, help="tokens of a document embedded together")
    parser.add_argument("--overlap", type=int, default=256, help="tokens that a window of a longer document repeats")
    parser.add_argument("--output", required=True, type=Path, help="JSON file; a run goes on from what it holds")
    parser.add_argument("--markdown", type=Path, help="file for the table in Markdown")
    add_placement(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, *, command: str) -> list[dict[str, Any]]:
    """Loads what the command line names and compares both ways.

    Raises:
        EvaluationError: Something it names is missing or malformed.
    """
    for chunking in arguments.chunks:
        if chunking not in ("whole", "sentences") and not (chunking.isdecimal() and int(chunking)):
            raise EvaluationError(f"--chunks {chunking}: is not whole, sentences, or a number of tokens.")
    if not 0 <= arguments.overlap < arguments.max_length:
        raise EvaluationError(f"--overlap {arguments.overlap}: is not in 0 ... {arguments.max_length - 1}.")
    for path in filter(None, (arguments.output, arguments.markdown)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise EvaluationError(f"{path}: is a folder, or lies in none.")
    read_records(arguments.output)
    placement = placement_of(arguments)
    datasets = {}
    for name in dict.fromkeys(arguments.sets):
        dataset = load_set(arguments.data, name)
        if not isinstance(dataset, RetrievalSet):
            raise EvaluationError(f"--sets {name}: is no retrieval set.")
        datasets[name] = (dataset, documents_of(dataset, read_titles(arguments.data, name)))
    model = load_jina_bert(arguments.model, placement)
    return evaluate(
        model,
        datasets,
        arguments.output,
        chunkings=list(dict.fromkeys(arguments.chunks)),
        settings={"max_length": arguments.max_length, "overlap": arguments.overlap},
        source={"model": arguments.model, "command": command},
    )


def main(argv: Sequence[str] | None = None):
    """Entry point; it ends as `evaluation.command_line` says."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    arguments = parse_arguments(argv)
    with ending(arguments.output):
        records = run(arguments, command=shlex.join(["python", "-m", "evaluation.late_chunking", *argv]))
    table = markdown(records)
    print(table, end="")
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
