"""What the sentence-transformers files of a folder say, and what of it goes into a folder that is made of it.

Law: a setting that changes what `SentenceTransformer.encode` gives is carried over, or the folder is refused.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_jina_bert.checkpoints import is_plain_name

from .checkpoint_files import FolderError, read_json

_SETTINGS = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
_LONGEST = 10**9  # above it a tokenizer's limit is a placeholder for none


@dataclass(frozen=True)
class CarriedSettings:
    """What the sentence-transformers files of a source say.

    Attributes:
        is_default: Whether there were none.
        normalize: Whether embeddings are scaled to length 1.
        include_prompt: Whether the tokens of a prompt count in the mean.
        max_length: Tokens a text is cut at; None if not said.
        settings: Those of config_sentence_transformers.json, prompts and the similarity among them.
    """

    is_default: bool = True
    normalize: bool = True
    include_prompt: bool = True
    max_length: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def carried_settings(folder: Path) -> CarriedSettings:
    """Reads modules.json and what it names.

    Raises:
        FolderError: Modules other than Transformer, mean Pooling and Normalize: they would be lost.
    """
    if not (folder / "modules.json").is_file():
        return CarriedSettings()
    modules = read_json(folder / "modules.json")
    try:
        kinds = [str(module["type"]).split(".")[-1] for module in modules]
        paths = [str(module["path"]) for module in modules]
    except (TypeError, KeyError):
        raise FolderError(f"{folder / 'modules.json'} is not a list of modules with type and path.") from None
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise FolderError(
            f"{folder / 'modules.json'} has the modules {', '.join(kinds)}: only Transformer, Pooling and Normalize "
            "are carried over."
        )
    if not is_plain_name(paths[1]):
        raise FolderError(f"{folder / 'modules.json'} names {paths[1]!r}, which is not a folder in this one.")
    pooling = read_json(folder / paths[1] / "config.json")
    modes = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    if (pooling.get("pooling_mode") or "mean") != "mean" or modes not in ([], ["pooling_mode_mean_tokens"]):
        raise FolderError(f"{folder / paths[1]}: pooling is not the mean over the tokens: {pooling}.")
    found = _optional(folder / "config_sentence_transformers.json")
    settings = {name: found[name] for name in _SETTINGS if found.get(name) is not None}
    include_prompt = pooling.get("include_prompt") is not False
    return CarriedSettings(False, kinds[-1] == "Normalize", include_prompt, _max_length(folder), settings)


def _max_length(folder: Path) -> int | None:
    """Where sentence-transformers up to 5, or from 6 on, writes it."""
    length = _optional(folder / "sentence_bert_config.json").get("max_seq_length")
    if length is None:
        length = _optional(folder / "tokenizer_config.json").get("model_max_length")
    return int(length) if isinstance(length, (int, float)) and length < _LONGEST else None


def _optional(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
