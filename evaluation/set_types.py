"""What an evaluation set is: retrieval, sentence similarity, pair classification, and labelled texts.

Law: `cut(limit)` depends on the set and the limit alone, keeps what a score needs (a query its judged documents), and
is the set itself where nothing has to go.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np


class EvaluationError(ValueError):
    """A name, a file or a row is wrong; the message is one line that says which, and what was expected."""


def chosen(count: int, limit: int) -> list[int]:
    """`limit` of `count` positions, drawn at random, the same ones every time, in their order.

    Example:
        >>> chosen(3, 5), len(chosen(100, 5)), chosen(100, 5) == chosen(100, 5)
        ([0, 1, 2], 5, True)
    """
    return sorted(np.random.default_rng(0).permutation(count)[:limit].tolist())


def _fingerprint(*content) -> str:
    text = json.dumps(content, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _empty(texts: Iterable[str]) -> int:
    return sum(not text.strip() for text in texts)


def _counts(**counts: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, documents and which documents answer which query.

    Attributes:
        name: "ir/NAME" or "long/NAME", with "/PART" where a corpus has several sets of queries.
        queries: Query id -> text, the judged queries only.
        documents: Document id -> title and text.
        qrels: Query id -> {document id: relevance}.
        unanswered: Judged queries without a relevant document, which are left out.
    """

    name: str
    queries: dict[str, str]
    documents: dict[str, str]
    qrels: dict[str, dict[str, int]]
    unanswered: int = field(default=0, kw_only=True)

    task = "retrieval"

    @property
    def sizes(self) -> dict[str, int]:
        """Number of queries and of documents."""
        return {"queries": len(self.queries), "documents": len(self.documents)}

    @property
    def oddities(self) -> dict[str, int]:
        """How many queries and documents are empty, and how many queries nothing answers; only what there is."""
        return _counts(
            empty_queries=_empty(self.queries.values()),
            empty_documents=_empty(self.documents.values()),
            unanswered_queries=self.unanswered,
        )

    @property
    def sha256(self) -> str:
        """Of all ids, texts and judgements."""
        return _fingerprint(self.queries, self.documents, self.qrels)

    @property
    def characters(self) -> int:
        """Of all texts."""
        return sum(map(len, self.queries.values())) + sum(map(len, self.documents.values()))

    def cut(self, limit: int) -> "RetrievalSet":
        """At most `limit` queries; of the documents, those judged for them and others up to `limit`."""
        queries = [list(self.queries)[i] for i in chosen(len(self.queries), limit)]
        qrels = {query: self.qrels[query] for query in queries}
        judged = {document for of_query in qrels.values() for document in of_query}
        others = [document for document in self.documents if document not in judged]
        kept = judged | {others[i] for i in chosen(len(others), max(0, limit - len(judged)))}
        documents = {document: text for document, text in self.documents.items() if document in kept}
        if len(queries) == len(self.queries) and len(documents) == len(self.documents):
            return self
        return replace(self, queries={x: self.queries[x] for x in queries}, documents=documents, qrels=qrels)


@dataclass(frozen=True)
class PairSet:
    """Sentence pairs with the similarity that people gave them.

    Attributes:
        name: Name of the folder.
        first: First sentence of each pair.
        second: Second sentence of each pair.
        scores: Similarity of each pair, on the scale of the set.
    """

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]

    task = "similarity"

    @property
    def sizes(self) -> dict[str, int]:
        """Number of pairs."""
        return {"pairs": len(self.scores)}

    @property
    def oddities(self) -> dict[str, int]:
        """How many sentences are empty, if any."""
        return _counts(empty_sentences=_empty([*self.first, *self.second]))

    @property
    def sha256(self) -> str:
        """Of all sentences and scores."""
        return _fingerprint(self.first, self.second, self.scores)

    @property
    def characters(self) -> int:
        """Of all sentences."""
        return sum(map(len, [*self.first, *self.second]))

    def cut(self, limit: int) -> "PairSet":
        """At most `limit` pairs."""
        if limit >= len(self.scores):
            return self
        rows = chosen(len(self.scores), limit)
        return replace(
            self,
            first=[self.first[i] for i in rows],
            second=[self.second[i] for i in rows],
            scores=[self.scores[i] for i in rows],
        )


@dataclass(frozen=True)
class LabelledPairSet(PairSet):
    """Sentence pairs that are alike or not; `scores` is True for those that are."""

    scores: list[bool]

    task = "pair-classification"

    def cut(self, limit: int) -> "LabelledPairSet":
        """At most `limit` pairs.

        Raises:
            EvaluationError: Only pairs of one label are left.
        """
        found = super().cut(limit)
        if len(set(found.scores)) < 2:
            raise EvaluationError(f"--max-texts {limit}: {self.name} keeps pairs of one label only.")
        return found


@dataclass(frozen=True)
class TextSet:
    """Texts with one label each.

    Attributes:
        name: "clustering/NAME" or "classification/NAME".
        task: "clustering" or "classification".
        texts: The texts that are scored.
        labels: Label of each.
        example_texts: Texts that a classifier may learn from; none: cross-validation over `texts`.
        example_labels: Label of each.

    Raises:
        EvaluationError: Fewer than ten texts, or than two of a second label.
    """

    name: str
    task: str
    texts: list[str]
    labels: list[str]
    example_texts: list[str] = field(default_factory=list)
    example_labels: list[str] = field(default_factory=list)

    def __post_init__(self):
        common = Counter(self.labels).most_common(2)
        if len(self.labels) < 10 or len(common) < 2 or common[1][1] < 2:
            raise EvaluationError(
                f"{self.name}: {len(self.labels)} texts; ten are the least, and two of a second label."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Number of texts, labels and, if there are any, examples."""
        return {"texts": len(self.texts), "labels": len(set(self.labels)), **_counts(examples=len(self.example_texts))}

    @property
    def oddities(self) -> dict[str, int]:
        """How many texts are empty, if any."""
        return _counts(empty_texts=_empty([*self.texts, *self.example_texts]))

    @property
    def sha256(self) -> str:
        """Of all texts and labels."""
        return _fingerprint(self.texts, self.labels, self.example_texts, self.example_labels)

    @property
    def characters(self) -> int:
        """Of the texts that are scored."""
        return sum(map(len, self.texts))

    def cut(self, limit: int) -> "TextSet":
        """At most `limit` of the scored texts; all examples.

        Raises:
            EvaluationError: Too few texts are left.
        """
        if limit >= len(self.texts):
            return self
        rows = chosen(len(self.texts), limit)
        return replace(self, texts=[self.texts[i] for i in rows], labels=[self.labels[i] for i in rows])


EvaluationSet = RetrievalSet | PairSet | LabelledPairSet | TextSet
