"""What the matrix products alone take: an upper bound on tokens per second for any implementation of these layers.

Law: the products of the linear layers are all computed, at the shapes of the model, into memory that exists already;
norms, activations, biases, residuals, embeddings and attention take nothing. What the two products of attention would
take is stated beside it, at the best rate measured on tiles of `TILE` queries x keys that stay in the cache, every
score counted: a bound for implementations that skip nothing.
"""

import time

import torch

from .workloads import Shape, attention_operations, linear_products

TILE = 512
_SCORES = {"cpu": 2**21, "cuda": 2**28}
"""Scores of all tiles together: a last-level cache holds those on a CPU, and those fill a GPU."""
_REPEATS = 10  # of the products of the tiles; the best counts, this is a bound


class MatrixProducts:
    """The products of one call.

    Args:
        shape: The model.
        dtype: Of weights and activations.
        device: "cpu" or "cuda".
    """

    def __init__(self, shape: Shape, *, dtype: torch.dtype, device: str):
        self.shape, self.options = shape, {"dtype": dtype, "device": device}
        # Weights of their own for every layer: those of one layer would stay in the cache.
        self.layers = [
            [torch.randn(outputs, inputs, **self.options) for inputs, outputs in linear_products(shape)]
            for _ in range(shape.layers)
        ]

    def prepare(self, tokens: int):
        """Makes the inputs and outputs of the products."""
        self.inputs = {width: torch.randn(tokens, width, **self.options) for width, _ in linear_products(self.shape)}
        self.outputs = {width: torch.empty(tokens, width, **self.options) for _, width in linear_products(self.shape)}

    def __call__(self):
        """All linear layers, once."""
        for layer in self.layers:
            for weight in layer:
                torch.mm(self.inputs[weight.shape[1]], weight.T, out=self.outputs[weight.shape[0]])

    def attention_seconds(self, lengths) -> float:
        """What both products of attention take for sequences of these lengths when every score is computed."""
        size, tile = self.shape.hidden // self.shape.heads, min(TILE, max(lengths))
        batch = max(1, _SCORES[self.options["device"]] // tile**2)
        query, key = (torch.randn(batch, tile, size, **self.options) for _ in range(2))
        scores, context = torch.empty(batch, tile, tile, **self.options), torch.empty_like(query)
        best = float("inf")
        for _ in range(_REPEATS):
            start = time.perf_counter()
            torch.bmm(query, key.mT, out=scores)
            torch.bmm(scores, key, out=context)
            if self.options["device"] == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        operations_a_second = 4 * batch * tile * tile * size / best
        return attention_operations(self.shape, lengths) / operations_a_second
