"""Stage I from a trained BERT with absolute positions: the same weights for a JinaBERT and for its control.

Everything of a BERT but its table of positions has a place in a JinaBERT, except the MLP without a gate. There
``act(W x + b)`` is ``act((W + b w^T) x) * (1 w^T) x`` for a `w` with ``w . x = 1``: no such `w` is exact for all
hidden states, but they have nearly constant directions, and the least-squares one over some text is off by 2 to 5 %
(standard deviation of ``w . x`` over all-MiniLM-L6-v2's layers, on text that it was not fitted to). Not in the paper.

Law: what has another shape or activation is refused, nothing is cut or tiled.
COST: one pass of the BERT over the text that `w` is fitted to.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from modeling_jina_bert import JinaBertForMaskedLM

from .control import SparseBertForMaskedLM
from .mining_recipe import model_path
from .recipe import RecipeError

_RIDGE = 0.01
"""Added to the second moments of the hidden states: keeps `w` short where they have no constant direction."""


def load_bert(name: str) -> BertModel:
    """A BERT by name.

    Args:
        name: A folder, a Hub name, or "all-MiniLM-L6-v2" from its PyPI package.

    Raises:
        RecipeError: It cannot be loaded, or is no BERT.
    """
    path = model_path(name)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a sentence embedder has no head, and may have no pooler
    try:
        kind = BertConfig.get_config_dict(path)[0].get("model_type")
        bert = BertModel.from_pretrained(path, add_pooling_layer=False) if kind == "bert" else None
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"initial_bert={name}: cannot be loaded ({' '.join(str(error).split())}).") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if bert is None:
        raise RecipeError(f"initial_bert={name} is not a BERT: its model_type is {kind!r}.")
    return bert.eval()


@torch.no_grad()
def start_from(model: PreTrainedModel, bert: BertModel, texts: Iterable[list[int]]):
    """Gives a fresh model the weights of a BERT; its head, and tokens that the BERT has not, keep their own.

    Args:
        model: JinaBertForMaskedLM of the first layout, or the control.
        bert: With as many layers and heads, as wide, and with as wide an MLP.
        texts: Token ids, [CLS] and [SEP] included, that the gates of a JinaBERT are fitted to; at least one.

    Raises:
        RecipeError: Another shape or activation.
    """
    mine, theirs = model.config, bert.config
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"):
        if getattr(mine, field) != getattr(theirs, field):
            raise RecipeError(
                f"initial_bert: {field} is {getattr(theirs, field)!r} there and {getattr(mine, field)!r} in the model."
            )
    if theirs.vocab_size > mine.vocab_size:
        raise RecipeError(f"initial_bert: {theirs.vocab_size} tokens there, the model has {mine.vocab_size}.")
    if isinstance(model, SparseBertForMaskedLM):
        _copy(model.bert, bert.state_dict())
    elif isinstance(model, JinaBertForMaskedLM) and not mine.qk_post_norm:
        _copy(model.bert, _as_jina_bert(bert, list(texts)))
    else:
        raise RecipeError("initial_bert: of JinaBERT's layouts only that without qk_post_norm can begin with a BERT.")


def _copy(model: nn.Module, weights: dict[str, torch.Tensor]):
    """Loads weights by their names in the model, which keeps its own rows for words that they have none for."""
    words, positions = (f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position"))
    own = model.state_dict()
    if positions in own and len(own[positions]) != len(weights[positions]):
        raise RecipeError(
            f"initial_bert: {len(weights[positions])} positions there, {len(own[positions])} in the model."
        )
    filled = torch.cat([weights[words], own[words][len(weights[words]) :]])
    model.load_state_dict({**weights, words: filled})


def _as_jina_bert(bert: BertModel, texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """The weights by the names of a JinaBertModel, without positions, its MLPs as gated ones."""
    ones = constant_directions(bert, texts)
    weights = {}
    for name, tensor in bert.state_dict().items():
        if name.startswith("embeddings.position"):
            continue
        if ".output.dense." in name and ".attention." not in name:
            name = name.replace(".output.dense.", ".mlp.wo.")
        elif ".output.LayerNorm." in name and ".attention." not in name:
            name = name.replace(".output.LayerNorm.", ".mlp.layernorm.")
        elif ".intermediate." in name:
            continue
        weights[name] = tensor
    for number, (layer, one) in enumerate(zip(bert.encoder.layer, ones, strict=True)):
        up = layer.intermediate.dense
        gate = up.weight + torch.outer(up.bias, one)
        weights[f"encoder.layer.{number}.mlp.gated_layers.weight"] = torch.cat([gate, one.expand_as(gate)])
    return weights


@torch.no_grad()
def constant_directions(bert: BertModel, texts: list[list[int]]) -> list[torch.Tensor]:
    """For each layer the `w` of `(hidden_size,) float32` that comes nearest to ``w . x = 1`` for the MLP's inputs `x`.

    Args:
        bert: In evaluation mode.
        texts: Token ids of at most as many tokens as the BERT has positions.
    """
    width = bert.config.hidden_size
    layers = bert.encoder.layer
    double = {"dtype": torch.float64}
    moments = [(torch.zeros(width, width, **double), torch.zeros(width, **double)) for _ in layers]

    def add(number: int, hidden_states: torch.Tensor):
        second, first = moments[number]
        rows = hidden_states.flatten(0, -2).double()
        second += rows.T @ rows
        first += rows.sum(dim=0)

    handles = [
        layer.intermediate.register_forward_pre_hook(lambda _, inputs, number=number: add(number, inputs[0]))
        for number, layer in enumerate(layers)
    ]
    try:
        for ids in texts:
            bert(torch.tensor([ids[: bert.config.max_position_embeddings]]))
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(min(len(ids), bert.config.max_position_embeddings) for ids in texts)
    ridge = _RIDGE * torch.eye(width, **double)
    return [torch.linalg.solve(second / tokens + ridge, first / tokens).float() for second, first in moments]
