"""Padded batch <-> packed tokens: the layers work on real tokens only.

Law: packing changes no number at a valid token. The tokens of a batch stand one after the other, sequence s being rows
[cu_seqlens[s], cu_seqlens[s + 1]), so the linear layers see no padding and attention runs inside each sequence.

Only right padding is packed (what tokenizers write). A batch with padding elsewhere, or with a sequence of nothing but
padding, stays padded: position 0, which the pooler reads, is a padding token there, and the official code gives it a
value of its own.
"""

import copy
import functools

import torch

from .alibi import alibi_bias


def is_traced() -> bool:
    """Whether a graph is being made that is to serve other values than those of the example."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


class Sequences:
    """Where the sequences of one forward pass are, and the ALiBi slopes; shared by all layers.

    Attributes:
        slopes: `(heads,) float32`, float64 for a float64 model.
        attention_mask: `(batch, length) bool`, or None when every position is a token.
        cu_seqlens: `(batch + 1,) int64` on the CPU, first packed row of each sequence; None when there is padding
            that is not packed away, and attention has to mask it.
        is_flat: Whether the layers see `(tokens, hidden)`; otherwise `(batch, length, hidden)`.
        batch: Sequences in the batch.
        length: Positions of the padded batch.
        sparse: Whether attention may leave out what is proven to be below rounding.

    Use `of_batch` or `of_lengths`.
    """

    def __init__(self, slopes: tuple[float, ...], *, dtype: torch.dtype, device: torch.device, sparse: bool):
        # NOTE: bfloat16 cannot even count to 512: the bias is computed in float32 under half precision and autocast,
        # and rounded, where it is at all, with the scores that it is added to.
        bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.slopes = torch.tensor(slopes, dtype=bias_dtype, device=device)
        self.sparse = sparse
        self.batch = self.length = 0
        self.is_flat = False
        self.attention_mask: torch.Tensor | None = None
        self.cu_seqlens: torch.Tensor | None = None
        self._indices: torch.Tensor | None = None  # of the tokens among the flattened positions

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Sequences":
        """These on another device, itself if they are there; accelerate asks every layer's inputs for it."""
        device = torch.device(device)
        if self.slopes.device == device:
            return self
        moved = copy.copy(self)
        moved.__dict__.pop("bias", None)
        for name in ("slopes", "attention_mask", "_indices"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device, non_blocking=non_blocking))
        return moved

    @functools.cached_property
    def bias(self) -> torch.Tensor:
        """The dense ALiBi bias `(heads, length, length)`, of the slopes' dtype; for a short sequence."""
        return alibi_bias(self.slopes, self.length)[0]

    @classmethod
    def of_batch(
        cls,
        slopes: tuple[float, ...],
        attention_mask: torch.Tensor | None,
        batch: int,
        length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        pack: bool = True,
        sparse: bool = True,
    ) -> "Sequences":
        """Sequences of a padded batch.

        Args:
            slopes: One Python float a head.
            attention_mask: `(batch, length)`, non-zero at valid tokens, or None.
            batch: Sequences in the batch.
            length: Positions of the padded batch.
            dtype: Dtype of the hidden states.
            device: Device of the hidden states.
            pack: False keeps the shape of the padded batch.
            sparse: See the attribute.
        """
        self = cls(slopes, dtype=dtype, device=device, sparse=sparse)
        self.batch, self.length = batch, length
        self.attention_mask = attention_mask.bool() if attention_mask is not None else None
        if is_traced():
            # What follows looks at the values of the mask; an exported graph serves every mask.
            return self
        if self.attention_mask is None or bool(self.attention_mask.all()):
            self.attention_mask = None
            self.cu_seqlens = torch.arange(batch + 1) * length
        elif pack:
            self._pack_right_padding(self.attention_mask)
        self.is_flat = self.cu_seqlens is not None and pack
        return self

    @classmethod
    def of_lengths(
        cls, slopes: tuple[float, ...], lengths: list[int], *, dtype: torch.dtype, device: torch.device, sparse: bool
    ) -> "Sequences":
        """Sequences whose tokens are packed already; `lengths` in tokens, each at least 1."""
        self = cls(slopes, dtype=dtype, device=device, sparse=sparse)
        self.batch, self.length, self.is_flat = len(lengths), max(lengths), True
        sizes = torch.tensor(lengths)
        self.cu_seqlens = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        if min(lengths) < self.length:
            self.attention_mask = (torch.arange(self.length) < sizes[:, None]).to(device)
            self._indices = self.attention_mask.flatten().nonzero().squeeze(1)
        return self

    def _pack_right_padding(self, attention_mask: torch.Tensor):
        lengths = attention_mask.sum(dim=1)
        positions = torch.arange(self.length, device=attention_mask.device)
        if (attention_mask == (positions < lengths[:, None])).all() and (lengths > 0).all():
            self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0).cpu(), (1, 0))
            self._indices = attention_mask.flatten().nonzero().squeeze(1)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`(batch, length, ...)` -> what the layers see: `(tokens, ...)` if `is_flat`, else unchanged."""
        return self.unpad(padded) if self.is_flat else padded

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The way back, `(batch, length, ...)`, zero at padding that was packed away."""
        return self.to(hidden_states.device).pad(hidden_states) if self.is_flat else hidden_states

    def pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(tokens, ...)` in packed order -> `(batch, length, ...)`, zero at padding."""
        if self._indices is not None:
            padded = tokens.new_zeros(self.batch * self.length, *tokens.shape[1:])
            tokens = padded.index_copy(0, self._indices, tokens)
        return tokens.unflatten(0, (self.batch, self.length))

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """`(batch, length, ...)` -> `(tokens, ...)` in packed order."""
        flat = padded.flatten(0, 1)
        return flat if self._indices is None else flat[self._indices]
