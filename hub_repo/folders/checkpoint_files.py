"""What the weight files of a folder hold: names, shapes and dtypes, read from their headers.

Law: nothing of the folder is executed, no tensor is read before it is asked for by name, and every file that an index
names lies in the folder. What is wrong with a file is a `FolderError` of one line that names it.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt",
)  # fmt: skip
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating dtypes of safetensors headers."""
DTYPE_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
"""Their names in config.json, as in "float16": "F16"."""


class FolderError(ValueError):
    """A folder or file that cannot be used; the message is one line and names it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it.

    Attributes:
        file: Name of the file in the folder.
        shape: Its shape.
        dtype: As safetensors writes it: F32, F16, BF16, ...
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        FolderError: It is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path} is not readable JSON: {_one_line(error)}.") from None


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file right in the folder: no directory, no way out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", ":"}


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weights: one safetensors file, its shards, or a .bin file of the official form.

    Args:
        folder: A model folder.

    Returns:
        Tensor name -> what the header says of it.

    Raises:
        FolderError: There are no weights, or a file is truncated, malformed or not in the folder.
    """
    index = _index(folder)
    if index is not None:
        return _shards(folder, index)
    (file,) = weight_files(folder)
    return _header(folder, file) if file == WEIGHTS else _pickle_header(folder, file)


def weight_files(folder: Path) -> list[str]:
    """Names of the files that `stored_tensors` reads, in the folder.

    Raises:
        FolderError: There are none, or an index names what is none.
    """
    index = _index(folder)
    if index is not None:
        return sorted(set(_weight_map(folder, index).values()))
    for file in (WEIGHTS, PICKLES[0]):
        if (folder / file).exists():
            return [file]
    if not folder.is_dir():
        raise FolderError(f"{folder} is not a folder.")
    raise FolderError(f"{folder} has no weights: neither {WEIGHTS}, {INDEX} nor {PICKLES[0]}.")


def _index(folder: Path) -> str | None:
    """The index of the shards that count; None where one file holds all."""
    if (folder / WEIGHTS).exists():
        return None
    return next((index for index in (INDEX, PICKLES[1]) if (folder / index).exists()), None)


def read_tensors(folder: Path, stored: dict[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors themselves, one in memory at a time (a .bin file as a whole).

    Args:
        folder: A model folder.
        stored: What `stored_tensors` found there, or a part of it.
    """
    for file in sorted({tensor.file for tensor in stored.values()}):
        names = [name for name, tensor in stored.items() if tensor.file == file]
        with ExitStack() as stack:
            if file.endswith(".safetensors"):
                source = stack.enter_context(safe_open(folder / file, framework="pt"))
                get = source.get_tensor
            else:
                get = _load_pickle(folder / file, "cpu").__getitem__
            for name in names:
                yield name, get(name)


def _header(folder: Path, file: str) -> dict[str, StoredTensor]:
    try:
        # Opening checks that the tensors cover the file exactly, so a truncated one is found here.
        with safe_open(folder / file, framework="pt") as source:
            slices = ((name, source.get_slice(name)) for name in source.keys())
            return {name: StoredTensor(file, tuple(x.get_shape()), x.get_dtype()) for name, x in slices}
    except (SafetensorError, OSError) as error:
        raise FolderError(f"{folder / file} is not a whole safetensors file: {_one_line(error)}.") from None


def _pickle_header(folder: Path, file: str) -> dict[str, StoredTensor]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = _load_pickle(folder / file, "meta")
    return {
        name: StoredTensor(file, tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in tensors.items()
    }


def _load_pickle(path: Path, device: str) -> dict[str, torch.Tensor]:
    """A .bin file through torch's restricted unpickler, which builds tensors and containers and calls nothing else."""
    try:
        tensors = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # whatever a malformed pickle makes of itself
        raise FolderError(f"{path} is not a whole PyTorch file of tensors: {_one_line(error)}.") from None
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise FolderError(f"{path} holds something other than named tensors.")
    return tensors


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """Tensor name -> shard, a file in the folder, as an index says."""
    content = read_json(folder / index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or "metadata" not in content:
        raise FolderError(f"{folder / index} lacks weight_map or metadata; transformers reads both.")
    for file in sorted({str(file) for file in weight_map.values()}):
        if not is_plain_name(file):
            raise FolderError(f"{folder / index} names {file!r}, which is not a file name in this folder.")
        if not (folder / file).is_file():
            raise FolderError(f"{folder / index} names {file}, which is missing.")
    return {name: str(file) for name, file in weight_map.items()}


def _shards(folder: Path, index: str) -> dict[str, StoredTensor]:
    weight_map, read = _weight_map(folder, index), _header if index == INDEX else _pickle_header
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        tensors |= {name: x for name, x in read(folder, file).items() if weight_map.get(name) == file}
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise FolderError(f"{folder / index} lists {missing[0]} in {weight_map[missing[0]]}, which does not hold it.")
    return tensors


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split("\n")[0].split()).rstrip(".")[:300]
