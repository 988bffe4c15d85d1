"""The control of stage I: a BERT with learned absolute positions, trained on the same data in the same way.

It is transformers' BertForMaskedLM: its checkpoints load with AutoModelForMaskedLM everywhere. Only its training is
ours: logits exist at masked positions alone, as in JinaBertForMaskedLM with `sparse_prediction`.
"""

import torch
from torch import nn
from transformers import BertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from modeling_jina_bert.masking import IGNORED


class SparseBertForMaskedLM(BertForMaskedLM):
    """BertForMaskedLM whose logits are `(labelled, vocab_size)`, in row-major order of the labelled positions."""

    accepts_loss_kwargs = True

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> MaskedLMOutput:
        """Cross entropy over the labelled positions.

        Args:
            input_ids: `(batch, length) int64`, at most `max_position_embeddings` long.
            attention_mask: `(batch, length)`, 1 for text.
            labels: `(batch, length) int64`, -100 where nothing is to be predicted.
            num_items_in_batch: Labelled positions of the whole optimiser step; None is those of this call.
        """
        hidden_states = self.bert(input_ids, attention_mask).last_hidden_state
        labelled = labels != IGNORED
        logits = self.cls(hidden_states[labelled])
        loss = nn.functional.cross_entropy(logits.float(), labels[labelled], reduction="sum")
        count = labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return MaskedLMOutput(loss=loss / count, logits=logits)
