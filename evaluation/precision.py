"""What half precision costs on real text: embeddings and rankings against float32.

    python -m evaluation.precision --model hub_repo/tiny --data DATA --set ir/TRECQA-wang-test --dtype bfloat16

Law: both models embed the same texts with the same code; only the dtype of the weights and of the arithmetic differs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_jina_bert import JinaBertModel

from .local import retrieval_scores
from .sets import EvaluationError, RetrievalSet, load_set

CUTOFF = 10  # documents of a ranking that are compared
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def agreement(reference: np.ndarray, other: np.ndarray, *, queries: int, cutoff: int = CUTOFF) -> dict[str, float]:
    """How close two sets of embeddings of the same texts are, and the rankings that follow from them.

    Args:
        reference: `(texts, hidden) float32`, the queries first.
        other: The same shape.
        queries: How many of the texts are queries; the others are documents.
        cutoff: Documents of a ranking that are compared.

    Returns:
        `cosine_mean` and `cosine_min` between the two vectors of each text; `top_1`, the share of queries with the
        same first document; `top_k_overlap`, the mean share of the first `cutoff` documents that are the same.

    Example:
        >>> x = np.eye(3, dtype=np.float32)
        >>> agreement(x, x, queries=1, cutoff=2)
        {'cosine_mean': 1.0, 'cosine_min': 1.0, 'top_1': 1.0, 'top_k_overlap': 1.0}
    """
    reference, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (reference, other))
    cosine = (reference * other).sum(axis=1)
    orders = [
        np.argsort(-(x[:queries] @ x[queries:].T), axis=1, kind="stable")[:, :cutoff] for x in (reference, other)
    ]
    pairs = list(zip(*orders, strict=True))
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "top_1": float(np.mean([a[0] == b[0] for a, b in pairs])),
        "top_k_overlap": float(np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs])),
    }


def compare(model: str, dataset: RetrievalSet, dtype: str) -> dict[str, Any]:
    """Embeds a retrieval set in float32 and in `dtype`, and compares vectors, rankings and nDCG."""
    texts = [*dataset.queries.values(), *dataset.documents.values()]
    vectors = [
        JinaBertModel.from_pretrained(model, dtype=kind).encode(
            texts, show_progress_bar=True, normalize_embeddings=True
        )
        for kind in (torch.float32, _DTYPES[dtype])
    ]
    queries, documents = list(dataset.queries), list(dataset.documents)
    scores = []
    for x in vectors:
        similarity = x[: len(queries)] @ x[len(queries) :].T
        runs = {q: dict(zip(documents, row.tolist(), strict=True)) for q, row in zip(queries, similarity, strict=True)}
        scores.append(retrieval_scores(runs, dataset.qrels))
    return {
        "model": model,
        "set": dataset.name,
        "dtype": dtype,
        "queries": len(queries),
        "documents": len(documents),
        **agreement(*vectors, queries=len(queries)),
        "float32": scores[0],
        dtype: scores[1],
    }


def main(argv: Sequence[str] | None = None):
    """Entry point; a wrong input ends it with one line and status 2."""
    parser = argparse.ArgumentParser(prog="evaluation.precision", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="JinaBERT folder or Hub repository")
    parser.add_argument("--data", required=True, type=Path, help="folder that has eval/")
    parser.add_argument("--set", required=True, help="a retrieval set, like ir/NAME")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bfloat16")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    try:
        dataset = load_set(arguments.data, arguments.set)
        if not isinstance(dataset, RetrievalSet):
            raise EvaluationError(f"--set {arguments.set}: is no retrieval set.")
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    text = json.dumps(compare(arguments.model, dataset, arguments.dtype), indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
