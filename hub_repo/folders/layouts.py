"""Which tensors a configuration asks for, and how those of a folder compare with them.

Law: a tensor is of the encoder, of a known head, a buffer that every version recomputes, or it is named as unexpected;
nothing is passed over. The expected shapes come from our own classes on the meta device: no memory, no folder code.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_jina_bert import JinaBertConfig, JinaBertForMaskedLM, JinaBertModel
from modeling_jina_bert.checkpoints import is_qk_post_norm

from .checkpoint_files import DTYPES, FolderError, StoredTensor, read_json, stored_tensors

PREFIX = "bert."
RECOMPUTED = ("embeddings.position_ids", "embeddings.token_type_ids", "encoder.alibi")
"""Buffers that releases of the official code may have stored; none carries anything learned."""
TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
"""Copies of the word embeddings and of cls.predictions.bias that some files hold a second time."""
_TASK_HEADS = ("classifier", "qa_outputs")
_MOST_LAYERS = 512  # the meta model of a configuration that says 10**9 layers would not end


@dataclass(frozen=True)
class Comparison:
    """The tensors of a folder, by what they are. Names as stored, unless stated.

    Attributes:
        encoder: Stored name -> name in our `JinaBertModel`, pooler included.
        heads: Head ("cls", "classifier", "qa_outputs") -> its tensors.
        dropped: Stored name -> why no conversion keeps it.
        unexpected: Tensors that no JinaBERT of this layout has.
        missing: Tensors of the encoder, or of a head that is there in part, by their names in our classes.
        mismatched: A line for each tensor of another shape than the configuration says, or of no floating dtype.
    """

    encoder: dict[str, str] = field(default_factory=dict)
    heads: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """One line for each kind of deviation; empty when the tensors are those of the configuration."""
        lines = list(self.mismatched)
        if self.missing:
            lines.append(f"lacks {len(self.missing)} tensors: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"has {len(self.unexpected)} tensors that no JinaBERT of its layout has: "
                         f"{_some(self.unexpected)}")  # fmt: skip
        return lines


def read_config(folder: Path, names: set[str]) -> JinaBertConfig:
    """The configuration of a folder of either form, its layout taken from the tensor names.

    Args:
        folder: A model folder.
        names: All tensor names of its weights.

    Raises:
        FolderError: config.json is missing, is of another model or is malformed; or the names are of neither layout.
    """
    if not isinstance(read_json(folder / "config.json"), dict):
        raise FolderError(f"{folder / 'config.json'} holds no JSON object.")
    try:
        config = JinaBertConfig.from_pretrained(folder)
        config.qk_post_norm = is_qk_post_norm(names)
    except FolderError:
        raise
    except Exception as error:  # strict validation has exception classes of its own, over several lines
        raise FolderError(f"{folder}: {_whole(error)}") from None
    if not 0 < config.num_hidden_layers <= _MOST_LAYERS:
        raise FolderError(
            f"{folder / 'config.json'}: num_hidden_layers={config.num_hidden_layers} is not in 1 ... {_MOST_LAYERS}."
        )
    return config


def expected_shapes(config: JinaBertConfig) -> dict[str, tuple[int, ...]]:
    """Bare tensor name -> shape of everything whose shape the configuration fixes: encoder, pooler and MLM head."""
    try:
        return dict(_expected_shapes(tuple(sorted(_shape_fields(config).items()))))
    except Exception as error:  # sizes below zero, or beyond what a tensor can have
        raise FolderError(f"config.json describes no model that can be built: {_whole(error)}") from None


def compare(stored: dict[str, StoredTensor], config: JinaBertConfig) -> Comparison:
    """Sorts the tensors of a folder.

    Args:
        stored: All tensors of the folder.
        config: From `read_config`.

    Raises:
        FolderError: The configuration describes no model that can be built.
    """
    result, expected = Comparison(), expected_shapes(config)
    found: set[str] = set()
    for name in sorted(stored):
        bare = name.removeprefix(PREFIX)
        head = bare.split(".")[0]
        if bare in RECOMPUTED:
            result.dropped[name] = "a buffer that is computed anew"
            continue
        if bare in TIED:
            result.dropped[name] = "a copy of the tensor it is tied to"
            continue
        if head in _TASK_HEADS:
            result.heads.setdefault(head, []).append(name)
            continue
        if bare not in expected:
            result.unexpected.append(name)
            continue
        found.add(bare)
        if head == "cls":
            result.heads.setdefault(head, []).append(name)
        else:
            result.encoder[name] = bare
        if stored[name].shape != expected[bare]:
            result.mismatched.append(f"{name} is {stored[name].shape}, the configuration says {expected[bare]}")
        if stored[name].dtype not in DTYPES:
            result.mismatched.append(f"{name} is stored as {stored[name].dtype}, not one of {', '.join(DTYPES)}")
    absent = [name for name in expected if name not in found]
    whole = {head for head in ("cls", "pooler") if any(name.startswith(f"{head}.") for name in found)}
    result.missing.extend(name for name in absent if name.split(".")[0] not in {"cls", "pooler"} - whole)
    return result


def read_fitting(folder: Path) -> tuple[dict[str, StoredTensor], JinaBertConfig]:
    """The tensors of a folder and its configuration, which say the same.

    Raises:
        FolderError: They do not, or one of them cannot be read.
    """
    stored = stored_tensors(folder)
    config = read_config(folder, set(stored))
    if problems := compare(stored, config).problems():
        raise FolderError(f"{folder} is no JinaBERT that we know: {'; '.join(problems)}.")
    return stored, config


def _shape_fields(config: JinaBertConfig) -> dict[str, object]:
    fields = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "type_vocab_size", "feed_forward_type", "qk_post_norm",
    )  # fmt: skip
    return {name: getattr(config, name) for name in fields}


@functools.lru_cache(maxsize=8)
def _expected_shapes(fields: tuple[tuple[str, object], ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    config = JinaBertConfig(**dict(fields))  # type: ignore[arg-type]
    with torch.device("meta"):
        models = JinaBertModel(config), JinaBertForMaskedLM(config)
    shapes = {
        name.removeprefix(PREFIX): tuple(tensor.shape)
        for model in models
        for name, tensor in model.state_dict().items()
    }
    return tuple((name, shape) for name, shape in shapes.items() if name not in TIED)


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _whole(error: BaseException) -> str:
    """A message of several lines as one."""
    return " ".join(str(error).split()).rstrip(".") + "."
