"""What the weight files of a folder hold: names, shapes and dtypes, read from their headers.

Law: nothing of the folder is executed, no tensor is read before it is asked for by name, and every file that an index
names lies in the folder. What is wrong with a file is a `FolderError` of one line that names it.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from modeling_jina_bert.checkpoints import (
    DTYPES,
    StoredTensor,
    load_pickle,
    read_header,
    read_weight_map,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt",
)  # fmt: skip
DTYPE_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
"""Their names in config.json, as in "float16": "F16"."""


class FolderError(ValueError):
    """A folder or file that cannot be used; the message is one line and names it."""


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
    with _folder_error():
        return read_header(folder / file)


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
                with _folder_error():
                    get = load_pickle(folder / file).__getitem__
            for name in names:
                yield name, get(name)


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """Tensor name -> shard, a file that is in the folder."""
    with _folder_error():
        weight_map = read_weight_map(folder / index)
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise FolderError(f"{folder / index} names {file!r}, which is missing.")
    return weight_map


def _shards(folder: Path, index: str) -> dict[str, StoredTensor]:
    weight_map = _weight_map(folder, index)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        with _folder_error():
            tensors |= {name: x for name, x in read_header(folder / file).items() if weight_map.get(name) == file}
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise FolderError(f"{folder / index} lists {missing[0]} in {weight_map[missing[0]]}, which does not hold it.")
    return tensors


@contextmanager
def _folder_error() -> Iterator[None]:
    """What is wrong with a file, as an error of this module."""
    try:
        yield
    except ValueError as error:
        raise FolderError(str(error)) from None


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split("\n")[0].split()).rstrip(".")[:300]
