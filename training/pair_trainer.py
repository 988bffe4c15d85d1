"""The trainer of stages II, III and distillation: sentence-transformers' own, on our batches, watched by the monitor.

Laws: every batch has rows of one source over all processes; the place of the data is saved with every checkpoint, and
a resumed run goes on from it bit for bit; a loss or gradient that is not finite stops the run before it is saved.
"""

import logging
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.utils.data import ConcatDataset, DataLoader
from transformers import TrainerState

from .heap import HeapTrimmer
from .monitor import Monitor
from .packing import Progress, Reader, Report, Tally, load_progress
from .pair_sampling import ProcessBatches, SourceBatches
from .recipe import ContrastiveRecipe, RecipeError, training_arguments

logger = logging.getLogger(__name__)


def pair_arguments(recipe: ContrastiveRecipe) -> SentenceTransformerTrainingArguments:
    """The Trainer's arguments, the fields that these stages decide among them.

    Raises:
        RecipeError: A field or value that cannot be trained with.
    """
    if recipe.training.get("save_total_limit") == 1:
        raise RecipeError("training.save_total_limit=1: a run that is killed while saving would leave nothing; use 2.")
    if recipe.training.get("eval_strategy", "no") != "no" and not any(s.heldout_share for s in recipe.sources):
        raise RecipeError("training.eval_strategy: nothing is held out; give a source a heldout_share.")
    decided = {
        "batch_sampler": "no_duplicates",  # ours, of that kind: pair_sampling.py
        "multi_dataset_batch_sampler": "proportional",
        "prompts": None,  # the paper's models have none
        "ignore_data_skip": True,  # the place of the data comes from the checkpoint
        "logging_nan_inf_filter": False,  # it hides what the monitor looks for, and synchronises at every batch
        "ddp_find_unused_parameters": False,  # what takes no part in the embedding is frozen
    }
    arguments = training_arguments(SentenceTransformerTrainingArguments, recipe, **decided)
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"{arguments.n_gpu} GPUs in one process: start with accelerate launch --config_file "
            "training/accelerate/ddp.yaml -m training.pairs ..., or set CUDA_VISIBLE_DEVICES to one of them."
        )
    return arguments


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
    progress, total, place = Progress.after(0, reader), Tally(), None
    if checkpoint is not None:
        found = load_progress(Path(checkpoint), reader)
        if found is not None:
            progress, total = found
            place = progress.places[reader.rank]
        else:
            steps = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step
            logger.warning("%s does not say where its data were: its sources begin again", checkpoint)
            progress = Progress.after(steps * arguments.gradient_accumulation_steps, reader)
            place = {"batches": progress.batches[reader.rank], "cursors": {}}
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


class PairTrainer(SentenceTransformerTrainer):
    """SentenceTransformerTrainer that takes the batches of `SourceBatches` and tells a monitor what came of them.

    Args:
        batches: Of all processes.
        monitor: Told what is trained on.
        **kwargs: Of SentenceTransformerTrainer; `train_dataset` are the sources of `batches`, in the same order.

    Raises:
        RecipeError: FSDP or DeepSpeed: the cached loss runs the model several times a step, which they do not allow.
    """

    def __init__(self, *, batches: SourceBatches, monitor: Monitor, **kwargs: Any):
        super().__init__(**kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RecipeError("stages II and III train with DDP: launch with training/accelerate/ddp.yaml.")
        self.monitor, self._batches, self._taken = monitor, batches, batches.batches
        self.add_callback(monitor)
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

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(self._reported(epoch_iterator), num_batches, device)

    def _reported(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            self._taken += 1
            drawn, rank = self._sampler.taken(self._taken), self.monitor.reader.rank
            rows = {drawn.source: self.args.per_device_train_batch_size}
            self.monitor.add_report(Report(rank, self._taken, drawn.place, tally_of(batch), rows))
            yield batch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.monitor.add_loss(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any):
        norm = super()._get_grad_norm(*args, **kwargs)
        self.monitor.grad_norm = None if norm is None else float(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.monitor.throughput(self.args.device))
        elif "train_loss" in logs:  # the last entry of the training itself
            logs.update(self.monitor.summary(self.args.device))
        super().log(logs, start_time)
