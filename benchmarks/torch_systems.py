"""The systems that run in torch: ours, a plain BERT, the dense transcription, and the ceiling of the matrix products.

Law: the same seed gives every system of ours, and the dense transcription, the same weights. A loaded system takes a
batch and computes it once to warm up (`prepare`, which returns what is to be reported about it), and then as often as
it is timed (`call`, which returns the hidden states, or None for the ceiling).
"""

from typing import Any

import torch
from transformers import BertConfig, BertModel

from modeling_jina_bert import JinaBertConfig, JinaBertModel, count_scores

from .ceiling import MatrixProducts
from .dense import DenseJinaBert
from .workloads import INITIALIZER_RANGE, SEED, VOCABULARY, Shape, make_batch, packed_batches, padded_batches

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def jina_bert(shape: Shape, *, attention: str = "sdpa", sparse: bool = True) -> JinaBertModel:
    """A JinaBERT without pooler, with random weights that depend on the shape alone, in float32 on the CPU.

    Args:
        shape: Layers, widths and heads.
        attention: Value of `attn_implementation`.
        sparse: Value of `sparse_attention`.
    """
    config = JinaBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        initializer_range=INITIALIZER_RANGE,
        sparse_attention=sparse,
    )
    torch.manual_seed(SEED)
    return JinaBertModel._from_config(config, attn_implementation=attention, add_pooling_layer=False).eval()


def plain_bert(shape: Shape) -> BertModel:
    """transformers' BERT of the same layers, widths and heads, with absolute positions up to 512 tokens."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        initializer_range=INITIALIZER_RANGE,
        max_position_embeddings=512,
    )
    torch.manual_seed(SEED)
    return BertModel._from_config(config, attn_implementation="sdpa", add_pooling_layer=False).eval()


class TorchModel:
    """A model on a device.

    Args:
        function: Takes `input_ids` and `attention_mask` by name; returns hidden states or an output that has them.
        device: "cpu" or "cuda".
        packs: Whether it computes no padding, and so takes any lengths in one batch.
    """

    def __init__(self, function: Any, *, device: str, packs: bool = False):
        self.function, self.device, self.packs = function, device, packs

    def prepare(self, lengths) -> dict[str, Any]:
        """Makes the batches and computes them; nothing is reported."""
        self.batches = []
        for batch in (packed_batches if self.packs else padded_batches)(lengths):
            input_ids, attention_mask = (torch.from_numpy(array).to(self.device) for array in make_batch(batch))
            self.batches.append({"input_ids": input_ids, "attention_mask": attention_mask})
        self.call()
        return {}

    def call(self) -> list[torch.Tensor]:
        """`(batch, length, hidden)` on the device, for each batch."""
        with torch.inference_mode():
            outputs = [self.function(**inputs) for inputs in self.batches]
        return [output if isinstance(output, torch.Tensor) else output.last_hidden_state for output in outputs]


class OurModel(TorchModel):
    """A JinaBERT; reports the share of the scores that it leaves out."""

    def prepare(self, lengths) -> dict[str, Any]:
        """Makes the batch, computes it and counts what is skipped; None where nothing counts it (CUDA, eager)."""
        with count_scores() as count:
            super().prepare(lengths)
        return {"skipped_share": count.skipped_share if count.total else None}


class Ceiling:
    """Matrix products alone; reports what those of attention would take."""

    def __init__(self, products: MatrixProducts):
        self.products = products

    def prepare(self, lengths) -> dict[str, Any]:
        """Makes inputs and outputs, computes, and measures attention's products."""
        self.products.prepare(sum(lengths))
        self.call()
        return {"attention_seconds": self.products.attention_seconds(lengths)}

    def call(self) -> None:
        """The products of the linear layers."""
        self.products()


def load(kind: str, shape: Shape, *, dtype: str, device: str, options: dict[str, Any]) -> TorchModel | Ceiling:
    """Loads a torch system.

    Args:
        kind: "ours", "bert", "dense" or "ceiling".
        shape: Layers, widths and heads.
        dtype: "fp32" or "bf16".
        device: "cpu" or "cuda".
        options: Of ours `attention`, `sparse`, `compiled` and `packed`; of dense `fused`.

    Raises:
        ValueError: Another kind.
    """
    options, torch_dtype = dict(options), DTYPES[dtype]
    if kind == "ceiling":
        return Ceiling(MatrixProducts(shape, dtype=torch_dtype, device=device))
    if kind == "bert":
        return TorchModel(plain_bert(shape).to(device, torch_dtype), device=device)
    if kind == "dense":
        model = jina_bert(shape).to(device)
        return TorchModel(DenseJinaBert(model, **options), device=device)
    if kind == "ours":
        compiled, packed = options.pop("compiled", False), options.pop("packed", False)
        model = jina_bert(shape, **options).to(device, torch_dtype)
        if compiled:
            model.encoder.compile(dynamic=True)
        if packed:
            model.pack_weights()
        return OurModel(model, device=device, packs=options.get("attention") != "eager")
    raise ValueError(f"unknown kind {kind!r}: ours, bert, dense or ceiling.")
