"""The head of masked language modelling, and its loss without all the logits.

Law: of the `(labelled, vocabulary)` logits, and of their gradient, never more than `LOGITS_BLOCK` rows exist in
training: 31 MB in float32 at 30,528 entries, whatever the batch.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from .configuration_jina_bert import JinaBertConfig

LOGITS_BLOCK = 256
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

        Under autocast and in half precision the products are in half precision; logarithms and sums are in float32.

        Args:
            hidden_states: `(labelled, hidden)`.
            labels: `(labelled,) int64`.

        Returns:
            The sum over rows, a scalar; float32, or wider if the states are.
        """
        hidden_states = self.transform(hidden_states)
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        with torch.autocast(device, enabled=False):
            return _SummedLoss.apply(hidden_states, self.decoder.weight, self.decoder.bias, labels, dtype)


class _SummedLoss(torch.autograd.Function):
    """Sum of the cross entropies of a linear layer's outputs; its gradients are computed with it, block by block.

    The gradient of a logit is its probability, less 1 at the label: one softmax gives the loss and the gradient. The
    gradients of weight and bias are added up in float32, or wider, over the blocks.

    Inputs: states `(rows, hidden)`, weight `(vocabulary, hidden)` and bias `(vocabulary,)` of any float dtype, labels
    `(rows,) int64` and the dtype of the products. Output: a float32 scalar, or wider.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, labels, dtype: torch.dtype):
        wide = torch.promote_types(dtype, torch.float32)
        least = 2.0**-17 if dtype == torch.float16 else torch.finfo(dtype).tiny  # of a probability with enough digits
        ctx.dtypes = [x.dtype for x in (states, weight, bias)]
        states, weight, bias = (x.to(dtype) for x in (states, weight, bias))
        loss = states.new_zeros((), dtype=wide)
        of_states = torch.empty_like(states)
        of_weight, of_bias = (torch.zeros_like(x, dtype=wide) for x in (weight, bias))
        for block, of_block, words in zip(*(x.split(LOGITS_BLOCK) for x in (states, of_states, labels)), strict=True):
            words = words[:, None]
            logits = nn.functional.linear(block, weight, bias)
            probabilities = logits.softmax(dim=1)
            of_words = probabilities.gather(1, words)
            logs = of_words.to(wide).log()
            if (small := (of_words < least)[:, 0]).any():
                logs[small] = logits[small].to(wide).log_softmax(dim=1).gather(1, words[small])
            loss -= logs.sum()
            if not any(ctx.needs_input_grad):
                continue
            probabilities.scatter_(1, words, of_words - 1)
            torch.mm(probabilities, weight, out=of_block)
            if dtype == wide:
                of_weight.addmm_(probabilities.T, block)
            else:
                of_weight += probabilities.T @ block
            of_bias += (probabilities.new_ones(1, len(block)) @ probabilities)[0]
        ctx.save_for_backward(of_states, of_weight, of_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        shares = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*((share.to(gradient.dtype) * gradient).to(dtype) for share, dtype in shares), None, None)


class JinaBertOnlyMLMHead(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.predictions = JinaBertLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)
