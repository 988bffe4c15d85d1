"""Ways in which a long document becomes vectors, and who computes them.

    whole  one vector of the first so many tokens; 512 is what a model with 512 positions sees
    mean   one vector: the mean of the vectors of the document's chunks, each embedded alone
    best   a vector for each chunk, embedded alone; the document scores that of its best chunk
    late   the same chunks, but each the mean of its tokens within the whole document (late chunking)

Laws: the same characters are in the chunks of all ways; vectors have length 1; every document has at least one vector,
a document without a token that of the empty text. Special tokens come on top of the tokens of a chunk.
COST: `whole` embeds a document once for each length, `mean` and `best` together once, `late` once for all chunks. All
vectors of one way are in memory, and of a sentence-transformers model `CACHE_BYTES` of `evaluation.systems` more.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from modeling_jina_bert import JinaBertModel, count_truncations

from .late_chunking import Document, cut
from .loading import Placement, check_finite, load_jina_bert, pipeline_sha256, placed, weights_sha256
from .sets import EvaluationError
from .systems import EmbeddingModel, load_system

KINDS = ("whole", "mean", "best", "late")
ONE_VECTOR = ("whole", "mean")
SPECIAL_TOKENS = 2  # [CLS] and [SEP]

Span = tuple[int, int]


@dataclass(frozen=True)
class Way:
    """How a document becomes vectors.

    Attributes:
        kind: One of `KINDS`.
        tokens: "whole": tokens of the document that are read, special ones included. Others: tokens of a chunk.
    """

    kind: str
    tokens: int


@dataclass(frozen=True)
class DocumentVectors:
    """The vectors of documents.

    Attributes:
        vectors: `(vectors, hidden) float32`, of length 1, those of a document one after the other.
        first: `(documents,) int64`, the first vector of each document.
    """

    vectors: np.ndarray
    first: np.ndarray


class Reader(Protocol):
    """A model that embeds queries and documents: `JinaReader` or `SentenceReader`."""

    name: str
    settings: dict[str, object]
    placed: dict[str, str | None]  # device and commit, for the records
    limit: int | None  # tokens that it can read at a time; None: any number
    kinds: Sequence[str]  # of `KINDS`

    @property
    def tokenizer(self): ...

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """`(texts, hidden) float32` of length 1."""

    def whole(self, texts: Sequence[str], tokens: int | None) -> np.ndarray:
        """The same of the first so many tokens of each text; None: as many as the model reads by itself."""

    def late(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[np.ndarray]:
        """For each text `(spans, hidden) float32` of length 1; each span of characters holds a token."""


class JinaReader:
    """A JinaBERT: reads any number of tokens, and chunks within their document."""

    limit = None
    kinds = KINDS

    def __init__(self, name: str, model: JinaBertModel):
        self.name, self.model = name, model
        self.settings = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights_sha256": weights_sha256(model),
            "pipeline_sha256": pipeline_sha256(model),
            "limit": self.limit,
        }
        self.placed = placed(model)

    @property
    def tokenizer(self):
        return self.model.tokenizer

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.whole(texts, None)

    def whole(self, texts: Sequence[str], tokens: int | None) -> np.ndarray:
        limit = {} if tokens is None else {"max_length": tokens}
        with count_truncations() if limit else nullcontext():  # a limit is meant, so nothing is said
            vectors = self.model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False, **limit)
        check_finite(vectors, texts, self.name)
        return vectors

    def late(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[np.ndarray]:
        found = self.model.encode_chunks(texts, spans, normalize_embeddings=True)
        vectors = [np.stack([chunk.embedding for chunk in chunks]) for chunks in found]
        for of_text, chunks in zip(vectors, found, strict=True):
            check_finite(of_text, [chunk.text for chunk in chunks], self.name)
        return vectors


class SentenceReader:
    """Any sentence-transformers model, within its own limit; it has no late chunking."""

    kinds = ("whole", "mean", "best")

    def __init__(self, system: EmbeddingModel):
        self.name, self.model, self.system = system.name, system.model, system
        self.limit: int | None = system.model.max_seq_length
        settings = system.settings
        own = ("dtype", "weights_sha256", "pipeline_sha256")
        self.settings = {name: settings[name] for name in own} | {"limit": self.limit}
        self.placed = system.placed

    @property
    def tokenizer(self):
        return self.model.tokenizer

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.system.embed(texts, self.model.encode_query)[0]

    def whole(self, texts: Sequence[str], tokens: int | None) -> np.ndarray:
        try:
            self.model.max_seq_length = self.limit if tokens is None else tokens
            return self.system.embed(texts, self.model.encode_document)[0]
        finally:
            self.model.max_seq_length = self.limit

    def late(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[np.ndarray]:
        raise NotImplementedError("late chunking needs a JinaBERT.")


def load_readers(models: Sequence[str], baselines: Sequence[str], placement: Placement) -> list[Reader]:
    """JinaBERTs, and sentence-transformers models as in `load_system`, none twice.

    Args:
        models: Names of JinaBERTs.
        baselines: Names of the others.
        placement: Which weights are loaded, where and how; baselines get the device alone.

    Raises:
        EvaluationError: It cannot be loaded, or is no embedding model.
        ImportError: It needs a package that is not installed.
    """
    readers: list[Reader] = [JinaReader(name, load_jina_bert(name, placement)) for name in dict.fromkeys(models)]
    for name in dict.fromkeys(baselines):
        system = load_system(name, placement=placement, baseline=True)
        if not isinstance(system, EmbeddingModel):
            raise EvaluationError(f"--baseline {name}: is no embedding model.")
        readers.append(SentenceReader(system))
    return readers


def ways_of(reader: Reader, lengths: Sequence[int], chunks: Sequence[int]) -> list[Way]:
    """The ways that a model has: lengths up to its limit and the limit itself, chunks of what it can read at most.

    Args:
        reader: The model.
        lengths: Tokens, for "whole".
        chunks: Tokens, for the other kinds; those too long for the model become its longest.

    Example:
        >>> from types import SimpleNamespace
        >>> ways = ways_of(SimpleNamespace(limit=256, kinds=KINDS[:2]), [128, 512], [64, 512])
        >>> [(way.kind, way.tokens) for way in ways]
        [('whole', 128), ('whole', 256), ('mean', 64), ('mean', 254)]
    """
    if reader.limit is not None:
        lengths = [*(length for length in lengths if length < reader.limit), reader.limit]
        chunks = [min(tokens, reader.limit - SPECIAL_TOKENS) for tokens in chunks]
    whole = [Way("whole", tokens) for tokens in dict.fromkeys(lengths)]
    return whole + [Way(kind, tokens) for tokens in dict.fromkeys(chunks) for kind in reader.kinds if kind != "whole"]


def chunk_spans(texts: Sequence[str], tokens: int, tokenizer) -> list[list[Span]]:
    """Characters of the chunks of each text, `tokens` tokens each and the rest; none for a text without a token."""
    documents = [Document(text, {"": (0, len(text))}) for text in texts]
    return cut(documents, str(tokens), tokenizer).spans


def document_vectors(
    reader: Reader, texts: Sequence[str], ways: Sequence[Way]
) -> Iterator[tuple[Way, DocumentVectors]]:
    """Embeds documents.

    Args:
        reader: The model.
        texts: The documents.
        ways: How.

    Yields:
        Each way and its vectors; the ways of one size of chunks one after the other.

    Raises:
        EvaluationError: No document has a token.
    """
    for way in ways:
        if way.kind == "whole":
            yield way, DocumentVectors(reader.whole(texts, way.tokens), np.arange(len(texts)))
    for tokens in dict.fromkeys(way.tokens for way in ways if way.kind != "whole"):
        spans = chunk_spans(texts, tokens, reader.tokenizer)
        of_size = {way.kind: way for way in ways if way.kind != "whole" and way.tokens == tokens}
        yield from _of_chunks(reader, texts, spans, of_size)


def _of_chunks(
    reader: Reader, texts: Sequence[str], spans: list[list[Span]], ways: dict[str, Way]
) -> Iterator[tuple[Way, DocumentVectors]]:
    first = np.cumsum([0, *(max(1, len(row)) for row in spans[:-1])])
    if "mean" in ways or "best" in ways:
        chunks = [text[slice(*span)] for text, row in zip(texts, spans, strict=True) for span in row or [(0, 0)]]
        alone = reader.whole(chunks, None)
        if "mean" in ways:
            yield ways["mean"], DocumentVectors(_unit(np.add.reduceat(alone, first, axis=0)), np.arange(len(texts)))
        if "best" in ways:
            yield ways["best"], DocumentVectors(alone, first)
    if "late" in ways:
        empty = reader.whole([""], None)
        filled = [index for index, row in enumerate(spans) if row]
        found = dict(zip(filled, reader.late([texts[i] for i in filled], [spans[i] for i in filled]), strict=True))
        rows = [found.get(index, empty) for index in range(len(texts))]
        yield ways["late"], DocumentVectors(np.concatenate(rows), first)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
