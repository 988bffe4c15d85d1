"""The head of masked language modelling, and its loss without all the logits.

Law: of the `(labelled, vocabulary)` logits, and of their gradient, never more than `LOGITS_BLOCK` rows exist in
training: 62 MB in float32 at 30,528 entries, whatever the batch.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from .configuration_jina_bert import JinaBertConfig

LOGITS_BLOCK = 512
"""Labelled positions whose logits exist at a time in the training loss."""


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

    def summed_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy, `LOGITS_BLOCK` rows of logits and of their gradient at a time.

        Under autocast and in half precision the products are in half precision, the losses are added in float32.

        Args:
            hidden_states: `(labelled, hidden)`.
            labels: `(labelled,) int64`.

        Returns:
            The sum over rows, a scalar; float32, or wider if the states are.
        """
        hidden_states = self.transform(hidden_states)
        if not hasattr(nn, "LinearCrossEntropyOptions"):  # torch before 2.13
            blocks = zip(hidden_states.split(LOGITS_BLOCK), labels.split(LOGITS_BLOCK), strict=True)
            return sum(checkpoint(self._block_loss, *block, use_reentrant=False) for block in blocks)
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        losses = nn.functional.linear_cross_entropy(
            hidden_states.to(dtype),
            self.decoder.weight.to(dtype),
            labels,
            linear_bias=self.decoder.bias.to(dtype),
            # TRAP: a sum would come back in half precision, a loss of 10.3 as 10.25 or 10.31.
            reduction="none" if half else "sum",
            options=nn.LinearCrossEntropyOptions(
                batch_chunk_size=LOGITS_BLOCK, acc_policy="balanced" if half else "auto"
            ),
        )
        return losses.float().sum() if half else losses

    def _block_loss(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.decoder(states)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(scores, labels, reduction="sum")


class JinaBertOnlyMLMHead(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.predictions = JinaBertLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)
