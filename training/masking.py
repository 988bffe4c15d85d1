"""Batches for stage I: padded, and masked by the rule of `modeling_jina_bert.masking`.

Law: the choice is a function of (seed, batch content, how often each text was seen before): it needs no state, so a
resumed run masks as the uninterrupted one, and a batch that comes again in a later epoch is masked differently.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from modeling_jina_bert.masking import WordPieces, mask_whole_words


@dataclass
class WholeWordMaskingCollator:
    """Pads sequences to the longest of the batch and masks whole words.

    Args:
        tokenizer: Of WordPiece or byte-level BPE, with [MASK].
        probability: Expected share of masked tokens.
        seed: Changes every choice.
    """

    tokenizer: PreTrainedTokenizerBase
    probability: float = 0.3
    seed: int = 42

    def __post_init__(self):
        self._pieces = WordPieces.of(self.tokenizer)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Pads and masks `input_ids` of the examples; `visit`, 0 if missing, counts how often each was seen before."""
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        padded = np.full((len(examples), int(lengths.max())), self.tokenizer.pad_token_id, dtype=np.int64)
        for row, example in zip(padded, examples, strict=True):
            row[: len(example["input_ids"])] = example["input_ids"]
        # TRAP: torch's CPU generator reads the low 32 bits of a seed only; all parts have to be in them.
        seed = zlib.crc32(padded.tobytes(), self.seed)
        visits = [example.get("visit", 0) for example in examples]
        if any(visits):
            seed = zlib.crc32(np.array(visits, dtype=np.int64).tobytes(), seed)
        generator = torch.Generator().manual_seed(seed)
        input_ids, labels = mask_whole_words(
            torch.from_numpy(padded), self._pieces, probability=self.probability, generator=generator
        )
        attention_mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
