"""Batches of stage I: sequences into tensors, in the data loader's workers, with a report of what is in them.

A row is a piece of one document, never of two: nothing attends across documents by construction. The model packs
right-padded rows one after the other and computes no padding (`modeling_jina_bert/packing.py`), so the sequences that
belong in one batch are those whose tokens fit into it: with `long_documents: pack` a batch is filled up to
`per_device_train_batch_size` times `max_length` real tokens, otherwise it has `per_device_train_batch_size` rows.

Laws: batches are a function of (seed, consumers), consumers being processes times workers: 8 processes with 2 workers
each train on the same global batches as 4 with 4, in twice the accumulation steps. Every process always has a next
batch, so all take the same number of steps. The position after a batch travels with it, from the worker that made it
to the checkpoint: what was prefetched and not trained on is not skipped.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec.asyn
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainingArguments

from modeling_jina_bert.masking import IGNORED

from .masking import WholeWordMaskingCollator
from .recipe import MLMRecipe, RecipeError
from .sources import OpenSource
from .stream import SequenceStream


@dataclass
class Tally:
    """What a number of batches held.

    Attributes:
        sequences: Rows.
        tokens: Real tokens, [CLS] and [SEP] included.
        positions: Rows times their batch's longest row: tokens and padding.
        pairs: Query-key pairs of attention, the sum of the squared lengths.
        masked: Tokens predicted.
        lost: Tokens of the rows' documents that were cut away.
    """

    sequences: int = 0
    tokens: int = 0
    positions: int = 0
    pairs: int = 0
    masked: int = 0
    lost: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @property
    def padding_share(self) -> float:
        """Share of the positions that is padding."""
        return 1 - self.tokens / max(self.positions, 1)

    @property
    def lost_share(self) -> float:
        """Share of the documents' tokens that was cut away; special tokens count on neither side."""
        kept = self.tokens - 2 * self.sequences
        return self.lost / max(self.lost + kept, 1)


@dataclass
class Report:
    """What travels with a batch.

    Attributes:
        consumer: Who made it.
        batches: Batches that this consumer has made, this one included.
        place: Where its stream is after it, JSON.
        tally: What is in it.
        sources: Rows of each source.
    """

    consumer: int
    batches: int
    place: dict[str, Any]
    tally: Tally
    sources: dict[str, int]


@dataclass
class Progress:
    """How far each consumer of the stream has come.

    Attributes:
        batches: Batches trained on, for each consumer.
        places: Where its stream goes on; None is the beginning, or, after some batches, unknown: they are read again.
    """

    batches: list[int]
    places: list[dict[str, Any] | None]

    @classmethod
    def after(cls, batches: int, reader: "Reader") -> "Progress":
        """After every process has taken that many batches, where the streams are not being known."""
        each = max(reader.workers, 1)
        counts = [_dealt(batches, index, each) for index in range(each)]
        return cls(counts * reader.ranks, [None] * reader.consumers)


def _dealt(batches: int, index: int, hands: int) -> int:
    """Batches of one of the hands that batches are dealt to in turn."""
    return (batches + hands - 1 - index) // hands


@dataclass
class Reader:
    """Which of the processes reads, and with how many workers.

    Attributes:
        rank: This process.
        ranks: Processes.
        workers: Data loader workers of each; 0 reads in the process itself.
    """

    rank: int = 0
    ranks: int = 1
    workers: int = 0

    @property
    def own(self) -> range:
        """Consumers of this process."""
        each = max(self.workers, 1)
        return range(self.rank * each, (self.rank + 1) * each)

    @property
    def consumers(self) -> int:
        """Consumers of all processes."""
        return self.ranks * max(self.workers, 1)

    def turn(self, progress: Progress) -> int:
        """The consumer, as an index into `own`, whose batch comes next.

        Raises:
            RecipeError: Batches were taken in another order than this process would take them.
        """
        counts = [progress.batches[consumer] for consumer in self.own]
        turn = sum(counts) % len(counts)
        if counts != [_dealt(sum(counts), index, len(counts)) for index in range(len(counts))]:
            raise RecipeError(
                f"the checkpoint's readers have given {counts} batches to process {self.rank}; resume with the "
                "processes and dataloader_num_workers that it was written with."
            )
        return turn


def fill(stream: SequenceStream, size: int, tokens: int | None) -> Iterator[tuple[list[dict[str, Any]], dict]]:
    """Sequences of one batch after the other, and where the stream is after each.

    Args:
        stream: Where they come from.
        size: Sequences of a batch; with `tokens` only the first guess.
        tokens: Real tokens that a batch is filled up to, whatever the number of its sequences; None counts sequences.
    """
    batch: list[dict[str, Any]] = []
    filled, place = 0, stream.position()
    for sequence in stream:
        filled += len(sequence["input_ids"])
        if tokens is not None and filled > tokens:
            yield batch, place
            batch, filled = [], len(sequence["input_ids"])
        batch.append(sequence)
        place = stream.position()
        if tokens is None and len(batch) == size:
            yield batch, place
            batch = []


@dataclass
class TrainingBatches(IterableDataset):
    """The batches of one process, ready for the model, without end; a `torch` data set of whole batches.

    Args:
        opened: The sources.
        recipe: Gives how sequences are made, shuffled and batched.
        collator: Makes tensors of sequences, and masks.
        size: Sequences of a batch (`per_device_train_batch_size`).
        reader: Which process this is.
        progress: How far the consumers have come.
    """

    opened: Sequence[OpenSource]
    recipe: MLMRecipe
    collator: WholeWordMaskingCollator
    size: int
    reader: Reader = field(default_factory=Reader)
    progress: Progress | None = None

    def __post_init__(self):
        self.progress = self.progress or Progress.after(0, self.reader)
        self.turn = self.reader.turn(self.progress)
        self.names = [opened.source.name for opened in self.opened]
        self._stream(self.reader.own[0], None)  # what is wrong with the recipe is found here, not in a worker

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None:
            # TRAP: connections of fsspec's event loop do not survive a fork: reading a Hub data set would hang.
            fsspec.asyn.reset_lock()
            # The workers are the parallelism; threads of the tokenizer would fight them for the cores.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        own = self.reader.own
        consumer = own[(self.turn + (worker.id if worker is not None else 0)) % len(own)]
        number, start = self.progress.batches[consumer], self.progress.places[consumer]
        budget = self.size * self.recipe.max_length if self.recipe.long_documents == "pack" else None
        batches = fill(self._stream(consumer, start), self.size, budget)
        if start is None:
            batches = itertools.islice(batches, number, None)  # trained on before a checkpoint that says no place
        for examples, place in batches:
            number += 1
            batch = self.collator(examples)
            tally = tally_of(examples, batch)
            sources = Counter(self.names[example["source"]] for example in examples)
            yield {**batch, "report": Report(consumer, number, place, tally, dict(sources))}

    def _stream(self, consumer: int, place: dict[str, Any] | None) -> SequenceStream:
        return SequenceStream(
            self.opened,
            self.recipe,
            self.collator.tokenizer,
            consumer=consumer,
            consumers=self.reader.consumers,
            position=place,
        )


def tally_of(examples: list[dict[str, Any]], batch: dict[str, torch.Tensor]) -> Tally:
    """What one batch holds."""
    lengths = [len(example["input_ids"]) for example in examples]
    return Tally(
        sequences=len(lengths),
        tokens=sum(lengths),
        positions=batch["input_ids"].numel(),
        pairs=sum(length**2 for length in lengths),
        masked=int((batch["labels"] != IGNORED).sum()),
        lost=sum(example["lost"] for example in examples),
    )


def data_loader(batches: TrainingBatches, arguments: TrainingArguments) -> DataLoader:
    """The data loader around whole batches; its workers are those that `batches.reader` counts on."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=batches.reader.workers,
        collate_fn=_unchanged,
        pin_memory=arguments.dataloader_pin_memory and torch.cuda.is_available(),
        prefetch_factor=arguments.dataloader_prefetch_factor if batches.reader.workers else None,
        multiprocessing_context=arguments.dataloader_multiprocessing_context if batches.reader.workers else None,
        # TRAP: without a generator the loader draws from torch's global one, and the dropout of a resumed run differs.
        generator=torch.Generator(),
    )


def _unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


_PROGRESS = "data-process{}.json"


def save_progress(checkpoint: Path, reader: Reader, progress: Progress, total: Tally):
    """Writes into a checkpoint how far this process's consumers have come, and what it has trained on."""
    own = {consumer: [progress.batches[consumer], progress.places[consumer]] for consumer in reader.own}
    content = {"consumers": reader.consumers, "processes": reader.ranks, "total": asdict(total), "own": own}
    (checkpoint / _PROGRESS.format(reader.rank)).write_text(json.dumps(content), encoding="utf-8")


def _written_together(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The progress of every process; files of more processes, of an earlier checkpoint of this step, are left out."""
    names = [_PROGRESS.format(0)]
    for name in names:
        try:
            content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            raise RecipeError(f"{checkpoint}: {name} is missing or damaged.") from error
        if len(names) == 1:
            found = len(list(checkpoint.glob(_PROGRESS.format("*"))))
            names += [_PROGRESS.format(rank) for rank in range(1, content.get("processes", found))]
        yield content


def load_progress(checkpoint: Path, reader: Reader) -> tuple[Progress, Tally] | None:
    """How far the data of a checkpoint were read.

    Args:
        checkpoint: Its folder.
        reader: Which process this is.

    Returns:
        The progress of the consumers, and what this process has to count as trained on before (the first process
        counts for all). None for a checkpoint that does not say.

    Raises:
        RecipeError: The checkpoint has another number of consumers, and so another order of the data; or it does not
            say the place of each of them.
    """
    if not list(checkpoint.glob(_PROGRESS.format("*"))):
        return None
    contents = list(_written_together(checkpoint))
    consumers = contents[0]["consumers"]
    if consumers != reader.consumers:
        raise RecipeError(
            f"{checkpoint}: its data were read by {consumers} readers (in stage I processes x dataloader_num_workers, "
            f"in stages II and III processes), this run has {reader.consumers}: the order would be another. Resume "
            "with as many."
        )
    if sorted(int(consumer) for content in contents for consumer in content["own"]) != list(range(consumers)):
        raise RecipeError(f"{checkpoint}: data-process*.json do not say where each of {consumers} readers was.")
    progress, total = Progress.after(0, reader), Tally()
    for content in contents:
        if reader.rank == 0:
            total += Tally(**content["total"])
        for consumer, (batches, place) in content["own"].items():
            progress.batches[int(consumer)], progress.places[int(consumer)] = batches, place
    return progress, total
