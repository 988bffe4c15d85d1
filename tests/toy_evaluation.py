"""Toy sets, a random model and a system written by hand, for the tests of the local evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoTokenizer

from evaluation.systems import top_k
from modeling_jina_bert import JinaBertConfig, JinaBertModel

TOKENIZER = Path(__file__).parents[1] / "hub_repo" / "tiny"


DOCUMENTS = [
    {"_id": "d1", "title": "Whales", "text": "Whales are mammals of the sea."},
    {"_id": "d2", "title": "", "text": "Sharks are fish; a shark breathes water."},
    {"_id": "d3", "text": "Bread needs flour, water and salt."},
    {"_id": "d4", "title": "", "text": ""},
]
QUERIES = [
    {"_id": "q1", "text": "whales mammals"},
    {"_id": "q2", "text": "water"},
    {"_id": "q3", "text": "zeppelin"},
    {"_id": "unjudged", "text": "salt"},
]
# By BM25, q1 finds d1 alone, q2 finds d2 and d3, both judged, so every order is ideal, and q3 finds nothing.
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q2\td2\t1", "q2\td3\t1", "q3\td4\t1"]
PAIRS = [
    {"sentence1": "a", "sentence2": "b", "score": 0.0},
    {"sentence1": "c", "sentence2": "", "score": 1.5},
    {"sentence1": "e", "sentence2": "f", "score": 4},
    {"sentence1": "g", "sentence2": "h", "score": 5.0},
]


def write_rows(path: Path, rows: list):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(zstandard.compress(text.encode()))


@pytest.fixture(name="data")
def written_sets(tmp_path):
    """Folder with the sets ir/Toy, long/Toy and STSB."""
    for name in ("ir/Toy", "long/Toy"):
        folder = tmp_path / "data" / "eval" / name
        write_rows(folder / "corpus.jsonl.zst", DOCUMENTS)
        write_rows(folder / "queries.jsonl.zst", QUERIES)
        (folder / "qrels.tsv").write_text("\n".join(QRELS) + "\n")
    write_rows(tmp_path / "data" / "eval" / "STSB" / "test.jsonl.zst", PAIRS)
    return tmp_path / "data"


@pytest.fixture(name="model_folder", scope="module")
def random_model(tmp_path_factory):
    """A random JinaBERT as a sentence-transformers folder, built as in training.contrastive.load_model."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = JinaBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,  # at 0.02 the vectors of all texts are nearly one
    )
    JinaBertModel(config).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    trust = {"trust_remote_code": True}
    transformer = Transformer(str(folder / "backbone"), max_seq_length=512, model_kwargs=trust, config_kwargs=trust)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    model.save_pretrained(str(folder / "final"))
    return folder / "final"


class HandMade:
    """A system whose vectors are written by hand: text -> `(2,)`; counts its calls."""

    def __init__(self, vectors: dict[str, list[float]], *, name: str = "hand", seed: int = 0):
        self.name, self.vectors, self.calls = name, vectors, 0
        self.settings, self.placed = {"kind": "hand", "seed": seed}, {}

    def rank(self, queries, documents, k):
        self.calls += 1
        return top_k(self._stack(queries), self._stack(documents), k), 0

    def similarity(self, first, second):
        self.calls += 1
        return (self._stack(first) * self._stack(second)).sum(axis=1)

    def vectors(self, texts):
        self.calls += 1
        return self._stack(texts), 0

    def _stack(self, texts):
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)
