"""How engines are measured: what is timed, in which order, and beside what.

Law: an engine of this process takes turns with torch; for one of another process torch is timed right after it. A
speed is read as the ratio to torch's, for the machine may do other things meanwhile.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeling_jina_bert import JinaBertModel

from ..formats.parity import Batch, Run, torch_embeddings
from .rows import Row, tokenized, word_text

TOKENS_PER_CALL = 4096
"""Tokens of the batch that is timed, at every length."""
NO_ENVIRONMENT = "--environments names no folder to install it into"
TORCH = "torch, float32"


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        lengths: In tokens, of the timed batches.
        rounds: Of each engine at each length.
        threads: Of each engine.
        environments: Folder in which other engines' packages are, or are installed; None runs none of them.
        node: Folder with `node_modules` to take instead of one of `environments`.
    """

    lengths: Sequence[int] = (128, 2048)
    rounds: int = 3
    threads: int = 1
    environments: Path | None = None
    node: Path | None = None


@dataclass(frozen=True)
class Subject:
    """The exported model and what its vectors are compared with.

    Attributes:
        folder: The export.
        model: Of the folder, float32.
        twin: The same with disturbed weights: the control.
        texts: Texts of `RUNGS` tokens.
        whole: Torch's embeddings of them, `(1, hidden)` each.
    """

    folder: Path
    model: JinaBertModel
    twin: JinaBertModel
    texts: list[str]
    whole: list[np.ndarray]

    @property
    def rungs(self) -> list[Batch]:
        """The token ids of the texts of `RUNGS` tokens."""
        return [tokenized(self.model, [text]) for text in self.texts]

    @property
    def special(self) -> tuple[int, int]:
        """The ids of [CLS] and [SEP]."""
        return self.model.tokenizer.cls_token_id, self.model.tokenizer.sep_token_id


def timed_batch(length: int, vocab_size: int) -> Batch:
    """`TOKENS_PER_CALL` tokens in sequences of one length, no padding.

    Args:
        length: In tokens.
        vocab_size: Token ids are drawn from 1 ... `vocab_size` - 1.
    """
    shape = (max(1, TOKENS_PER_CALL // length), length)
    ids = np.random.default_rng(1).integers(1, vocab_size, shape)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def timed_texts(length: int, words: Sequence[str]) -> list[str]:
    """The same as texts; `length` is at least 2."""
    generator = np.random.default_rng(1)
    return [word_text(words, length, generator) for _ in range(max(1, TOKENS_PER_CALL // length))]


def speeds(runs: dict[str, Callable[[Batch], np.ndarray]], batch: Batch, rounds: int) -> dict[str, float]:
    """Tokens per second of each engine: the median of `rounds`, the engines taking turns, after a call that warms up.

    Args:
        runs: Name -> engine.
        batch: What is computed.
        rounds: At least 1.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(batch)
            if round:
                seconds[name].append(time.perf_counter() - start)
    return {name: batch["input_ids"].size / statistics.median(found) for name, found in seconds.items()}


def torch_engine(subject: Subject) -> Run:
    """Torch itself."""
    return lambda batch: torch_embeddings(subject.model, batch)


def or_error(run: Run, batch: Batch) -> np.ndarray | str:
    """The embeddings, or in their place what the engine says instead."""
    try:
        return run(batch)
    except Exception as error:  # of any kind, for each engine has its own; it is written into the table
        return f"{type(error).__name__}: {error}"


def pace(row: Row, length: int, seconds: Sequence[float], tokens: int, subject: Subject, rounds: int):
    """Enters the speed of an engine that ran in its own process, and its ratio to torch's, measured now."""
    row.speed[length] = tokens / statistics.median(seconds)
    batch = timed_batch(length, subject.model.config.vocab_size)
    row.relative[length] = row.speed[length] / speeds({TORCH: torch_engine(subject)}, batch, rounds)[TORCH]
