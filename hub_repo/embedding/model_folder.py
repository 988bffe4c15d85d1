"""The model of a command: where it lies, which it is, and the texts through it.

Law: the code that runs is the installed package's, never that of the folder. A model is known by the hash of its
weights, tokenizer and configuration, so a renamed folder is the same model and one that was trained on, or that cuts
texts elsewhere, is another.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .parts import Result
from .text_input import Row
from .vector_files import Embeddings, Layout

_TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
_VOLATILE = ("transformers_version", "auto_map", "architectures", "_name_or_path")
GIVEN_SPANS = "spans"


@dataclass(frozen=True)
class Encoding:
    """What a vector depends on besides the text and the weights.

    Attributes:
        device: "cpu", "cuda", ...; None is the first GPU if there is one.
        model_dtype: What the model computes in; None is what config.json says.
        batch_size: Texts computed together at most; it moves the last digits only.
        max_length: Tokens of a text, or with `chunks` of a window; None is the limit of the tokenizer.
        truncation: Whether longer texts are cut off there.
        normalize: Scale to length 1.
        truncate_dim: Keep the first dimensions only.
        chunks: None for one vector a text; for late chunking "sentences", a number of tokens, or `GIVEN_SPANS` for
            those of each row.
        overlap: Tokens that a window repeats of the one before, with `chunks`.
    """

    device: str | None = None
    model_dtype: str | None = None
    batch_size: int = 32
    max_length: int | None = None
    truncation: bool = True
    normalize: bool = True
    truncate_dim: int | None = None
    chunks: str | int | None = None
    overlap: int = 256


class ModelFolder:
    """A model that can be loaded, and is only when it is needed.

    Args:
        name: Folder, or name of a Hub repository, which is fetched.
        encoding: How texts are embedded.

    Attributes:
        path: The folder.
        sha256: Of its weights, tokenizer and configuration.
        dimensions: Of a vector.

    Raises:
        FolderError: No such folder or repository, or none of a JinaBERT with its tokenizer.
        ValueError: An encoding that the model cannot do.
    """

    def __init__(self, name: str, encoding: Encoding):
        import torch

        from ..folders.checkpoint_files import stored_tensors
        from ..folders.layouts import read_config
        from ..folders.loading import quiet_transformers
        from ..folders.tokenizer_checks import refuse_bad_tokenizer
        from ..hub.snapshot import fetch

        quiet_transformers()
        self.name, self.encoding, self.path = name, encoding, fetch(name)
        stored = stored_tensors(self.path)
        config = read_config(self.path, set(stored))
        refuse_bad_tokenizer(self.path, config)
        hidden = config.hidden_size
        dim = encoding.truncate_dim
        if dim is not None and dim > hidden:
            raise ValueError(f"--truncate-dim {dim} is more than the {hidden} dimensions of {name}.")
        self.dimensions = dim or hidden
        self.sha256 = _sha256(self.path, sorted({tensor.file for tensor in stored.values()}))
        try:
            self.device = torch.device(encoding.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            message = str(error).split("\n")[0]
            raise ValueError(f"--device {encoding.device} cannot be used: {message}") from None

    def job(self) -> dict[str, Any]:
        """What the vectors depend on besides the texts."""
        return {**asdict(self.encoding), "device": self.device.type, "model_sha256": self.sha256}

    def embedder(self, layout: Layout) -> Callable[[list[Row]], Result]:
        """Loads the model.

        Args:
            layout: Columns and dtype of the rows.

        Returns:
            Texts -> their rows. It raises ValueError for a vector that is not finite.

        Raises:
            ValueError: The weights cannot be loaded.
        """
        model = load_model(self.path, self.device, self.encoding.model_dtype)
        embed = _embed_texts if self.encoding.chunks is None else _embed_chunks
        return lambda rows: embed(model, rows, self.encoding, layout)


def load_model(path: Path, device, dtype: str | None):
    """The model in evaluation mode, with its tokenizer.

    Args:
        path: A folder.
        device: A `torch.device`.
        dtype: "float32", "float16", "bfloat16", or None for that of config.json.
    """
    from modeling_jina_bert import JinaBertModel

    options = {} if dtype is None else {"dtype": dtype}
    try:
        model = JinaBertModel.from_pretrained(path, **options).to(device).eval()
        len(model.tokenizer)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be loaded: {' '.join(str(error).split())[:500]}") from None
    return model


def _sha256(folder: Path, weights: Sequence[str]) -> str:
    from ..folders.checkpoint_files import read_json

    config = {name: value for name, value in read_json(folder / "config.json").items() if name not in _VOLATILE}
    hasher = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in (*weights, *_TOKENIZER):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                while block := file.read(2**20):
                    hasher.update(block)
    return hasher.hexdigest()


def _embed_texts(model, rows: list[Row], encoding: Encoding, layout: Layout) -> Result:
    from modeling_jina_bert import count_truncations

    limit = {"truncation": False} if not encoding.truncation else {}
    limit |= {"max_length": encoding.max_length} if encoding.max_length is not None else {}
    with count_truncations() as cut:
        vectors = model.encode(
            [row.text for row in rows],
            batch_size=encoding.batch_size,
            normalize_embeddings=encoding.normalize,
            truncate_dim=encoding.truncate_dim,
            show_progress_bar=False,
            **limit,
        )
    columns = {name: [getattr(row, name) for row in rows] for name in layout.columns}
    return Result(Embeddings(_stored(vectors, rows, layout), columns), cut.texts, cut.tokens)


def _embed_chunks(model, rows: list[Row], encoding: Encoding, layout: Layout) -> Result:
    try:
        of_rows = model.encode_chunks(
            [row.text for row in rows],
            [row.spans for row in rows] if encoding.chunks == GIVEN_SPANS else encoding.chunks,
            max_length=encoding.max_length or "model",
            overlap=encoding.overlap,
            normalize_embeddings=encoding.normalize,
            truncate_dim=encoding.truncate_dim,
        )
    except ValueError as error:
        if found := re.search(r" of texts\[(\d+)\]", str(error)):  # a span without a token
            raise ValueError(f"{rows[int(found[1])]}: {str(error).replace(found[0], '')}") from None
        raise
    found = [(row, *item) for row, chunks in zip(rows, of_rows, strict=True) for item in enumerate(chunks)]
    vectors = np.array([chunk.embedding for _, _, chunk in found], np.float32).reshape(len(found), layout.dimensions)
    columns: dict[str, list] = {
        "file": [row.file for row, _, _ in found],
        "row": [row.row for row, _, _ in found],
        "id": [row.id for row, _, _ in found],
        "chunk": [number for _, number, _ in found],
        "start": [chunk.span[0] for _, _, chunk in found],
        "end": [chunk.span[1] for _, _, chunk in found],
        "first_token": [chunk.tokens[0] for _, _, chunk in found],
        "end_token": [chunk.tokens[1] for _, _, chunk in found],
        "text": [chunk.text for _, _, chunk in found],
    }
    vectors = _stored(vectors, [row for row, _, _ in found], layout)
    return Result(Embeddings(vectors, {name: columns[name] for name in layout.columns}))


def _stored(vectors: np.ndarray, rows: Sequence[Row], layout: Layout) -> np.ndarray:
    """As the dtype of the file; a number that is not finite is an error that names the text."""
    with np.errstate(over="ignore"):
        vectors = vectors.astype(layout.dtype)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{rows[bad[0]]}: its vector is not finite in {layout.dtype}; the weights are damaged, or overflow there."
        )
    return vectors
