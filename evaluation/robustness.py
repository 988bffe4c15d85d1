"""How much an embedding depends on what should not matter: batches, padding, precision, case, white space.

    python -m evaluation.robustness --model hub_repo/tiny --data DATA --set ir/TRECQA-wang-test --output FILE.json

Law: every variation embeds the texts of the same retrieval set and is compared with the same reference: one float32
call of `encode` on the same device. Only what its name says differs. int8 is ours alone through `--onnx FILE`, a
quantised export.
COST: the texts are embedded once for each variation, once a text for `alone`.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_jina_bert import JinaBertModel

from .command_line import add_placement, ending, placement_of
from .loading import DTYPES, Placement, check_finite, load_jina_bert, placed, weights_sha256
from .metrics import retrieval_scores
from .records import versions
from .set_types import EvaluationError, RetrievalSet
from .sets import load_set

CUTOFF = 10  # documents of a ranking that are compared
PADDING = 64  # tokens of padding behind the longest text of a batch
BATCH = 32
HALVES = DTYPES[1:]

Vectors = Callable[[list[str]], np.ndarray]


def agreement(
    reference: np.ndarray, other: np.ndarray, *, queries: int, cutoff: int = CUTOFF
) -> dict[str, float | None]:
    """How close two sets of embeddings of the same texts are, and the rankings that follow from them.

    Args:
        reference: `(texts, hidden) float32`, the queries first.
        other: `(texts, any) float32`.
        queries: How many of the texts are queries; the others are documents.
        cutoff: Documents of a ranking that are compared.

    Returns:
        `cosine_mean` and `cosine_min` between the two vectors of each text, None where their sizes differ; `top_1`,
        the share of queries with the same first document; `top_k_overlap`, the mean share of the first `cutoff`
        documents that are the same.

    Example:
        >>> x = np.eye(3, dtype=np.float32)
        >>> agreement(x, x, queries=1, cutoff=2)
        {'cosine_mean': 1.0, 'cosine_min': 1.0, 'top_1': 1.0, 'top_k_overlap': 1.0}
    """
    reference, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (reference, other))
    cosine = (reference * other).sum(axis=1) if reference.shape == other.shape else None
    orders = [
        np.argsort(-(x[:queries] @ x[queries:].T), axis=1, kind="stable")[:, :cutoff] for x in (reference, other)
    ]
    pairs = list(zip(*orders, strict=True))
    return {
        "cosine_mean": None if cosine is None else float(cosine.mean()),
        "cosine_min": None if cosine is None else float(cosine.min()),
        "top_1": float(np.mean([a[0] == b[0] for a, b in pairs])),
        "top_k_overlap": float(np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs])),
    }


def _limit(model: JinaBertModel) -> int:
    """Tokens that `encode` cuts a text at."""
    return min(model.tokenizer.model_max_length, model.config.model_max_length)


def padded(model: JinaBertModel, texts: list[str]) -> np.ndarray:
    """Embeddings out of the model itself, its batches `PADDING` tokens longer than they need be.

    Returns:
        `(texts, hidden) float32`, means over the real tokens.
    """
    found = []
    limit = _limit(model)
    for start in range(0, len(texts), BATCH):
        batch = model.tokenizer(texts[start : start + BATCH], padding=True, truncation=True, max_length=limit)
        length = len(batch["input_ids"][0]) + PADDING
        batch = model.tokenizer.pad(batch, padding="max_length", max_length=length, return_tensors="pt")
        with torch.inference_mode():
            batch = batch.to(model.device)
            hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        weights = batch["attention_mask"][..., None].float()
        found.append(((hidden.float() * weights).sum(1) / weights.sum(1)).cpu())
    return torch.cat(found).numpy()


def onnx_vectors(path: Path, model: JinaBertModel) -> Vectors:
    """Embeds with an ONNX file of the model: hidden states of `input_ids` and `attention_mask`, one text at a time.

    Raises:
        EvaluationError: onnxruntime is missing, or cannot load the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise EvaluationError("--onnx: onnxruntime is not installed; pip install -e '.[export]'.") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, which have no common base
        raise EvaluationError(f"--onnx {path}: {' '.join(str(error).split())}") from None
    names = {one.name for one in session.get_inputs()}

    def embed(texts: list[str]) -> np.ndarray:
        found = []
        for text in texts:
            batch = model.tokenizer([text], truncation=True, max_length=_limit(model), return_tensors="np")
            inputs = {name: batch[name].astype(np.int64) for name in names}
            found.append(session.run(None, inputs)[0][0].mean(axis=0))
        return np.stack(found).astype(np.float32)

    return embed


def variations(
    source: str, model: JinaBertModel, placement: Placement, *, dtypes: Sequence[str], onnx: Path | None
) -> dict[str, Vectors]:
    """Name -> how it embeds texts; the names say what differs from the reference."""

    def transformed(change: Callable[[str], str]) -> Vectors:
        return lambda texts: model.encode([change(text) for text in texts])

    def half(dtype: str) -> Vectors:
        return lambda texts: load_jina_bert(source, replace(placement, dtype=dtype)).encode(texts)

    hidden = model.config.hidden_size
    found: dict[str, Vectors] = {
        "each text alone": lambda texts: np.stack([model.encode(text) for text in texts]),
        "order of the texts reversed": lambda texts: model.encode(texts[::-1])[::-1],
        f"{PADDING} tokens of padding": lambda texts: padded(model, texts),
        **{dtype: half(dtype) for dtype in dtypes},
    }
    if onnx is not None:
        found[f"onnx: {onnx.name}"] = onnx_vectors(onnx, model)
    for size in (hidden // 2, hidden // 4, hidden // 8):
        found[f"first {size} of {hidden} dimensions"] = lambda texts, size=size: model.encode(texts, truncate_dim=size)
    found |= {
        "lower case": transformed(str.lower),
        "upper case": transformed(str.upper),
        "white space doubled": transformed(lambda text: text.replace(" ", "  ") + "\n"),
        "full stop added at the end": transformed(lambda text: text + "."),
    }
    return found


def ranking_scores(vectors: np.ndarray, dataset: RetrievalSet) -> dict[str, float]:
    """Retrieval measures of the cosine; `vectors` is `(queries + documents, any)`."""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, documents = list(dataset.queries), list(dataset.documents)
    similarity = vectors[: len(queries)] @ vectors[len(queries) :].T
    rows = zip(queries, similarity, strict=True)
    return retrieval_scores({q: dict(zip(documents, row.tolist(), strict=True)) for q, row in rows}, dataset.qrels)


def measure(
    source: str,
    dataset: RetrievalSet,
    *,
    placement: Placement | None = None,
    dtypes: Sequence[str] = HALVES,
    onnx: Path | None = None,
) -> dict[str, Any]:
    """What was measured of a model: `settings`, device and commit, `sizes`, and `records`, one a variation.

    Args:
        source: JinaBERT folder or Hub repository.
        dataset: Its queries and documents are embedded.
        placement: Which weights are loaded, and where; in float32.
        dtypes: Half precisions, of `HALVES`.
        onnx: An ONNX export of the model, for example the int8 one.

    Raises:
        EvaluationError: The model cannot be loaded; a variation gives vectors that are not finite; see also
            `onnx_vectors`.
    """
    placement = placement or Placement()
    model = load_jina_bert(source, placement)
    texts = [*dataset.queries.values(), *dataset.documents.values()]
    ways = {"reference": model.encode} | variations(source, model, placement, dtypes=dtypes, onnx=onnx)
    reference: np.ndarray | None = None
    records = []
    for name, embed in ways.items():
        vectors = embed(texts)
        check_finite(vectors, texts, f"model {source}, {name}")
        reference = vectors if reference is None else reference
        score = ranking_scores(vectors, dataset)
        close = agreement(reference, vectors, queries=len(dataset.queries))
        records.append({"variation": name, **close, "ndcg_at_10": score["ndcg_at_10"]})
    settings = {"dtype": str(model.dtype).removeprefix("torch."), "weights_sha256": weights_sha256(model)}
    return {"settings": settings, **placed(model), "sizes": dataset.sizes, "records": records}


def table_rows(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""

    def text(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    header = ["variation", "cosine, least", "cosine, mean", "same first", f"same first {CUTOFF}", "nDCG@10"]
    rows = [
        [
            record["variation"], text(record["cosine_min"], 6), text(record["cosine_mean"], 6),
            text(record["top_1"], 3), text(record["top_k_overlap"], 3), text(record["ndcg_at_10"], 3),
        ]
        for record in records
    ]  # fmt: skip
    return header, rows


def main(argv: Sequence[str] | None = None):
    """Entry point; it ends as `evaluation.command_line` says."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="evaluation.robustness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="JinaBERT folder or Hub repository")
    parser.add_argument("--data", required=True, type=Path, help="folder that has eval/")
    parser.add_argument("--set", required=True, help="a retrieval set, like ir/NAME")
    parser.add_argument("--dtypes", nargs="*", choices=HALVES, default=list(HALVES), help="half precisions")
    parser.add_argument("--onnx", type=Path, help="ONNX export of the model, for example its int8 one")
    parser.add_argument("--output", required=True, type=Path, help="JSON file; it is replaced")
    add_placement(parser, dtype=False)
    arguments = parser.parse_args(argv)
    with ending(None):
        placement = placement_of(arguments)
        dataset = load_set(arguments.data, arguments.set)
        if not isinstance(dataset, RetrievalSet):
            raise EvaluationError(f"--set {arguments.set}: is no retrieval set.")
        measured = measure(arguments.model, dataset, placement=placement, dtypes=arguments.dtypes, onnx=arguments.onnx)
    result = {
        "model": arguments.model,
        "set": dataset.name,
        **measured,
        "command": f"python -m evaluation.robustness {shlex.join(argv)}",
        "versions": versions(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    header, rows = table_rows(measured["records"])
    for row in [header, *rows]:
        print(" | ".join(cell.rjust(12) if column else cell.ljust(32) for column, cell in enumerate(row)))


if __name__ == "__main__":
    main()
