"""Masked language models that can be scored at any length: JinaBERT, and BERT with its positions extended.

Laws: every weight came from the checkpoint, the head included; nothing of (length x length) or (length x vocabulary)
exists. COST: logits of `LOGITS_BLOCK` positions and the hidden states of `TOKENS_PER_BATCH` tokens or one window at a
time; the attention of BERT takes time quadratic in the length.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, BertForMaskedLM, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_jina_bert import JinaBertForMaskedLM
from modeling_jina_bert.checkpoints import checkpoint_tensor_names, is_qk_post_norm
from modeling_jina_bert.masking import IGNORED

from .mlm_texts import MaskedText, Vocabulary, vocabulary_of, windows
from .sets import EvaluationError

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 8192
LOGITS_BLOCK = 512
PADDED_ENTRIES = 128
"""Vocabularies are padded up to a multiple of this at most; a larger gap is worth a warning."""

ALIBI, TABLE, INTERPOLATED, REPEATED = "alibi", "table", "interpolated", "repeated"
"""Where a model takes its positions from: distances; its table as it is; the table extended in one of two ways."""


@dataclass(frozen=True)
class Score:
    """Counts over the targets of one document; `loss` is the sum of the cross entropies, in nats."""

    targets: int
    correct: int
    loss: float


@dataclass(frozen=True)
class MaskedLM:
    """A model with its tokenizer.

    Attributes:
        name: In the results.
        source: Folder or Hub repository.
        model: In evaluation mode, float32.
        tokenizer: Of the model.
        vocabulary: Of the tokenizer.
    """

    name: str
    source: str
    model: JinaBertForMaskedLM | BertForMaskedLM
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary

    @property
    def position_table(self) -> torch.Tensor | None:
        """`(positions, hidden)`; None for a model without one."""
        embeddings = self.model.bert.embeddings
        return embeddings.position_embeddings.weight if isinstance(self.model, BertForMaskedLM) else None

    def positions_for(self, length: int) -> tuple[str, ...]:
        """The ways in which the model can be given texts of that length."""
        if self.position_table is None:
            return (ALIBI,)
        return (TABLE,) if length <= len(self.position_table) else (INTERPOLATED, REPEATED)


def extended_positions(table: torch.Tensor, length: int, *, positions: str) -> torch.Tensor:
    """A table of absolute positions for `length` tokens.

    Args:
        table: `(positions, hidden) float`, the learned one.
        length: Tokens.
        positions: "table", the learned positions as they are; "repeated", position p is p modulo their number;
            "interpolated", position p is p * (positions - 1) / (length - 1), between its two neighbours linearly, so
            that the ends stay the ends.

    Returns:
        `(length, hidden) float`.

    Example:
        >>> table = torch.tensor([[0.0], [10.0], [40.0]])
        >>> extended_positions(table, 5, positions="interpolated").flatten().tolist()
        [0.0, 5.0, 10.0, 25.0, 40.0]
        >>> extended_positions(table, 5, positions="repeated").flatten().tolist()
        [0.0, 10.0, 40.0, 0.0, 10.0]
    """
    if positions == TABLE and length <= len(table):
        return table[:length]
    if positions == REPEATED:
        return table[torch.arange(length, device=table.device) % len(table)]
    if positions == INTERPOLATED:
        rows = table.T.unsqueeze(0)  # (1, hidden, positions)
        return nn.functional.interpolate(rows, size=length, mode="linear", align_corners=True).squeeze(0).T
    raise ValueError(f"positions={positions!r} cannot give {length} tokens positions from a table of {len(table)}.")


def hidden_states(masked_lm: MaskedLM, input_ids: torch.Tensor, *, positions: str) -> torch.Tensor:
    """The last hidden states of windows without padding.

    Args:
        masked_lm: The model.
        input_ids: `(windows, length) int64`.
        positions: One of `masked_lm.positions_for(length)`.

    Returns:
        `(windows, length, hidden) float32`.
    """
    encoder, table = masked_lm.model.bert, masked_lm.position_table
    if table is None:
        return encoder(input_ids=input_ids).last_hidden_state
    length = input_ids.shape[1]
    inputs = {
        "input_ids": input_ids,
        # Given, because the model's own buffers of both end where its table ends.
        "position_ids": torch.arange(length, device=input_ids.device).unsqueeze(0),
        "token_type_ids": torch.zeros_like(input_ids),
    }
    weights = {"embeddings.position_embeddings.weight": extended_positions(table, length, positions=positions)}
    return torch.func.functional_call(encoder, weights, kwargs=inputs).last_hidden_state


def head_score(head: nn.Module, states: torch.Tensor, labels: torch.Tensor) -> tuple[int, float]:
    """Right predictions and summed cross entropy of `(targets, hidden)` states; logits exist a block at a time."""
    correct, loss = 0, 0.0
    for block, wanted in zip(states.split(LOGITS_BLOCK), labels.split(LOGITS_BLOCK), strict=True):
        logits = head(block).float()  # (block, vocabulary)
        correct += int((logits.argmax(dim=-1) == wanted).sum())
        loss += float(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return correct, loss


@torch.inference_mode()
def score_text(masked_lm: MaskedLM, text: MaskedText, *, length: int, positions: str) -> Score:
    """Predicts the targets of a text in windows of `length` tokens.

    Args:
        masked_lm: The model.
        text: At least `length - 2` tokens long.
        length: Tokens of a window, [CLS] and [SEP] included.
        positions: One of `masked_lm.positions_for(length)`.

    Raises:
        EvaluationError: The loss is not finite.
    """
    device = masked_lm.model.device
    size = max(1, TOKENS_PER_BATCH // length)
    targets, correct, loss = 0, 0, 0.0
    ids, labels = windows(text, length, masked_lm.vocabulary)
    for batch_ids, batch_labels in zip(ids.split(size), labels.split(size), strict=True):
        wanted = batch_labels != IGNORED
        if not wanted.any():
            continue
        states = hidden_states(masked_lm, batch_ids.to(device), positions=positions)[
            wanted.to(device)
        ]  # (targets, hidden)
        found = head_score(masked_lm.model.cls, states, batch_labels[wanted].to(device))
        targets, correct, loss = targets + int(wanted.sum()), correct + found[0], loss + found[1]
    if not math.isfinite(loss):
        raise EvaluationError(f"model {masked_lm.name}: the loss at {length} tokens is {loss} on {text.place}.")
    return Score(targets, correct, loss)


def load_masked_lm(name: str, source: str, *, device: str = "cpu") -> MaskedLM:
    """Loads a JinaBERT (of either published layout) or a BERT, with its head, in float32.

    JinaBERT is computed by this project's classes, which equal the remote code of its folders.

    Args:
        name: In the results.
        source: Folder or Hub repository of model and tokenizer.
        device: Of torch.

    Raises:
        EvaluationError: There is no such folder, it is of another kind, lacks weights, or its tokenizer does not fit.
    """
    folder = Path(source)
    if not folder.is_dir() and (folder.is_absolute() or (folder.parent.is_dir() and folder.parent != Path())):
        raise EvaluationError(f"model {source}: no such folder.")
    try:
        model_class = _class_of(source)
        options = {} if model_class is JinaBertForMaskedLM else {"attn_implementation": "sdpa"}
        model, info = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model.to(device)
    except EvaluationError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise EvaluationError(f"model {source}: cannot be loaded ({' '.join(str(error).split())}).") from error
    if info["missing_keys"]:
        raise EvaluationError(
            f"model {source}: no masked language model, it lacks {', '.join(sorted(info['missing_keys']))}."
        )
    vocabulary = vocabulary_of(tokenizer, source)
    _check_entries(source, len(vocabulary.pieces.special), model.config.vocab_size)
    return MaskedLM(name, source, model.eval(), tokenizer, vocabulary)


def _class_of(source: str) -> type[JinaBertForMaskedLM] | type[BertForMaskedLM]:
    """By the names of the tensors: the published JinaBERT repositories call themselves "bert" as well."""
    names = checkpoint_tensor_names(source)
    if names is None:
        where = "in the folder" if Path(source).is_dir() else "as a folder, in the cache or on the Hub"
        raise EvaluationError(f"model {source}: no weights (.safetensors or .bin) found {where}.")
    config, _ = PreTrainedConfig.get_config_dict(source)
    if config.get("model_type") == "bert" and any(name.endswith("position_embeddings.weight") for name in names):
        return BertForMaskedLM
    try:
        is_qk_post_norm(names)
    except ValueError:
        raise EvaluationError(
            f"model {source}: model_type {config.get('model_type')!r} with these tensors is neither a JinaBERT nor a "
            "BERT with absolute positions."
        ) from None
    return JinaBertForMaskedLM


def _check_entries(source: str, entries: int, model_entries: int):
    if entries > model_entries:
        raise EvaluationError(f"model {source}: its tokenizer has {entries} entries, the model {model_entries}.")
    if model_entries - entries >= PADDED_ENTRIES:
        logger.warning(
            "%s: its tokenizer has %d entries, the model %d: is it the one it was trained with?",
            source, entries, model_entries,
        )  # fmt: skip
