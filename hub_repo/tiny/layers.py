"""The layers of JinaBERT: embeddings, attention and gated MLP in either published arrangement (paper section 3).

Law: parameter names are those of the published files, and there is no buffer. What the layers see is the packed batch
of `Sequences`: hidden states `(tokens, hidden)`, or `(batch, length, hidden)` where nothing is packed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .attention import ATTENTION_FUNCTIONS, eager_attention
from .configuration_jina_bert import JinaBertConfig
from .onednn import applies, gated, linear, linear_plus, on_grid
from .packing import Sequences

MLP_BLOCK_BYTES = 2**24
"""Bytes of the widest intermediate of an MLP held at a time in inference on the CPU: about a last-level cache."""


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
            # By the module, not its weight: where embeddings are offloaded, calling it brings them.
            token_types = self.token_type_embeddings(inputs_embeds.new_zeros(1, dtype=torch.int64))[0]
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
        query, key, value = (linear(layer, hidden_states) for layer in (self.query, self.key, self.value))
        if self.config.qk_post_norm:
            # Under autocast a LayerNorm on a GPU gives float32, beside which no kernel takes a narrower value.
            query, key = self.layer_norm_q(query).to(value.dtype), self.layer_norm_k(key).to(value.dtype)
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
        if applies(context, self.dense, dropout=self.dropout):
            return self.LayerNorm(linear_plus(self.dense, context, residual))
        return self.LayerNorm(self.dropout(self.dense(context)) + residual)


class JinaBertAttention(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.self = JinaBertSelfAttention(config)
        self.output = JinaBertSelfOutput(config)

    def forward(self, hidden_states: torch.Tensor, sequences: Sequences, output_attentions: bool) -> torch.Tensor:
        context, _ = self.self(hidden_states, sequences, output_attentions)
        return self.output(context, hidden_states)


_FUSED_ACTIVATIONS = {type(ACT2FN[name]): name for name in ("gelu", "relu")}
"""Class of the activation -> its name in oneDNN; of another one in its place the MLP is computed layer by layer."""


def _draws(dropout: nn.Module) -> bool:
    """Whether a dropout, or what stands in its place, draws numbers."""
    return dropout.training and bool(getattr(dropout, "p", 0))


def _by_blocks_of_tokens(
    function: Callable, hidden_states: torch.Tensor, width: int, dropout: nn.Module
) -> torch.Tensor:
    """Applies a token-wise function to blocks whose `(tokens, width)` intermediate has `MLP_BLOCK_BYTES`.

    In inference on the CPU only: the block stays in the cache between the passes over it, and the memory does not grow
    with the batch. Elsewhere kernels are launched once.

    TRAP: cached losses compute a batch without gradients, and again with them from the same random state: a dropout
    has to be drawn in one call of one shape both times, or the gradients are those of other masks.
    """
    if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(hidden_states)
    if _draws(dropout):
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
        return _by_blocks_of_tokens(self._forward, hidden_states, self.gated_layers.out_features, self.dropout)

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        activation = _FUSED_ACTIVATIONS.get(type(self.act))
        layers, between = (self.gated_layers, self.wo), {"dropout": self.dropout, "act": self.act}
        if activation is not None and applies(hidden_states, *layers, **between):
            product = gated(self.gated_layers, hidden_states, activation=activation, gate_first=True)
            return self.layernorm(linear_plus(self.wo, product, hidden_states))
        gate, factor = linear(self.gated_layers, hidden_states).chunk(2, dim=-1)
        return self.layernorm(linear(self.wo, self.dropout(self.act(gate) * factor)) + hidden_states)


class JinaBertPostNormMLP(nn.Module):
    """Gated linear unit of jina-bert-v2-qk-post-norm: ``down(first half * act(second half))``, no residual inside."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.up_gated_layer = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.down_layer = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _by_blocks_of_tokens(self._forward, hidden_states, self.up_gated_layer.out_features, self.dropout)

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        activation = _FUSED_ACTIVATIONS.get(type(self.act))
        layers, between = (self.up_gated_layer, self.down_layer), {"dropout": self.dropout, "act": self.act}
        if activation is not None and applies(hidden_states, *layers, **between):
            product = gated(self.up_gated_layer, hidden_states, activation=activation, gate_first=False)
            return linear(self.down_layer, product)
        factor, gate = linear(self.up_gated_layer, hidden_states).chunk(2, dim=-1)
        return linear(self.down_layer, self.dropout(factor * self.act(gate)))


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
        self.config = config
        self.layer = nn.ModuleList([JinaBertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self, hidden_states: torch.Tensor, sequences: Sequences, output_attentions: bool = False
    ) -> BaseModelOutput:
        sdpa = self.config._attn_implementation == "sdpa" and not output_attentions
        if sdpa and sequences.is_flat and applies(hidden_states) and not self._may_drop():
            # Rows behind the last sequence, which attention passes over: few numbers of rows, few shapes of products.
            rows = len(hidden_states)
            filled = nn.functional.pad(hidden_states, (0, 0, 0, on_grid(rows) - rows))
            hidden_states = self._layers(filled, sequences, output_attentions)[:rows]
        else:
            hidden_states = self._layers(hidden_states, sequences, output_attentions)
        return BaseModelOutput(last_hidden_state=hidden_states)

    def _may_drop(self) -> bool:
        """Whether a dropout may be drawn, whose numbers more rows would shift; see `_by_blocks_of_tokens`."""
        of_attention = bool(self.config.attention_probs_dropout_prob)
        layers: Any = self.layer
        return any(
            (of_attention and layer.attention.self.training)
            or _draws(layer.attention.output.dropout)
            or _draws(layer.mlp.dropout)
            for layer in layers
        )

    def _layers(self, hidden_states: torch.Tensor, sequences: Sequences, output_attentions: bool) -> torch.Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, sequences, output_attentions)
        return hidden_states


class JinaBertPooler(nn.Module):
    """tanh(dense(first token)): the input of the classification heads, not the embedding (that is a masked mean)."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))
