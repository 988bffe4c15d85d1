"""Retrieval on the held-out rows of stages II and III: sentence-transformers' InformationRetrievalEvaluator.

Law: the same queries and documents before, during and after a run, and in every run of the same data and shares.

COST: embeds `heldout_queries` anchors and `heldout_corpus` positives of each source at every evaluation.
"""

from collections import defaultdict

from datasets import Dataset, DatasetDict
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, SequentialEvaluator

from .mining_texts import normalised
from .recipe import ContrastiveRecipe

_DEPTH = 10


def build_evaluator(
    recipe: ContrastiveRecipe, heldout: DatasetDict, training: DatasetDict, *, batch_size: int
) -> SequentialEvaluator | None:
    """Evaluators of all sources that hold rows out; None if none does.

    Their metrics are "SOURCE_cosine_ndcg@10" and so on, the mean of nDCG@10 over the sources is "sequential_score".

    Args:
        recipe: Gives `heldout_queries` and `heldout_corpus`.
        heldout: Rows to find.
        training: Rows of the same sources, whose positives are searched, too.
        batch_size: Texts embedded at a time.
    """
    evaluators = []
    for name, rows in heldout.items():
        queries, corpus, relevant = retrieval_set(
            rows, training[name], queries=recipe.heldout_queries, corpus=recipe.heldout_corpus
        )
        evaluators.append(
            InformationRetrievalEvaluator(
                queries,
                corpus,
                relevant,
                name=name,
                batch_size=batch_size,
                mrr_at_k=[_DEPTH],
                ndcg_at_k=[_DEPTH],
                accuracy_at_k=[1, _DEPTH],
                precision_recall_at_k=[_DEPTH],
                map_at_k=[_DEPTH],
                write_csv=False,
            )
        )
    return SequentialEvaluator(evaluators, main_score_function=_mean) if evaluators else None


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)


def retrieval_set(
    heldout: Dataset, training: Dataset, *, queries: int, corpus: int
) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    """Queries, documents, and the documents of each query.

    Args:
        heldout: Rows whose anchors are the queries; all rows of an anchor, in whatever case and whitespace, are its
            documents.
        training: Rows whose positives fill the corpus up.
        queries: At most so many anchors, the first of the source.
        corpus: At most so many documents, those of the queries first.
    """
    positives: dict[str, list[str]] = defaultdict(list)
    spelled: dict[str, str] = {}
    for anchor, positive in zip(heldout["anchor"], heldout["positive"], strict=True):
        key = normalised(anchor)
        if key in positives or len(positives) < queries:
            positives[key].append(positive)
            spelled.setdefault(key, anchor)
    documents: dict[str, str] = {}  # text -> id; a text that two queries have is one document
    for texts in positives.values():
        for text in texts:
            documents.setdefault(text, f"d{len(documents)}")
    for rows in (heldout, training):
        for start in range(0, len(rows), 1000):
            if len(documents) >= corpus:
                break
            for text in rows[start : start + 1000]["positive"]:
                if len(documents) < corpus:
                    documents.setdefault(text, f"d{len(documents)}")
    relevant = {f"q{i}": {documents[text] for text in texts} for i, texts in enumerate(positives.values())}
    return (
        {f"q{i}": spelled[key] for i, key in enumerate(positives)},
        {identifier: text for text, identifier in documents.items()},
        relevant,
    )
