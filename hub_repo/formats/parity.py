"""Whether another engine gives the vectors of the torch model: what is compared, how far it may be off, and a control.

Law: an engine passes on short, odd, long and padded input, and the same check fails for a model whose weights were
disturbed. A check that the control passes is an error of its own: it would have passed anything.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling_jina_bert import JinaBertModel, mean_pooling

LENGTHS = (7, 129, 2049)
"""Tokens of the single sequences that are compared: short, just above a power of two, and long."""
MIXED_LENGTHS = (129, 31, 7)
"""Tokens of the sequences of the padded batch."""
Batch = dict[str, np.ndarray]
Run = Callable[[Batch], np.ndarray]
"""`input_ids`, `attention_mask` and `token_type_ids`, each `(batch, length) int64` -> embeddings `(batch, hidden)`."""


@dataclass(frozen=True)
class Tolerance:
    """How far an engine may be off.

    Attributes:
        error: Largest difference of a component of the embeddings, which are scaled to length 1.
        cosine: Smallest cosine between an embedding and torch's.
    """

    error: float
    cosine: float


@dataclass(frozen=True)
class Agreement:
    """How far an engine is off; the fields of `Tolerance`, as measured."""

    error: float
    cosine: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether it is inside the tolerance; not a number is outside."""
        return self.error <= tolerance.error and self.cosine >= tolerance.cosine

    def __str__(self) -> str:
        return f"largest error {self.error:.1e}, cosine {self.cosine:.8f}"


def check_batches(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[Batch]:
    """Random token ids: the padded batch first, then a batch of one for each length.

    Args:
        vocab_size: Token ids are drawn from 1 ... `vocab_size` - 1.
        lengths: In tokens.
    """
    generator = np.random.default_rng(0)
    return [_batch(generator, vocab_size, x) for x in (MIXED_LENGTHS, *((length,) for length in lengths))]


def _batch(generator: np.random.Generator, vocab_size: int, lengths: Sequence[int]) -> Batch:
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = generator.integers(1, vocab_size, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}


@torch.inference_mode()
def torch_embeddings(model: JinaBertModel, batch: Batch) -> np.ndarray:
    """What torch computes: mean over the mask, scaled to length 1, `(batch, hidden) float32`."""
    inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
    states = model(**inputs).last_hidden_state
    return torch.nn.functional.normalize(mean_pooling(states, inputs["attention_mask"]), dim=1).numpy()


def pooled(hidden_states: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """The same from the hidden states that an engine returned, `(batch, length, hidden)` of any float dtype."""
    mean = mean_pooling(torch.from_numpy(np.array(hidden_states)), torch.from_numpy(attention_mask))
    return torch.nn.functional.normalize(mean, dim=1).numpy()


def disturbed(model: JinaBertModel) -> JinaBertModel:
    """A copy of the model with noise on all its matrices, half as large as their own spread: the control."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise * parameter.std() / 2)
    return twin


def agreement(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> Agreement:
    """Largest error and smallest cosine over batches of embeddings of length 1; not a number if one has."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(found, expected, strict=True)]
    errors = [np.abs(a - b).max() if a.shape == b.shape else np.nan for a, b in pairs]
    cosines = [(a * b).sum(axis=1).min() if a.shape == b.shape else np.nan for a, b in pairs]
    return Agreement(float(np.max(errors)), float(np.min(cosines)))


def check_engine(
    name: str, run: Run, model: JinaBertModel, tolerance: Tolerance, *, lengths: Sequence[int] = LENGTHS
) -> Agreement:
    """Compares an engine with the model, and with the control.

    Args:
        name: Of the engine and file, for the error.
        run: The engine.
        model: The float32 model that was exported.
        tolerance: Of this engine and precision.
        lengths: In tokens; the padded batch is always compared.

    Returns:
        How far the engine is off.

    Raises:
        RuntimeError: It is outside the tolerance, or the control is inside.
    """
    batches = check_batches(model.config.vocab_size, lengths)
    found = [run(batch) for batch in batches]
    result = agreement(found, [torch_embeddings(model, batch) for batch in batches])
    if not result.within(tolerance):
        raise RuntimeError(f"{name} does not reproduce the model: {result}; allowed are {tolerance}.")
    twin = disturbed(model)
    control = agreement(found[:1], [torch_embeddings(twin, batch) for batch in batches[:1]])
    if control.within(tolerance):
        raise RuntimeError(f"{name}: the check cannot tell the model from one with disturbed weights ({control}).")
    return result
