"""Losses of stages II and III: bidirectional InfoNCE on pairs, L_NCE+ with hard negatives (paper sections 5.1, 5.2).

Laws: the loss is sentence-transformers' MultipleNegativesRankingLoss with the partition of each direction kept apart;
mini-batches, the budget of tokens and the number of devices change neither its value nor its gradients.

NOTE: sentence-transformers averages the two directions, the paper adds them: our loss is exactly half the paper's.
AdamW is invariant to that factor; gradient clipping is not, so `max_grad_norm` acts as twice the value on the paper's
scale. With `bidirectional: false` it is the first direction alone, whole.
"""

from collections.abc import Iterable

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from .recipe import ContrastiveRecipe, RecipeError

_DIRECTIONS = ("query_to_doc", "doc_to_query")
_SCORE_ROWS = 64
"""Rows of the score matrix held at a time where mini-batches are counted in tokens."""


def build_loss(model: SentenceTransformer, recipe: ContrastiveRecipe, *, processes: int = 1) -> nn.Module:
    """Half of L_pairs, or of L_NCE+: anchors against positives and negatives, positives against anchors.

    Args:
        model: What is trained.
        recipe: Gives temperature, directions, mini-batches and Matryoshka dimensions.
        processes: With more than one, each compares its rows with those of all (`gather_across_devices`).

    Returns:
        The loss; with `matryoshka_dims` the sum of the losses of the embeddings cut at each of them.

    Raises:
        RecipeError: A temperature, budget or dimension that cannot be.
    """
    if recipe.temperature <= 0:
        raise RecipeError(f"temperature={recipe.temperature} is not above 0.")
    options = {
        "scale": 1 / recipe.temperature,
        "directions": _DIRECTIONS if recipe.bidirectional else _DIRECTIONS[:1],
        "partition_mode": "per_direction",
        "gather_across_devices": recipe.gather_across_devices and processes > 1,
    }
    sequences, tokens = recipe.mini_batch_size, recipe.mini_batch_tokens
    for name, value in (("mini_batch_size", sequences), ("mini_batch_tokens", tokens)):
        if value is not None and value < 1:
            raise RecipeError(f"{name}={value} is below 1.")
    if tokens is not None:
        rows = _SCORE_ROWS if sequences is None else sequences
        loss = TokenBudgetLoss(model, mini_batch_num_tokens=tokens, mini_batch_size=rows, **options)
    elif sequences is not None:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=sequences, **options)
    else:
        loss = MultipleNegativesRankingLoss(model, **options)
    if recipe.matryoshka_dims:
        _check_dimensions(recipe.matryoshka_dims, model.get_embedding_dimension())
        loss = MatryoshkaLoss(model, loss, recipe.matryoshka_dims)
    return loss


def _check_dimensions(dimensions: list[int], full: int):
    wrong = [dimension for dimension in dimensions if not 1 <= dimension <= full]
    if wrong or len(set(dimensions)) < len(dimensions):
        raise RecipeError(f"matryoshka_dims={dimensions}: give different dimensions from 1 to the model's {full}.")


class TokenBudgetLoss(CachedMultipleNegativesRankingLoss):
    """The cached loss, its mini-batches filled up to a number of real tokens with texts of like length.

    sentence-transformers fills mini-batches by tokens in the order of the rows. Here each column is embedded from its
    shortest to its longest text, so that a mini-batch has next to no padding in the attention of devices that compute
    it, and its number of texts times its longest, the bound of its memory, stays near the budget.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        columns = list(sentence_features)
        orders = [column["attention_mask"].sum(dim=1).argsort(stable=True) for column in columns]
        self._places = [order.argsort() for order in orders]
        return super().forward([_rows(column, order) for column, order in zip(columns, orders, strict=True)], labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        embeddings = [
            [torch.cat(column)[places].detach().requires_grad_(torch.is_grad_enabled())]
            for column, places in zip(reps, self._places, strict=True)
        ]
        loss = super().calculate_loss(embeddings, labels, with_backward=with_backward)
        if with_backward:
            # What the cache takes are the gradients of `reps`, in the order they were embedded in.
            for column, (rows,), places in zip(reps, embeddings, self._places, strict=True):
                gradients = rows.grad[places.argsort()].split([len(mini_batch) for mini_batch in column])
                for mini_batch, gradient in zip(column, gradients, strict=True):
                    mini_batch.grad = gradient
        return loss


def _rows(features: dict, order: Tensor) -> dict:
    """The features of texts in another order."""
    return {name: value[order] if _has_rows(value, len(order)) else value for name, value in features.items()}


def _has_rows(value: object, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
