"""Embeds texts with one client library; run by clients.py with the interpreter of that library's environment.

    python -I client_program.py REQUEST.json RESULT.npz

Law: the client is used as its documentation says, with its own defaults for batches, truncation and prompts, on a
folder of ours and offline. Nothing of this project is imported: the environment does not have it.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Embedder(NamedTuple):
    """What a client offers.

    Attributes:
        documents: Texts -> `(texts, hidden)`.
        query: Text -> `(hidden,)`; another call in each of these libraries, which may put a prompt before the text.
    """

    documents: Callable
    query: Callable


def fastembed(folder: str, threads: int, file: str, hidden_size: int) -> Embedder:
    """The ONNX file in fastembed, as a model that it does not know by name."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    name = f"local/{Path(folder).name}"
    TextEmbedding.add_custom_model(
        model=name,
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf=name),  # never asked: specific_model_path is read instead
        dim=hidden_size,
        model_file=file,
    )
    model = TextEmbedding(name, specific_model_path=folder, threads=threads, providers=["CPUExecutionProvider"])
    return Embedder(lambda texts: np.stack(list(model.embed(texts))), lambda text: next(iter(model.query_embed(text))))


def langchain(folder: str, threads: int, file: str, hidden_size: int) -> Embedder:
    """LangChain's `HuggingFaceEmbeddings`, which loads the folder with sentence-transformers."""
    import torch
    from langchain_huggingface import HuggingFaceEmbeddings

    torch.set_num_threads(threads)
    model = HuggingFaceEmbeddings(
        model_name=folder,
        model_kwargs={"trust_remote_code": True, "device": "cpu"},
        encode_kwargs={"normalize_embeddings": True},
    )
    return Embedder(model.embed_documents, model.embed_query)


def llama_index(folder: str, threads: int, file: str, hidden_size: int) -> Embedder:
    """LlamaIndex's `HuggingFaceEmbedding`, which loads the folder with sentence-transformers and normalises."""
    import torch
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    torch.set_num_threads(threads)
    model = HuggingFaceEmbedding(model_name=folder, trust_remote_code=True, device="cpu")
    return Embedder(model.get_text_embedding_batch, model.get_query_embedding)


CLIENTS = {"fastembed": fastembed, "langchain": langchain, "llama-index": llama_index}


def main(request_path: str, result_path: str):
    """Writes `batch-0`, `batch-1`, ... and `queries` (the texts of the first batch), and `report` as JSON."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    embedder = CLIENTS[request["client"]](request["folder"], request["threads"], **request["options"])
    arrays, errors = {}, []
    for index, texts in enumerate(request["batches"]):
        try:
            arrays[f"batch-{index}"] = np.asarray(embedder.documents(texts), dtype=np.float32)
            errors.append("")
        except Exception as error:  # of any kind: how the client answers a text that is too long is a finding
            errors.append(f"{type(error).__name__}: {error}")
    if request["batches"]:
        queries = [embedder.query(text) for text in request["batches"][0]]
        arrays["queries"] = np.asarray(queries, dtype=np.float32)
    seconds = []
    for texts in request["timed"]:
        embedder.documents(texts)  # warms up
        seconds.append([_seconds(embedder.documents, texts) for _ in range(request["rounds"])])
    np.savez(result_path, report=json.dumps({"errors": errors, "seconds": seconds}), **arrays)


def _seconds(embed: Callable, texts: list[str]) -> float:
    start = time.perf_counter()
    embed(texts)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
