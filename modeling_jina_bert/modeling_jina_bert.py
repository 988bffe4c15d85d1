"""JinaBERT: BERT with symmetric ALiBi, gated MLPs and no position embeddings (arXiv 2310.19923, section 3).

Law: the outputs equal those of the official code for both published checkpoint layouts; parameter names are those of
the published files. No buffer exists at all, so nothing grows with `max_position_embeddings` and nothing is lost when
transformers builds the model on the meta device.
"""

import functools
import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .alibi import alibi_slopes
from .attention import ATTENTION_FUNCTIONS, eager_attention
from .checkpoints import PublishedCheckpointMixin
from .chunking import EncodeChunksMixin
from .configuration_jina_bert import JinaBertConfig
from .encoding import EncodeMixin
from .packing import Sequences

logger = logging.getLogger(__name__)

MLP_BLOCK_BYTES = 2**24
"""Bytes of the widest intermediate of an MLP held at a time in inference on the CPU: about a last-level cache."""
LOGITS_BLOCK = 512
"""Labelled positions whose logits exist at a time in the training loss."""


@functools.cache
def warn_if_emulated(dtype: torch.dtype, device: torch.device):
    """Logs one warning if the CPU has no instructions for this half precision and emulates it, far slower."""
    supported = {
        torch.bfloat16: getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None),
        torch.float16: getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None),
    }.get(dtype)
    if device.type == "cpu" and supported is not None and not supported():
        logger.warning(
            "This CPU has no instructions for %s: float32 is many times faster. Load the model with "
            "dtype=torch.float32, or call model.float().",
            dtype,
        )


class JinaBertEmbeddings(nn.Module):
    """Word and token-type embeddings, LayerNorm, dropout. No positions."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if token_type_ids is None:
            token_types = self.token_type_embeddings.weight[0]
        else:
            token_types = self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(inputs_embeds + token_types))


class JinaBertSelfAttention(nn.Module):
    """Multi-head attention under the ALiBi bias; with `qk_post_norm`, LayerNorm over all of the projected q and k."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        if config.qk_post_norm:
            self.layer_norm_q = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.layer_norm_k = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, sequences: Sequences, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        if self.config.qk_post_norm:
            query, key = self.layer_norm_q(query), self.layer_norm_k(key)
        query, key, value = (x.unflatten(-1, (-1, self.head_size)) for x in (query, key, value))
        if sequences.cu_seqlens is not None and not sequences.is_flat:
            query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # tokens, heads, head_size

        # Only the eager path has probabilities to return, whatever the configured implementation is.
        attention = (
            eager_attention if output_attentions else ATTENTION_FUNCTIONS[self.config._attn_implementation or "eager"]
        )
        context, probabilities = attention(
            query,
            key,
            value,
            sequences,
            scaling=self.head_size**-0.5,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
        )
        return context.reshape(hidden_states.shape), probabilities


class JinaBertSelfOutput(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(context)) + residual)


class JinaBertAttention(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.self = JinaBertSelfAttention(config)
        self.output = JinaBertSelfOutput(config)

    def forward(self, hidden_states: torch.Tensor, sequences: Sequences, output_attentions: bool) -> torch.Tensor:
        context, _ = self.self(hidden_states, sequences, output_attentions)
        return self.output(context, hidden_states)


def _by_blocks_of_tokens(function: Callable, hidden_states: torch.Tensor, width: int) -> torch.Tensor:
    """Applies a token-wise function to blocks whose `(tokens, width)` intermediate has `MLP_BLOCK_BYTES`.

    In inference on the CPU only: the block stays in the cache between the passes over it, and the memory does not grow
    with the batch. Elsewhere kernels are launched once.
    """
    if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(hidden_states)
    size = max(1, MLP_BLOCK_BYTES // (width * hidden_states.element_size()))
    blocks = hidden_states.flatten(0, -2).split(size)
    if len(blocks) == 1:
        return function(hidden_states)
    return torch.cat([function(block) for block in blocks]).view(hidden_states.shape)


class JinaBertMLP(nn.Module):
    """Gated linear unit of jina-bert-implementation: ``norm(wo(act(first half) * second half) + x)``."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _by_blocks_of_tokens(self._forward, hidden_states, self.gated_layers.out_features)

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, linear = self.gated_layers(hidden_states).chunk(2, dim=-1)
        return self.layernorm(self.wo(self.dropout(self.act(gate) * linear)) + hidden_states)


class JinaBertPostNormMLP(nn.Module):
    """Gated linear unit of jina-bert-v2-qk-post-norm: ``down(first half * act(second half))``, no residual inside."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.up_gated_layer = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.down_layer = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _by_blocks_of_tokens(self._forward, hidden_states, self.up_gated_layer.out_features)

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        linear, gate = self.up_gated_layer(hidden_states).chunk(2, dim=-1)
        return self.down_layer(self.dropout(linear * self.act(gate)))


class JinaBertLayer(GradientCheckpointingLayer):
    """Attention and MLP, post-LayerNorm; the arrangement of either published layout."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.qk_post_norm = config.qk_post_norm
        self.attention = JinaBertAttention(config)
        if config.qk_post_norm:
            self.layer_norm_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.layer_norm_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = JinaBertPostNormMLP(config) if config.qk_post_norm else JinaBertMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, sequences: Sequences, output_attentions: bool = False
    ) -> torch.Tensor:
        attended = self.attention(hidden_states, sequences, output_attentions)
        if not self.qk_post_norm:
            return self.mlp(attended)
        # NOTE: the residual enters twice, inside `attention.output` and here; the published weights expect it.
        attended = self.layer_norm_1(hidden_states + attended)
        return self.layer_norm_2(attended + self.mlp(attended))


class JinaBertEncoder(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.layer = nn.ModuleList([JinaBertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self, hidden_states: torch.Tensor, sequences: Sequences, output_attentions: bool = False
    ) -> BaseModelOutput:
        for layer in self.layer:
            hidden_states = layer(hidden_states, sequences, output_attentions)
        return BaseModelOutput(last_hidden_state=hidden_states)


class JinaBertPooler(nn.Module):
    """tanh(dense(first token)): the input of the classification heads, not the embedding (that is a masked mean)."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class JinaBertPreTrainedModel(PublishedCheckpointMixin, PreTrainedModel):
    """Weight initialisation, and loading of the published checkpoints (see `PublishedCheckpointMixin`)."""

    config_class = JinaBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    # The Trainer leaves the scaling of an accumulated loss to models that take **kwargs, unless they say they do not.
    accepts_loss_kwargs = False
    _no_split_modules = ["JinaBertEmbeddings", "JinaBertLayer"]  # noqa: RUF012 (transformers reads a list)
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": JinaBertLayer,
        "attentions": JinaBertSelfAttention,
    }

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, JinaBertLMPredictionHead):
            init.zeros_(module.bias)


class JinaBertModel(EncodeMixin, EncodeChunksMixin, JinaBertPreTrainedModel):
    """The encoder. `encode` embeds texts, `encode_chunks` the parts of texts; `forward` gives hidden states.

    Args:
        config: The model configuration.
        add_pooling_layer: Whether there is a pooler (tanh on the first token). Loading a checkpoint without one leaves
            it out, and `pooler_output` is None, rather than random.
    """

    def __init__(self, config: JinaBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.slopes = alibi_slopes(config.num_attention_heads)
        self.gradient_checkpointing = False
        self.embeddings = JinaBertEmbeddings(config)
        self.encoder = JinaBertEncoder(config)
        self.pooler = JinaBertPooler(config) if add_pooling_layer else None
        self.post_init()

    @classmethod
    def _has_pooler(cls, names: set[str]) -> bool:
        return any(name.endswith("pooler.dense.weight") for name in names)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    def _hidden_states(
        self,
        sequences: Sequences,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        output_attentions: bool = False,
    ) -> torch.Tensor:
        """Embeddings and encoder, in the shape that `sequences` has the layers see."""
        if not torch.compiler.is_compiling():
            warn_if_emulated(self.dtype, sequences.slopes.device)
        hidden_states = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        return self.encoder(hidden_states, sequences, output_attentions=output_attentions).last_hidden_state

    def _records_layers(self, kwargs: dict) -> bool:
        """Whether outputs of single layers are asked for: they have the shape of the batch, so it is not packed."""
        wanted = (kwargs.get(x, getattr(self.config, x, None)) for x in ("output_hidden_states", "output_attentions"))
        return any(x is not None and x is not False for x in wanted)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Hidden states of a padded batch.

        Args:
            input_ids: `(batch, length) int64` token ids; exactly one of this and `inputs_embeds`.
            attention_mask: `(batch, length)`, non-zero at valid tokens; None when all are. Any padding side.
            token_type_ids: `(batch, length) int64`; None is all zero.
            inputs_embeds: `(batch, length, hidden)` in place of the word embeddings.
            **kwargs: `output_hidden_states`, `output_attentions` (computed by the eager path), `return_dict`.

        Returns:
            `last_hidden_state` `(batch, length, hidden)`, zero at padding that was packed away, `pooler_output`
            `(batch, hidden)` or None, and on request `hidden_states` (layers + 1) and `attentions` (layers) of
            `(batch, heads, length, length)`.

        Raises:
            ValueError: Neither or both inputs; a mask that is not `(batch, length)`; position_ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if kwargs.get("position_ids") is not None:
            raise ValueError("JinaBERT has no position embeddings: ALiBi takes distances from the token order.")
        given: torch.Tensor = input_ids if input_ids is not None else inputs_embeds  # type: ignore[assignment]
        batch, length = given.shape[:2]
        if attention_mask is not None and attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, expected {(batch, length)}."
            )
        sequences = Sequences.of_batch(
            self.slopes,
            attention_mask,
            batch,
            length,
            dtype=self.dtype,
            device=given.device,
            pack=not self._records_layers(kwargs),
            sparse=self.config.sparse_attention,
        )
        inputs = [sequences.pack(x) if x is not None else None for x in (input_ids, token_type_ids, inputs_embeds)]
        hidden_states = self._hidden_states(
            sequences, *inputs, output_attentions=bool(kwargs.get("output_attentions"))
        )
        hidden_states = sequences.unpack(hidden_states)
        pooled = self.pooler(hidden_states) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class JinaBertPredictionHeadTransform(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.act(self.dense(hidden_states)))


class JinaBertLMPredictionHead(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.transform = JinaBertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))


class JinaBertOnlyMLMHead(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.predictions = JinaBertLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)


class JinaBertForMaskedLM(JinaBertPreTrainedModel):
    """Masked language modelling; the decoder shares the word embeddings."""

    accepts_loss_kwargs = True
    _tied_weights_keys = {  # noqa: RUF012
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: JinaBertConfig):
        super().__init__(config)
        self.bert = JinaBertModel(config, add_pooling_layer=False)
        self.cls = JinaBertOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Token logits and, with labels, the mean cross entropy over them.

        Args:
            input_ids: As in `JinaBertModel.forward`, like the other inputs.
            attention_mask: See there.
            token_type_ids: See there.
            inputs_embeds: See there.
            labels: `(batch, length) int64`, -100 where nothing is to be predicted.
            num_items_in_batch: Labelled positions of the whole optimiser step, which the loss is divided by; None is
                those of this call. The Trainer passes it when it accumulates gradients.
            **kwargs: See there.

        Returns:
            `loss` (float32 scalar) and `logits` `(batch, length, vocab_size)`; with `config.sparse_prediction` and
            labels, `(labelled, vocab_size)` in row-major order of the labelled positions, and None in training mode:
            the loss is then computed a block of positions at a time, and no more logits than that exist.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        if labels is not None and self.config.sparse_prediction:
            labelled = labels != -100
            hidden_states, labels = hidden_states[labelled], labels[labelled]
            if self.training:
                return MaskedLMOutput(
                    loss=self._loss_without_logits(hidden_states, labels, num_items_in_batch),
                    hidden_states=outputs.hidden_states,
                    attentions=outputs.attentions,
                )
        logits = self.cls(hidden_states)
        loss: torch.Tensor | None = None
        if labels is not None:
            # Half precision is widened for the softmax; float32 and float64 stay as they are.
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = nn.functional.cross_entropy(
                scores.view(-1, self.config.vocab_size),
                labels.view(-1),
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss_without_logits(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Cross entropy of `(labelled, hidden)` states; logits and their gradient exist for `LOGITS_BLOCK` rows."""
        predictions = self.cls.predictions
        hidden_states = predictions.transform(hidden_states)
        count = max(len(labels), 1) if num_items_in_batch is None else num_items_in_batch
        if hasattr(nn, "LinearCrossEntropyOptions"):
            device = hidden_states.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
            half = dtype in (torch.bfloat16, torch.float16)
            losses = nn.functional.linear_cross_entropy(
                hidden_states.to(dtype),
                predictions.decoder.weight.to(dtype),
                labels,
                linear_bias=predictions.decoder.bias.to(dtype),
                # TRAP: a sum would come back in half precision, a loss of 10.3 as 10.25 or 10.31.
                reduction="none" if half else "sum",
                options=nn.LinearCrossEntropyOptions(
                    batch_chunk_size=LOGITS_BLOCK, acc_policy="balanced" if half else "auto"
                ),
            )
            return (losses.float().sum() if half else losses) / count

        def block(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = predictions.decoder(states)
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return nn.functional.cross_entropy(scores, targets, reduction="sum")

        blocks = zip(hidden_states.split(LOGITS_BLOCK), labels.split(LOGITS_BLOCK), strict=True)
        return sum(checkpoint(block, *pair, use_reentrant=False) for pair in blocks) / count


class JinaBertForSequenceClassification(JinaBertPreTrainedModel):
    """Classification or regression on the pooler: dropout -> classifier."""

    def __init__(self, config: JinaBertConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.bert = JinaBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits `(batch, num_labels)`.

        Args:
            input_ids: As in `JinaBertModel.forward`, like the other inputs.
            attention_mask: See there.
            token_type_ids: See there.
            inputs_embeds: See there.
            labels: `(batch,) int64` classes; `(batch,)` or `(batch, num_labels)` float for regression;
                `(batch, num_labels)` float for several labels. `config.problem_type` decides; unset, it is inferred.
            **kwargs: See there.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            if self.config.problem_type is None:
                self.config.problem_type = _infer_problem_type(self.num_labels, labels)
            if self.config.problem_type == "regression":
                loss = MSELoss()(logits.squeeze(), labels.squeeze())
            elif self.config.problem_type == "single_label_classification":
                loss = CrossEntropyLoss()(logits.view(-1, self.num_labels), labels.view(-1))
            else:
                loss = BCEWithLogitsLoss()(logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class JinaBertForTokenClassification(JinaBertPreTrainedModel):
    """A label for every token: dropout -> classifier on the hidden states."""

    def __init__(self, config: JinaBertConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.bert = JinaBertModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Logits `(batch, length, num_labels)`; labels are `(batch, length) int64`, -100 where ignored."""
        outputs = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = CrossEntropyLoss()(logits.view(-1, self.num_labels), labels.view(-1))
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class JinaBertForQuestionAnswering(JinaBertPreTrainedModel):
    """Extractive question answering: start and end logits of a span."""

    def __init__(self, config: JinaBertConfig):
        super().__init__(config)
        self.bert = JinaBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits `(batch, length)` each; positions are `(batch,) int64`, beyond the length ignored."""
        outputs = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            ignored = start_logits.shape[1]
            cross_entropy = CrossEntropyLoss(ignore_index=ignored)
            start, end = (x.view(-1).clamp(0, ignored) for x in (start_positions, end_positions))
            loss = (cross_entropy(start_logits, start) + cross_entropy(end_logits, end)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class JinaBertForMultipleChoice(JinaBertPreTrainedModel):
    """One of several continuations: a score for each from the pooler."""

    def __init__(self, config: JinaBertConfig):
        super().__init__(config)
        self.bert = JinaBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Logits `(batch, choices)` for inputs `(batch, choices, length)`; labels are `(batch,) int64`."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        choices = given.shape[1]
        flat = (x.flatten(0, 1) if x is not None else None for x in (input_ids, attention_mask, token_type_ids))
        inputs_embeds = inputs_embeds.flatten(0, 1) if inputs_embeds is not None else None
        outputs = self.bert(*flat, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, choices)
        loss = CrossEntropyLoss()(logits, labels) if labels is not None else None
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _classifier_dropout(config: JinaBertConfig) -> nn.Dropout:
    given = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if given is None else given)


def _infer_problem_type(
    num_labels: int, labels: torch.Tensor
) -> Literal["regression", "single_label_classification", "multi_label_classification"]:
    if num_labels == 1:
        return "regression"
    return "single_label_classification" if not labels.is_floating_point() else "multi_label_classification"


__all__ = [
    "JinaBertForMaskedLM",
    "JinaBertForMultipleChoice",
    "JinaBertForQuestionAnswering",
    "JinaBertForSequenceClassification",
    "JinaBertForTokenClassification",
    "JinaBertModel",
    "JinaBertPreTrainedModel",
]
