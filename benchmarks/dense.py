"""The quadratic computation of JinaBERT in plain PyTorch, as the official code does it, on the weights of ours.

Law: the outputs of `JinaBertModel` at every valid token. Padding is computed like a token, the bias is a dense
`(1, heads, length, length) float32` tensor made once for the longest input so far, and every score exists.
COST: memory grows with heads * length ** 2, times the batch for the scores.

The official code has two ways, and so has this file: plain (scores, softmax, product), and fused (torch's
scaled_dot_product_attention under a dense mask, where the configuration says `attn_implementation: torch`). Only the
layout of the English models is transcribed, not qk_post_norm.
"""

import torch
from torch.nn import functional as F

from modeling_jina_bert import JinaBertModel, alibi_slopes


class DenseJinaBert:
    """Forward pass of a JinaBERT with a quadratic bias.

    Args:
        model: The model whose weights are used, not copied.
        fused: Whether attention is torch's scaled_dot_product_attention.

    Raises:
        ValueError: The model has the qk_post_norm layout.
    """

    def __init__(self, model: JinaBertModel, *, fused: bool = False):
        if model.config.qk_post_norm:
            raise ValueError("qk_post_norm=True: only the layout of the English models is transcribed.")
        self.config, self.weights, self.fused = model.config, model.state_dict(), fused
        self.bias: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states `(batch, length, hidden) float32` of `(batch, length) int64` inputs."""
        bias = self._bias(input_ids.shape[1])
        padding = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        embedded = F.embedding(input_ids, self.weights["embeddings.word_embeddings.weight"])
        embedded = embedded + self.weights["embeddings.token_type_embeddings.weight"][0]
        hidden_states = self._norm("embeddings.LayerNorm", embedded)
        for layer in range(self.config.num_hidden_layers):
            hidden_states = self._layer(f"encoder.layer.{layer}.", hidden_states, bias, padding)
        return hidden_states

    def _bias(self, length: int) -> torch.Tensor:
        """`(1, heads, length, length) float32`, a slice of the largest one so far."""
        if self.bias is None or self.bias.shape[2] < length:
            device = self.weights["embeddings.word_embeddings.weight"].device
            self.bias = None  # frees the smaller one first
            positions = torch.arange(length, device=device, dtype=torch.float32)
            distance = (positions[:, None] - positions).abs()
            slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads), device=device)
            self.bias = (-slopes[:, None, None] * distance)[None]
        return self.bias[:, :, :length, :length]

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config.layer_norm_eps)

    def _layer(self, name: str, x: torch.Tensor, bias: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        heads = self.config.num_attention_heads
        query, key, value = (
            self._linear(f"{name}attention.self.{part}", x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        if self.fused:
            context = F.scaled_dot_product_attention(query, key, value, padding + bias)
        else:
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            context = (scores + padding + bias).softmax(dim=-1) @ value
        context = context.transpose(1, 2).flatten(2)
        x = self._norm(f"{name}attention.output.LayerNorm", self._linear(f"{name}attention.output.dense", context) + x)
        gate, linear = self._linear(f"{name}mlp.gated_layers", x).chunk(2, dim=-1)
        activation = {"gelu": F.gelu, "relu": F.relu}[self.config.hidden_act]
        return self._norm(f"{name}mlp.layernorm", self._linear(f"{name}mlp.wo", activation(gate) * linear) + x)
