"""The trainer of stages II, III and distillation: sentence-transformers' own, on our batches, watched by the monitor.

Laws: every batch has rows of one source over all processes; the place of the data is saved with every checkpoint, and
a resumed run goes on from it bit for bit; a loss or gradient that is not finite stops the run before it is saved.
"""

from itertools import accumulate
from typing import Any

import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.utils.data import ConcatDataset, DataLoader

from .heap import HeapTrimmer
from .monitor import MonitoredTrainer, monitored_arguments, resumed_progress
from .packing import Progress, Reader, Report, Tally
from .pair_sampling import ProcessBatches, SourceBatches
from .recipe import ContrastiveRecipe, RecipeError


def pair_arguments(recipe: ContrastiveRecipe, command: str | None) -> SentenceTransformerTrainingArguments:
    """The Trainer's arguments, the fields that these stages decide among them.

    Args:
        recipe: What to train.
        command: See `monitored_arguments`.

    Raises:
        RecipeError: A field or value that cannot be trained with.
    """
    evaluates = recipe.training.get("eval_strategy", "no") not in ("no", False)
    if evaluates and not any(source.heldout_share for source in recipe.sources):
        raise RecipeError("training.eval_strategy: nothing is held out; give a source a heldout_share.")
    decided = {
        "batch_sampler": "no_duplicates",  # ours, of that kind: pair_sampling.py
        "multi_dataset_batch_sampler": "proportional",
        "prompts": None,  # the paper's models have none
        "ddp_find_unused_parameters": False,  # what takes no part in the embedding is frozen
    }
    return monitored_arguments(SentenceTransformerTrainingArguments, recipe, command=command, **decided)


def open_batches(
    recipe: ContrastiveRecipe,
    datasets: DatasetDict,
    arguments: SentenceTransformerTrainingArguments,
    *,
    reader: Reader,
    checkpoint: str | None,
) -> tuple[SourceBatches, Progress, Tally]:
    """The batches from where a checkpoint left them, how far that is, and what this process has trained on before.

    Raises:
        RecipeError: A source that makes no batch; a checkpoint of another number of processes.
    """
    accumulated = arguments.gradient_accumulation_steps
    progress, total = resumed_progress(
        checkpoint, reader, accumulated=accumulated, otherwise="its sources begin again"
    )
    place = progress.places[reader.rank] or {"batches": progress.batches[reader.rank], "cursors": {}}
    batches = SourceBatches(
        datasets,
        {source.name: source.weight for source in recipe.sources},
        size=arguments.per_device_train_batch_size * reader.ranks,
        seed=arguments.seed,
        place=place,
    )
    return batches, progress, total


def tally_of(batch: dict[str, Any]) -> Tally:
    """What the texts of one process's batch hold; `tokens` counts real ones."""
    masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
    lengths = torch.cat([mask.sum(dim=1) for mask in masks])
    return Tally(
        sequences=len(lengths),
        tokens=int(lengths.sum()),
        positions=sum(mask.numel() for mask in masks),
        pairs=int((lengths**2).sum()),
    )


class PairTrainer(MonitoredTrainer, SentenceTransformerTrainer):
    """SentenceTransformerTrainer that takes the batches of `SourceBatches`.

    Args:
        batches: Of all processes.
        trained_steps: Optimiser steps of the checkpoint that `batches` go on from.
        **kwargs: Of MonitoredTrainer and SentenceTransformerTrainer; `train_dataset` are the sources of `batches`, in
            the same order.

    Raises:
        RecipeError: FSDP or DeepSpeed: the cached loss runs the model several times a step, which they do not allow.
    """

    def __init__(self, *, batches: SourceBatches, trained_steps: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RecipeError("stages II and III train with DDP: launch with training/accelerate/ddp.yaml.")
        self._batches, self._taken = batches, batches.batches
        self._trained = trained_steps
        self.add_callback(HeapTrimmer())

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate: each process takes its own rows of every batch. accelerate would deal whole
        # batches out, of different sources.
        steps, together = self.args.max_steps, self.args.gradient_accumulation_steps
        datasets = list(self.train_dataset.values())
        starts = [0, *accumulate(map(len, datasets))]
        self._sampler = ProcessBatches(
            self._batches,
            dict(zip(self.train_dataset, starts, strict=False)),
            reader=self.monitor.reader,
            per_epoch=max(1, self._batches.per_epoch // together) * together,
            total=steps * together if steps > 0 else None,
            counted=self._trained * together,
        )
        workers = self.args.dataloader_num_workers
        return DataLoader(
            ConcatDataset(datasets),
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=bool(workers) and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            # TRAP: without a generator the loader draws from torch's global one, and a resumed run's dropout differs.
            generator=torch.Generator(),
        )

    def report_of(self, batch: dict[str, Any]) -> Report:
        self._taken += 1
        drawn, rank = self._sampler.taken(self._taken), self.monitor.reader.rank
        rows = {drawn.source: self.args.per_device_train_batch_size}
        return Report(rank, self._taken, drawn.place, tally_of(batch), rows)
