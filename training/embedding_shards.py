"""Texts embedded once, to disk: shards of vectors that a killed run, another recipe or a grown corpus finds again.

Laws: a vector is found by all it depends on: the weights, vocabulary and modules of the model, the role and prompt of
the text, the maximum length, and a hash of the text. A text that has a vector is not embedded again (two processes at
the same time may both embed one, neither waits for the other). A shard under its final name is whole, so a run that is
killed loses the shard it was at.
COST: on disk 2 bytes a dimension (float16) and 8 bytes a text; in memory 16 bytes a text in the store, 32 a text
asked for, and one shard of vectors.
NOTE: texts of a batch are padded together, which moves a vector by 1e-7; the one that is kept is of the batch that the
text was first embedded in.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from .mining_recipe import MINILM, model_path
from .mining_texts import Texts, lookup, replacing
from .recipe import RecipeError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


class Vectors:
    """Vectors of a list of texts, wherever they stand in the shards.

    Args:
        shards: Files of `(rows, width)` vectors, float16 or float32.
        shard: `(texts,) int`, the file of each text.
        row: `(texts,) int`, its row there.
    """

    def __init__(self, shards: list[Path], shard: np.ndarray, row: np.ndarray):
        self._shards, self._shard, self._row = shards, shard, row
        self.width = _load(shards[0]).shape[1]

    def __len__(self) -> int:
        return len(self._row)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of these texts, `(ids, width) float32`."""
        vectors = np.empty((len(ids), self.width), np.float32)
        shard, row = self._shard[ids], self._row[ids]
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            # The map is closed again at once: pages of the file that were read do not stay with the process.
            vectors[here] = _load(self._shards[number])[row[here]]
        return vectors

    def blocks(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All texts in the order they have on disk, `rows` at a time: ids `(rows,)`, vectors `(rows, width)`."""
        order = np.lexsort((self._row, self._shard))
        for start in range(0, len(order), rows):
            ids = order[start : start + rows]
            yield ids, self.take(ids)


def _load(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError, FileNotFoundError) as error:
        number = file.parent / file.name.split(".")[0]
        raise RecipeError(f"{file} is damaged ({error}); delete {number}*.npy, then run again.") from error


class VectorStore:
    """A folder of vectors of one model, role and length: NUMBER.npy, and their texts' hashes in NUMBER.texts.npy.

    Args:
        folder: Of all stores; this one's `identity.json` says what its vectors are.
        identity: See `Embedder.identity`.
        dtype: Of new vectors, "float16" or "float32"; part of the identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, dtype: str):
        identity = {**identity, "dtype": dtype}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self._dtype = folder / f"{identity['role']}-{key}", dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        self._identity = identity

    @property
    def shards(self) -> list[Path]:
        """The files of vectors that are whole, in order."""
        return sorted(path for path in self.folder.glob("*.npy") if path.stem.isdigit())

    def find(self, hashes: np.ndarray) -> tuple[list[Path], np.ndarray, np.ndarray]:
        """`shards`, and shard and row of each hash, `(hashes,) int64` each; -1 where there is no vector."""
        shards = self.shards
        stored = [_load(shard.with_suffix(".texts.npy")) for shard in shards]
        sizes = [len(shard) for shard in stored]
        place = lookup(np.concatenate([np.empty(0, np.uint64), *stored]), hashes)
        starts = np.cumsum([0, *sizes])
        shard = np.where(place < 0, -1, np.searchsorted(starts, place, side="right") - 1)
        return shards, shard, np.where(place < 0, -1, place - starts[shard])

    def add(self, hashes: np.ndarray, vectors: np.ndarray):
        """Writes a shard: the hashes first, so that a file of vectors is never without them."""
        with FileLock(self.folder / ".lock"):  # until no other process adds to the store
            shards = self.shards
            if not shards:
                with replacing(self.folder / "identity.json") as partial:
                    partial.write_text(json.dumps(self._identity, indent=1) + "\n", encoding="utf-8")
            name = f"{int(shards[-1].stem) + 1 if shards else 0:06d}"
            for file, array in ((f"{name}.texts.npy", hashes), (f"{name}.npy", vectors.astype(self._dtype))):
                with replacing(self.folder / file) as partial, open(partial, "wb") as opened:
                    np.save(opened, array)


@dataclass
class Embedder:
    """A sentence-transformers model with what its vectors depend on; `bf16` multiplies in bfloat16 (autocast)."""

    name: str
    model: "SentenceTransformer"
    batch_size: int = 32
    bf16: bool = False

    def identity(self, role: str) -> dict[str, Any]:
        """What a vector depends on beside its text, as JSON: weights, vocabulary, modules, length, role, prompt."""
        import torch

        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        vocabulary = json.dumps(sorted(self.model.tokenizer.get_vocab().items()))
        return {
            "weights_sha256": digest.hexdigest(),
            "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "modules": repr(self.model),
            "max_length": self.model.max_seq_length,
            "role": role,
            "prompt": self.prompt(role),
            **({"autocast": "bfloat16"} if self.bf16 else {}),
        }

    def prompt(self, role: str) -> str:
        """The one that `encode_query` or `encode_document` puts before a text."""
        prompts = self.model.prompts or {}
        names = ("query",) if role == "query" else ("document", "passage", "corpus")
        name = next((name for name in names if name in prompts), self.model.default_prompt_name)
        return prompts.get(name, "")

    def embed(self, texts: list[str], role: str) -> np.ndarray:
        """Vectors of length 1, `(texts, width) float32`; role is "query" or "document".

        Raises:
            RecipeError: A vector with NaN or infinity.
        """
        import torch

        encode = self.model.encode_query if role == "query" else self.model.encode_document
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            vectors = encode(texts, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise RecipeError(
                f"model {self.name}: {(~finite).sum()} vectors are not finite; the first is of "
                f"{texts[int(np.argmin(finite))][:80]!r}."
            )
        return vectors


@dataclass
class KeptEmbedder:
    """An embedder that finds the vectors in a folder again, and keeps there, in float16, those that are new."""

    embedder: Embedder
    folder: Path

    @property
    def name(self) -> str:
        return self.embedder.name

    def identity(self, role: str) -> dict[str, Any]:
        """See `Embedder.identity`."""
        return self.embedder.identity(role)

    def embed(self, texts: list[str], role: str) -> np.ndarray:
        """See `Embedder.embed`; new vectors of one call are one file."""
        vectors = embed(
            self.embedder, Texts.of(texts), role, folder=self.folder, dtype="float16", shard_rows=len(texts)
        )
        return vectors.take(np.arange(len(texts)))


def load_embedder(
    name: str, *, max_length: int | None, batch_size: int, device: str | None = None, bf16: bool = False
) -> Embedder:
    """A model by name.

    Args:
        name: A folder, a Hub name, or "all-MiniLM-L6-v2" from its PyPI package.
        max_length: Tokens a text is cut at; None keeps the model's own limit.
        batch_size: Texts in a batch.
        device: None chooses.
        bf16: Whether it multiplies in bfloat16: faster where the processor does (AVX512-BF16, AMX, GPUs).

    Raises:
        RecipeError: It cannot be loaded, or has no positions for `max_length` tokens.
    """
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(model_path(name), trust_remote_code=True, device=device)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"model {name}: cannot be loaded ({' '.join(str(error).split())}).") from error
    if name == MINILM:
        # TRAP: its tokenizer.json bakes in truncation and padding at 128 tokens, below its limit of 256.
        model.tokenizer.backend_tokenizer.no_truncation()
        model.tokenizer.backend_tokenizer.no_padding()
    if max_length is not None:
        tables = [p.shape[0] for key, p in model.named_parameters() if key.endswith("position_embeddings.weight")]
        if tables and max_length > min(tables):
            raise RecipeError(f"model {name}: max_length={max_length}, but it has {min(tables)} positions.")
        model.max_seq_length = max_length
    return Embedder(name, model, batch_size, bf16)


def embed(embedder: Embedder, texts: Texts, role: str, *, folder: Path, dtype: str, shard_rows: int) -> Vectors:
    """Vectors of all texts; those that the folder does not have yet are embedded first.

    Args:
        embedder: The model.
        texts: At least one.
        role: "query" or "document".
        folder: Of stores of all models and roles.
        dtype: Of new vectors on disk.
        shard_rows: Texts of a new shard; of one shard, texts of similar length are embedded together.
    """
    store, hashes = VectorStore(folder, embedder.identity(role), dtype=dtype), texts.hashes()
    missing = np.flatnonzero(store.find(hashes)[1] < 0)
    missing = missing[np.unique(hashes[missing], return_index=True)[1]]
    missing.sort()
    logger.info("%s: %d of %d %s texts to embed", embedder.name, len(missing), len(texts), role)
    for start in range(0, len(missing), shard_rows):
        ids = missing[start : start + shard_rows]
        store.add(hashes[ids], embedder.embed(texts.take(ids), role))
        logger.info("%s: %d of %d embedded", embedder.name, min(start + shard_rows, len(missing)), len(missing))
    return Vectors(*store.find(hashes))
