"""JinaBERT configuration.

Law: a configuration either describes a JinaBERT that this code computes exactly, or it is refused with the offending
value. The legacy keys of the published repositories (``model_type: bert``, foreign ``auto_map``) are accepted here and
nowhere else.
"""

import functools
import logging
from typing import Literal

import transformers
from packaging.version import parse

if parse(transformers.__version__) < parse("5.4"):
    raise ImportError(
        f"JinaBERT needs transformers>=5.4, found {transformers.__version__}: pip install -U transformers"
    )

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

_MODULE = "modeling_jina_bert"
AUTO_MAP = {
    "AutoConfig": "configuration_jina_bert.JinaBertConfig",
    "AutoModel": f"{_MODULE}.JinaBertModel",
    "AutoModelForMaskedLM": f"{_MODULE}.JinaBertForMaskedLM",
    "AutoModelForSequenceClassification": f"{_MODULE}.JinaBertForSequenceClassification",
    "AutoModelForTokenClassification": f"{_MODULE}.JinaBertForTokenClassification",
    "AutoModelForQuestionAnswering": f"{_MODULE}.JinaBertForQuestionAnswering",
    "AutoModelForMultipleChoice": f"{_MODULE}.JinaBertForMultipleChoice",
}
"""Auto class -> class in the files beside the weights; written into every saved config.json."""

_QK_POST_NORM_REPOSITORY = "jina-bert-v2-qk-post-norm"
_ACTIVATION_OF = {"geglu": "gelu", "reglu": "relu"}
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "type_vocab_size"
)  # fmt: skip


@strict
class JinaBertConfig(PreTrainedConfig):
    r"""Configuration of a JinaBERT (arXiv 2310.19923, section 3).

    The defaults are the released base model; `small` is 4 layers, 512 hidden, 8 heads, 2048 intermediate.

    Args:
        vocab_size: Rows of the word embedding; the released models pad bert-base-uncased's 30,522 entries to 30,528.
        hidden_size: Width of the hidden states; a multiple of `num_attention_heads`.
        num_hidden_layers: Number of Transformer layers.
        num_attention_heads: Heads a layer; any number, ALiBi slopes exist for all of them.
        intermediate_size: Width of one half of the gated linear unit.
        feed_forward_type: "geglu" (exact erf GELU; small, base) or "reglu" (ReLU; large).
        qk_post_norm: False for the layout of jina-bert-implementation (small-en, base-en, de, zh); True for that of
            jina-bert-v2-qk-post-norm (base-code): LayerNorm on the projected queries and keys, a second residual
            LayerNorm after attention, and the activation on the second half of the gated linear unit.
        max_position_embeddings: Declared maximum length in tokens. No table and no buffer has this size.
        type_vocab_size: Number of token types.
        hidden_dropout_prob: Dropout after the embeddings, the attention output and the MLP.
        attention_probs_dropout_prob: Dropout on the attention probabilities (0.0 in every released model).
        classifier_dropout: Dropout before a classification head; None takes `hidden_dropout_prob`.
        initializer_range: Standard deviation of the normal initialisation of all matrices.
        layer_norm_eps: Epsilon of every LayerNorm.
        sparse_prediction: If True, `JinaBertForMaskedLM` called with labels computes (and returns) logits at the
            labelled positions only: `(labelled, vocab_size)` instead of `(batch, length, vocab_size)`.
        sparse_attention: Leave out of attention what is proven to be below the rounding of the dtype (`sparsity.py`).
        position_embedding_type: "alibi"; kept because the published config.json files carry it.
        emb_pooler: "mean"; kept because the published config.json files carry it.
        model_max_length: Length in tokens that `encode` truncates to, unless the limit of the tokenizer is smaller.

    Raises:
        ValueError: A field that no JinaBERT has (absolute positions, an ungated MLP, an indivisible width, no layer),
            or of another type.
    """

    model_type = "jina_bert"

    vocab_size: int = 30528
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    feed_forward_type: Literal["geglu", "reglu"] = "geglu"
    qk_post_norm: bool = False
    max_position_embeddings: int = 8192
    type_vocab_size: int = 2
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    classifier_dropout: float | int | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    sparse_prediction: bool = False
    sparse_attention: bool = True
    position_embedding_type: Literal["alibi"] = "alibi"
    emb_pooler: Literal["mean"] | None = "mean"
    model_max_length: int = 8192
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        published_code = " ".join(str(value) for value in (kwargs.pop("auto_map", None) or {}).values())
        for unused in ("use_cache", "gradient_checkpointing", "is_decoder", "add_cross_attention"):
            if kwargs.pop(unused, False) and unused in ("is_decoder", "add_cross_attention"):
                raise ValueError(f"{unused}=True: JinaBERT is an encoder; there is no causal or cross attention.")
        # The published files say hidden_act "gelu" whatever feed_forward_type is; only the latter decides.
        kwargs.pop("hidden_act", None)
        super().__post_init__(**kwargs)
        if _QK_POST_NORM_REPOSITORY in published_code:
            self.qk_post_norm = True
        self.auto_map = dict(AUTO_MAP)
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is less than 1.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Reads config.json; the published `model_type: bert` with ALiBi is ours, without ALiBi it is a plain BERT.

        Raises:
            ValueError: The configuration is that of another model.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == "bert" and config_dict.get("position_embedding_type") == "alibi":
            logger.info("%s is of the published form; read as model_type jina_bert", pretrained_model_name_or_path)
            config_dict = {**config_dict, "model_type": cls.model_type}
            # A field of that code, "torch" or None; transformers reads one of its own of this name.
            config_dict.pop("attn_implementation", None)
        elif model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {model_type!r} model with position_embedding_type="
                f"{config_dict.get('position_embedding_type')!r}, not a JinaBERT."
            )
        return config_dict, kwargs

    @property
    def hidden_act(self) -> str:
        """Activation inside the gated linear unit: "gelu" (exact) or "relu"."""
        return _ACTIVATION_OF[self.feed_forward_type]


def _with_value_errors(init):
    """The constructor, with a ValueError in place of the error of `strict`, which is none."""

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error

    return checked


JinaBertConfig.__init__ = _with_value_errors(JinaBertConfig.__init__)  # type: ignore[method-assign]


__all__ = ["JinaBertConfig"]
