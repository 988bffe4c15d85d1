"""Loading of published JinaBERT checkpoints: layout detection, and no silent gaps.

Law: after `from_pretrained` every tensor of the encoder came from the checkpoint, is a finite float and has the shape
that the configuration says, or an error named the file or the tensors that are not so. The published repositories say
`model_type: bert` and name foreign code; what decides here is the names of their tensors, read from the file headers
(no tensor is loaded twice). Every file that an index names lies in the folder of the index.
"""

import copy
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file, extract_commit_hash

logger = logging.getLogger(__name__)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating dtypes of safetensors headers."""
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids", "encoder.alibi")
"""Tensors of published files that are no parameters."""
_HEADS = ("pooler", "cls", "classifier", "qa_outputs")
"""Modules that a checkpoint may lack as a whole: fine-tuning starts from fresh ones."""
_BODY = ("bert", "embeddings", "encoder")
"""Modules that it may not; beside them a user's own class may have any, which are new, too."""


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


def checkpoint_tensors(model_name_or_path: str | os.PathLike, **hub_arguments: Any) -> dict[str, StoredTensor] | None:
    """All tensors of a checkpoint, by the headers of its files.

    Args:
        model_name_or_path: A folder or a Hub repository.
        **hub_arguments: `revision`, `token`, `cache_dir` and the others that `cached_file` takes; `variant`.

    Returns:
        Tensor name -> what the header says, or None if there is no .safetensors or .bin weight file (an adapter or
        GGUF folder).

    Raises:
        ValueError: A file is truncated, malformed, missing or not in the folder; the error names it.
    """
    variant = hub_arguments.pop("variant", None)
    for name in _WEIGHT_FILES:
        if variant:  # model.safetensors -> model.fp16.safetensors, model.safetensors.index.fp16.json
            stem, extension = name.rsplit(".", 1)
            name = f"{stem}.{variant}.{extension}"
        path = _optional_file(model_name_or_path, name, hub_arguments)
        if path is None:
            continue
        return _shards(model_name_or_path, path, hub_arguments) if ".index." in name else read_header(path)
    return None


def _optional_file(name_or_path, name: str, hub_arguments: dict[str, Any]) -> str | None:
    """The path of a file of a folder or repository; None if it has none."""
    return cached_file(
        name_or_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments,
    )


def checkpoint_tensor_names(model_name_or_path: str | os.PathLike, **hub_arguments: Any) -> set[str] | None:
    """The names alone; see `checkpoint_tensors`."""
    tensors = checkpoint_tensors(model_name_or_path, **hub_arguments)
    return None if tensors is None else set(tensors)


def _shards(model_name_or_path, index: str, hub_arguments: dict[str, Any]) -> dict[str, StoredTensor]:
    weight_map = read_weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        path = cached_file(model_name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        if path is None:
            raise ValueError(f"{index} names {file!r}, which is missing.")
        tensors |= {name: tensor for name, tensor in read_header(path).items() if weight_map.get(name) == file}
    if missing := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"{index} lists {missing[0]} in {weight_map[missing[0]]}, which does not hold it.")
    return tensors


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file right in a folder: no directory, no way out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", ":"}


def read_weight_map(path: str | os.PathLike) -> dict[str, str]:
    """Tensor name -> shard, as an index says; whether the shards are there is not looked at.

    Raises:
        ValueError: It is no index, or names what is not a file right in the folder.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {_one_line(error)}.") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or "metadata" not in content:
        raise ValueError(f"{path} lacks weight_map or metadata; transformers reads both.")
    if odd := sorted(str(file) for file in weight_map.values() if not is_plain_name(file)):
        raise ValueError(f"{path} names {odd[0]!r}, which is not a file name in this folder.")
    return weight_map


def read_header(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of one .safetensors or .bin file; of neither a tensor is read.

    Raises:
        ValueError: It is cut off or malformed, or holds something other than named tensors.
    """
    file = Path(path).name
    if file.endswith(".safetensors"):
        try:
            # Opening checks that the tensors cover the file exactly, so a truncated one is found here.
            with safe_open(path, framework="pt") as source:
                slices = ((name, source.get_slice(name)) for name in source.keys())
                return {name: StoredTensor(file, tuple(x.get_shape()), x.get_dtype()) for name, x in slices}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {_one_line(error)}.") from None
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: StoredTensor(file, tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in load_pickle(path).items()
    }


def load_pickle(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """A .bin file through torch's restricted unpickler, which builds tensors and containers and calls nothing else.

    The file is mapped, not read. TRAP: on "meta" a tensor that reaches beyond its storage would be no error.

    Raises:
        ValueError: It is cut off or malformed, or holds something other than named tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a malformed pickle makes of itself
        raise ValueError(f"{path} is not a whole PyTorch file of tensors: {_one_line(error)}.") from None
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError(f"{path} holds something other than named tensors.")
    return tensors


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split("\n")[0].split()).rstrip(".")[:300]


def is_qk_post_norm(names: set[str]) -> bool:
    """Layout of a checkpoint from its tensor names.

    Args:
        names: All tensor names of the checkpoint.

    Returns:
        True for the layout of jina-bert-v2-qk-post-norm, False for that of jina-bert-implementation.

    Raises:
        ValueError: The names are of neither layout; the error lists some of them.
    """
    layer_0 = sorted(name for name in names if "encoder.layer.0." in name)
    if any(".mlp.up_gated_layer." in name for name in layer_0):  # quantised ones have more than a weight
        return True
    if any(".mlp.gated_layers." in name for name in layer_0):
        return False
    found = ", ".join(layer_0 or sorted(names)[:20]) or "no tensors"
    raise ValueError(
        "This checkpoint is of neither JinaBERT layout: it has neither mlp.gated_layers (jina-bert-implementation) "
        f"nor mlp.up_gated_layer (jina-bert-v2-qk-post-norm). Found: {found}."
    )


_PreTrainedModel: Any = object  # what this is mixed into; Any for the type checker


class PublishedCheckpointMixin(_PreTrainedModel):
    """`from_pretrained` for folders and repositories of the official form and of ours, strict about gaps."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads a JinaBERT; see `transformers.PreTrainedModel.from_pretrained` for the arguments.

        Takes both published layouts, with or without the `bert.` prefix, .safetensors or .bin, whatever dtype is
        stored (the weights are cast to the dtype that config.json names, float32 in the released models, unless
        `dtype` is given). A pooler or task head that the checkpoint lacks as a whole is new and logged as such; for
        `JinaBertModel` a missing pooler is left out. `config._commit_hash` is the commit of a Hub repository, from
        which the tokenizer is taken too.

        Raises:
            ValueError: The checkpoint is no JinaBERT or damaged, lacks a tensor, or has one of another shape, of no
                floating dtype or with a value that is not finite.
        """
        stored = None
        if pretrained_model_name_or_path is not None and kwargs.get("gguf_file") is None:
            hub_arguments = {name: kwargs[name] for name in (*_HUB_ARGUMENTS, "variant") if name in kwargs}
            stored = checkpoint_tensors(pretrained_model_name_or_path, **hub_arguments)
        if stored is None:
            if not cls._has_pooler(_names_under_adapter(pretrained_model_name_or_path, kwargs)):
                kwargs.setdefault("add_pooling_layer", False)
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

        # NOTE: not isinstance of our class: as remote code, AutoConfig may hold another copy of it.
        if not isinstance(config, PreTrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            config, kwargs = cls._read_config(source, kwargs)
        elif config.model_type != cls.config_class.model_type:
            raise ValueError(
                f"config is of model_type {config.model_type!r}, expected {cls.config_class.model_type!r}."
            )
        names = set(stored)
        try:
            qk_post_norm = is_qk_post_norm(names)
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from None
        if qk_post_norm != config.qk_post_norm:
            logger.info("config.json does not say so, but the tensor names do: qk_post_norm=%s", qk_post_norm)
            config.qk_post_norm = qk_post_norm
        if not cls._has_pooler(names):
            kwargs.setdefault("add_pooling_layer", False)
        _log_prefix(names, cls.base_model_prefix, is_base_model=hasattr(cls, "encode"))

        _refuse_other_layers(pretrained_model_name_or_path, names, config)
        if getattr(config, "quantization_config", None) is None:  # else the files hold packed integers
            any_shape = kwargs.get("ignore_mismatched_sizes", False)
            cls._refuse_mismatched(pretrained_model_name_or_path, stored, config, *model_args, any_shape=any_shape)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        is_quantized = getattr(model.config, "quantization_config", None) is not None  # with tensors of its own
        _refuse_gaps(pretrained_model_name_or_path, names, info, any_layer=is_quantized)
        _refuse_not_finite(pretrained_model_name_or_path, model)
        model._loaded_with({name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs})
        model.config._commit_hash = _commit(pretrained_model_name_or_path, hub_arguments)
        return (model, info) if wants_info else model

    @classmethod
    def _refuse_mismatched(
        cls, path, stored: dict[str, StoredTensor], config: PreTrainedConfig, *model_args: Any, any_shape: bool
    ):
        """Raises ValueError for tensors of another shape than the configuration says, or of no floating dtype.

        Before anything is loaded: transformers would allocate what a configuration that lies asks for.
        """
        try:
            with torch.device("meta"):
                expected = cls(copy.deepcopy(config), *model_args).state_dict()
        except Exception as error:  # sizes below zero, or beyond what a tensor can have
            message = " ".join(str(error).split())
            raise ValueError(f"{path}: config.json describes no model that can be built: {message}") from error
        prefix = f"{cls.base_model_prefix}."
        shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in expected.items()}
        lines = []
        for name, tensor in sorted(stored.items()):
            shape = shapes.get(name.removeprefix(prefix))
            if shape is not None and tensor.shape != shape and not any_shape:
                lines.append(f"{name} is {tensor.shape}, the configuration says {shape}")
            if shape is not None and tensor.dtype not in DTYPES:
                lines.append(f"{name} is stored as {tensor.dtype}, not one of {', '.join(DTYPES)}")
        if lines:
            raise ValueError(f"{path} does not fit its configuration: {'; '.join(lines)}.")

    @classmethod
    def _read_config(cls, source, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """The configuration, and the arguments that are not of it."""
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        options = {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}
        try:
            config, unused = cls.config_class.from_pretrained(
                source, return_unused_kwargs=True, **hub_arguments, **options
            )
        except OSError:  # transformers names the file, and what is wrong with it
            raise
        except Exception as error:  # strict validation has exception classes of its own, over several lines
            raise ValueError(f"{source}: config.json is of no JinaBERT: {' '.join(str(error).split())}") from error
        return config, {**hub_arguments, **unused}

    def _loaded_with(self, hub_arguments: dict[str, Any]):
        """Is told where the files came from, for those that are read later."""

    @classmethod
    def _has_pooler(cls, names: set[str]) -> bool:
        """Whether the model gets a pooler; only the bare encoder can do without one."""
        return True


def _names_under_adapter(name_or_path, kwargs: dict[str, Any]) -> set[str]:
    """The names of the tensors of the model that an adapter is of; without one, or its base, a pooler's."""
    file = None
    if name_or_path is not None and kwargs.get("gguf_file") is None:
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        file = _optional_file(name_or_path, "adapter_config.json", hub_arguments)
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path") if file else None
    stored = checkpoint_tensors(base) if base else None
    return set(stored) if stored is not None else {"pooler.dense.weight"}


def _commit(name_or_path, hub_arguments: dict[str, Any]) -> str | None:
    """The commit of a repository that was loaded, as its cache says; None for a folder."""
    if os.path.isdir(name_or_path):
        return None
    where = {name: value for name, value in hub_arguments.items() if name in ("cache_dir", "revision", "subfolder")}
    found = cached_file(
        name_or_path,
        "config.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return extract_commit_hash(found, None)


def _log_prefix(names: set[str], prefix: str, *, is_base_model: bool):
    prefixed = [name for name in names if name.startswith(f"{prefix}.")]
    if is_base_model and prefixed:
        logger.info("Renamed %d tensors: the prefix %r was removed.", len(prefixed), f"{prefix}.")
    if not is_base_model and not prefixed:
        logger.info("Renamed the tensors of the encoder: the prefix %r was added.", f"{prefix}.")


def _refuse_other_layers(path, names: set[str], config: PreTrainedConfig):
    """Raises ValueError for a number of layers that is not that of the tensors; 10**9 of them would never be built."""
    layers = {found[1] for name in names if (found := re.search(r"\bencoder\.layer\.(\d+)\.", name))}
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"{path} holds {len(layers)} layers, the configuration says num_hidden_layers={config.num_hidden_layers}."
        )


def _refuse_gaps(path, names: set[str], info: dict, *, any_layer: bool):
    """Raises ValueError for tensors that the checkpoint should have had and has not, and for layers that are not ours.

    Args:
        path: Of the checkpoint.
        names: Its tensors.
        info: What transformers says of them.
        any_layer: Whether the layers may have tensors that the model has no place for.
    """
    present = {part for name in names for part in name.split(".")}
    modules = {name.split(".")[0] for name in names}

    def is_new(name: str) -> bool:
        parts = name.split(".")
        own = parts[0] not in _BODY and parts[0] not in modules
        return own or any(head in parts and head not in present for head in _HEADS)

    missing = sorted(name for name in info["missing_keys"] if not is_new(name))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors of the model: {', '.join(missing)}.")
    layers = re.compile(r"(^|\.)(encoder|embeddings)\.")
    unknown = sorted(x for x in info["unexpected_keys"] if layers.search(x) and not x.endswith(_BUFFERS))
    if unknown and not any_layer:
        raise ValueError(
            f"{path} has {len(unknown)} tensors in its layers that are of neither JinaBERT layout: "
            f"{', '.join(unknown[:6])}{', ...' if len(unknown) > 6 else ''}."
        )
    if info["unexpected_keys"]:
        logger.info("Left out, not part of this class: %s", ", ".join(sorted(info["unexpected_keys"])))


def _refuse_not_finite(path, model: torch.nn.Module):
    """Raises ValueError for a parameter with a value that is not finite, as stored or in the dtype it was cast to."""
    for name, parameter in model.named_parameters():
        if type(parameter) is not torch.nn.Parameter or not parameter.dtype.itemsize > 1:
            continue  # quantised: integers, or a tensor class without a sum
        # The sum is 17 times as fast; it is finite only if every value is, and may overflow.
        if not parameter.is_meta and not torch.isfinite(parameter.sum()) and not torch.isfinite(parameter).all():
            raise ValueError(f"{path}: {name} has values that are not finite in {parameter.dtype}.")
