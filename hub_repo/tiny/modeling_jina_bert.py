"""JinaBERT: BERT with symmetric ALiBi, gated MLPs and no position embeddings (arXiv 2310.19923, section 3).

Law: the outputs equal those of the official code for both published checkpoint layouts; parameter names are those of
the published files. No buffer exists at all, so nothing grows with `max_position_embeddings` and nothing is lost when
transformers builds the model on the meta device.
"""

import functools
import logging
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
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
from .attention import ATTENTION_FUNCTIONS
from .checkpoints import PublishedCheckpointMixin
from .chunking import EncodeChunksMixin
from .configuration_jina_bert import JinaBertConfig
from .encoding import EncodeMixin
from .layers import JinaBertEmbeddings, JinaBertEncoder, JinaBertLayer, JinaBertPooler, JinaBertSelfAttention
from .masked_lm_head import JinaBertLMPredictionHead, JinaBertOnlyMLMHead
from .onednn import multiplies, pack, unpack
from .packing import Sequences

logger = logging.getLogger(__name__)


@functools.cache
def warn_if_emulated(dtype: torch.dtype, device: torch.device):
    """Logs one warning if the CPU has no instructions for this half precision and emulates it, far slower."""
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not multiplies(dtype):
        logger.warning(
            "This CPU has no instructions for %s: float32 is many times faster. Load the model with "
            "dtype=torch.float32, or call model.float().",
            dtype,
        )


@functools.cache
def keep_freed_blocks():
    """Lets the C library keep the memory of one layer for the next instead of returning it and faulting it in again.

    glibc takes the size of the largest block that was freed, at most 32 MiB, as the one below which it keeps freed
    blocks, twice that in all (mallopt(3), "dynamic mmap threshold"). One block, never written to, is freed here.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


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

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Raises ValueError for what transformers takes and no layer of ours computes: other packages, hub kernels."""
        if attn_implementation is not None and attn_implementation not in ATTENTION_FUNCTIONS:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is none of {', '.join(ATTENTION_FUNCTIONS)}: other "
                "kernels do not know JinaBERT's ALiBi."
            )
        found = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        if found not in ATTENTION_FUNCTIONS:  # a kernel of the Hub in place of a package that is not installed
            raise ImportError(f"attn_implementation={attn_implementation!r}: the package flash-attn is not installed.")
        return found

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

    def pack_weights(self):
        """Makes inference on the CPU faster, of short texts most: one of a dozen tokens takes two thirds of the time.

        The weights of the layers are stored in the order that oneDNN reads them in, in place of their own: no memory
        is added, the numbers are the same, and the model is saved as before. Training, casting and moving it are
        errors until `unpack_weights`.

        Raises:
            RuntimeError: Where it does not pay (another device, a CPU without products of bfloat16, float32 on a CPU
                that is not AMD's), and for layers with adapters or hooks. The model is then as it was.
        """
        pack(self.encoder, gated=("gated_layers", "up_gated_layer"))

    def unpack_weights(self):
        """Takes `pack_weights` back."""
        unpack(self.encoder)

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
            warn_if_emulated(self._own_dtype, sequences.slopes.device)
            if sequences.slopes.device.type == "cpu":
                keep_freed_blocks()
        hidden_states = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        return self.encoder(hidden_states, sequences, output_attentions=output_attentions).last_hidden_state

    @property
    def _own_dtype(self) -> torch.dtype:
        """`self.dtype`, also in a replica of `nn.DataParallel`, which has tensors and no parameters."""
        return self.embeddings.LayerNorm.weight.dtype

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
            dtype=self._own_dtype,
            device=given.device,
            pack=not self._records_layers(kwargs),
            sparse=self.config.sparse_attention,
        )
        inputs = [sequences.pack(x) if x is not None else None for x in (input_ids, token_type_ids, inputs_embeds)]
        wanted = kwargs.get("output_attentions", getattr(self.config, "output_attentions", False))
        hidden_states = self._hidden_states(sequences, *inputs, output_attentions=bool(wanted))
        hidden_states = sequences.unpack(hidden_states)
        pooled = self.pooler(hidden_states) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


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
        outputs = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs, return_dict=True)
        hidden_states = outputs.last_hidden_state
        if labels is not None and self.config.sparse_prediction:
            labelled = labels != -100
            hidden_states, labels = hidden_states[labelled], labels[labelled]
            if self.training:
                count = max(len(labels), 1) if num_items_in_batch is None else num_items_in_batch
                return MaskedLMOutput(
                    loss=self.cls.predictions.summed_loss(hidden_states, labels) / count,
                    hidden_states=outputs.hidden_states,
                    attentions=outputs.attentions,
                )
        logits = self.cls(hidden_states)
        loss: torch.Tensor | None = None
        if labels is not None:
            # Half precision is widened for the softmax, where something is to be predicted.
            labelled = labels.view(-1) != -100
            scores = logits.view(-1, self.config.vocab_size)[labelled]
            loss = nn.functional.cross_entropy(
                scores.to(torch.promote_types(scores.dtype, torch.float32)),
                labels.view(-1)[labelled],
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


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
        outputs = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs, return_dict=True)
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
        outputs = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs, return_dict=True)
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
        outputs = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs, return_dict=True)
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
        outputs = self.bert(*flat, inputs_embeds, **kwargs, return_dict=True)
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
