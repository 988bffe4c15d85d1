"""Loading of published JinaBERT checkpoints: layout detection, and no silent gaps.

Law: after `from_pretrained` every tensor of the encoder came from the checkpoint, or an error named the ones that did
not. The published repositories say `model_type: bert` and name foreign code; what decides here is the names of their
tensors, read from the file headers (no tensor is loaded twice).
"""

import json
import logging
import os
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

logger = logging.getLogger(__name__)

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_HEADS = ("pooler", "cls", "classifier", "qa_outputs")
"""Modules that a checkpoint may lack as a whole: fine-tuning starts from fresh ones."""


def checkpoint_tensor_names(model_name_or_path: str | os.PathLike, **hub_arguments: Any) -> set[str] | None:
    """Names of all tensors of a checkpoint, without reading the tensors.

    Args:
        model_name_or_path: A folder or a Hub repository.
        **hub_arguments: `revision`, `token`, `cache_dir` and the others that `cached_file` takes; `variant`.

    Returns:
        The names, or None if there is no .safetensors or .bin weight file (an adapter or GGUF folder).
    """
    variant = hub_arguments.pop("variant", None)
    for name in _WEIGHT_FILES:
        if variant:  # model.safetensors -> model.fp16.safetensors, model.safetensors.index.fp16.json
            stem, extension = name.rsplit(".", 1)
            name = f"{stem}.{variant}.{extension}"
        path = cached_file(
            model_name_or_path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_arguments,
        )
        if path is None:
            continue
        if ".index." in name:
            with open(path, encoding="utf-8") as file:
                return set(json.load(file)["weight_map"])
        if name.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        return set(torch.load(path, map_location="meta", weights_only=True, mmap=True))
    return None


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
    if any(name.endswith("mlp.up_gated_layer.weight") for name in layer_0):
        return True
    if any(name.endswith("mlp.gated_layers.weight") for name in layer_0):
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
        `JinaBertModel` a missing pooler is left out.

        Raises:
            ValueError: The checkpoint is no JinaBERT, lacks a tensor, or has one of another shape.
        """
        names = None
        if pretrained_model_name_or_path is not None and kwargs.get("gguf_file") is None:
            hub_arguments = {name: kwargs[name] for name in (*_HUB_ARGUMENTS, "variant") if name in kwargs}
            names = checkpoint_tensor_names(pretrained_model_name_or_path, **hub_arguments)
        if names is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

        # NOTE: not isinstance of our class: as remote code, AutoConfig may hold another copy of it.
        if not isinstance(config, PreTrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            options = {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}
            config, unused = cls.config_class.from_pretrained(
                source, return_unused_kwargs=True, **hub_arguments, **options
            )
            kwargs = {**hub_arguments, **unused}
        elif config.model_type != cls.config_class.model_type:
            raise ValueError(
                f"config is of model_type {config.model_type!r}, expected {cls.config_class.model_type!r}."
            )
        qk_post_norm = is_qk_post_norm(names)
        if qk_post_norm != config.qk_post_norm:
            logger.info("config.json does not say so, but the tensor names do: qk_post_norm=%s", qk_post_norm)
            config.qk_post_norm = qk_post_norm
        if not cls._has_pooler(names):
            kwargs.setdefault("add_pooling_layer", False)
        _log_prefix(names, cls.base_model_prefix, is_base_model=hasattr(cls, "encode"))

        wants_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        _refuse_gaps(pretrained_model_name_or_path, names, info, ignore_mismatched=ignore_mismatched)
        return (model, info) if wants_info else model

    @classmethod
    def _has_pooler(cls, names: set[str]) -> bool:
        """Whether the model gets a pooler; only the bare encoder can do without one."""
        return True


def _log_prefix(names: set[str], prefix: str, *, is_base_model: bool):
    prefixed = [name for name in names if name.startswith(f"{prefix}.")]
    if is_base_model and prefixed:
        logger.info("Renamed %d tensors: the prefix %r was removed.", len(prefixed), f"{prefix}.")
    if not is_base_model and not prefixed:
        logger.info("Renamed the tensors of the encoder: the prefix %r was added.", f"{prefix}.")


def _refuse_gaps(path, names: set[str], info: dict, *, ignore_mismatched: bool):
    """Raises ValueError for tensors that the checkpoint should have had and has not, or has in another shape."""
    present = {part for name in names for part in name.split(".")}
    missing = sorted(
        name
        for name in info["missing_keys"]
        if not any(head in name.split(".") and head not in present for head in _HEADS)
    )
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors of the model: {', '.join(missing)}.")
    if info["mismatched_keys"] and not ignore_mismatched:
        shapes = "; ".join(
            f"{name} is {tuple(found)}, the configuration says {tuple(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        )
        raise ValueError(f"{path} has tensors of another shape: {shapes}.")
    if info["unexpected_keys"]:
        logger.info("Left out, not part of this class: %s", ", ".join(sorted(info["unexpected_keys"])))
