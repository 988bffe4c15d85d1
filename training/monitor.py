"""What a run says about itself: throughput and its share of the peak, data seen, and when it has to stop.

Throughput counts real tokens, never padding, over the time spent on training steps and waiting for data; evaluating
and saving are left out. MFU is the model's own FLOPs (no recomputation, every query-key pair counted even where sparse
attention leaves it out) over the peak of the devices.

COST: one number is reduced over the processes at every step, to see a loss that is not finite at once, and the weights
are looked through before every checkpoint: what is saved is finite.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .packing import Progress, Reader, Report, Tally, load_progress, save_progress
from .recipe import MLMRecipe, RecipeError, training_arguments
from .run import RunRecorder, TrainingDiverged

logger = logging.getLogger(__name__)

_HISTORY = 10  # steps shown when training stops
_WARM = 100  # steps before a rise of the loss is judged
_DECAY = 0.98  # of the running mean of the loss

PEAK_TFLOPS = {
    "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165,
}  # fmt: skip
"""Part of a GPU's name -> peak of its dense products in half precision, 1e12 operations a second (data sheets)."""


def training_flops(config: PreTrainedConfig, tally: Tally) -> float:
    """Floating point operations of the matrix products of forward and backward on some batches.

    With hidden width H, intermediate width I, L layers, V vocabulary entries, T tokens, P query-key pairs (the sum of
    the squared lengths) and M predicted tokens, a multiply-add being two operations:

        forward = L * (2 * T * (4 * H**2 + G * H * I) + 4 * H * P) + 2 * M * (H**2 + H * V)
        forward and backward = 3 * forward

    G is 3 for a gated MLP (JinaBERT: two matrices up, one down) and 2 for BERT's. The prediction head is computed at
    predicted positions alone. Embedding look-ups, norms, activations and the softmax are left out.

    Args:
        config: Of a JinaBERT or a BERT.
        tally: What the batches held.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = 2 if config.model_type == "bert" else 3
    layer = 2 * tally.tokens * (4 * hidden**2 + matrices * hidden * inner) + 4 * hidden * tally.pairs
    head = 2 * tally.masked * (hidden**2 + hidden * config.vocab_size)
    return 3 * (config.num_hidden_layers * layer + head)


def device_peak(arguments: TrainingArguments) -> float | None:
    """`PEAK_TFLOPS` of the GPU that trains in half precision; None for another device or precision."""
    if arguments.device.type != "cuda" or not (arguments.bf16 or arguments.fp16):
        return None
    name = torch.cuda.get_device_name(arguments.device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def summed(values: list[float], device: torch.device) -> list[float]:
    """Sums over the processes; every process has to call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def _not_finite(model: torch.nn.Module) -> int:
    """Parameters, or this process's shards of them, with a value that is not finite."""
    shards = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(not torch.isfinite(shard).all() for shard in shards)


class Monitor(TrainerCallback):
    """Counts what is trained on, measures throughput, stops a run that diverges, and keeps the data's position.

    Args:
        config: Of the model.
        recipe: Gives `peak_tflops` and `max_loss_rise`.
        reader: Which process this is.
        progress: How far the consumers of the data have come; brought up to date here.
        total: What this process has trained on before.

    Attributes:
        grad_norm: Of the last step, before clipping; None when it was not computed.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        recipe: MLMRecipe,
        reader: Reader,
        progress: Progress,
        total: Tally,
    ):
        self.config, self.recipe, self.reader, self.progress, self.total = config, recipe, reader, progress, total
        self.window = Tally()
        self.grad_norm: float | None = None
        self._loss: torch.Tensor | float = 0.0
        self._sources: Counter[str] = Counter()
        self._before: Counter[str] = Counter()  # those of the last step
        self._history: deque[str] = deque(maxlen=_HISTORY)
        self._learning_rate = math.nan
        self._steps, self._mean, self._lowest = 0, 0.0, math.inf
        self._seconds, self._mark = 0.0, time.monotonic()

    def add_report(self, report: Report):
        """Takes the report of a batch that the coming step trains on."""
        self.progress.batches[report.consumer] = report.batches
        self.progress.places[report.consumer] = report.place
        self.window += report.tally
        self.total += report.tally
        self._sources.update(report.sources)

    def add_loss(self, loss: torch.Tensor):
        """Takes this process's part of the loss of the running step; no synchronisation with the device."""
        self._loss = self._loss + loss.detach()

    def on_train_begin(self, args, state, control, **kwargs):
        # TRAP: a resumed state brings the logging_steps, eval_steps and save_steps of its checkpoint.
        state.compute_steps(args, state.max_steps)
        self._mark = time.monotonic()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self._learning_rate = optimizer.param_groups[0]["lr"]  # before the schedule moves on

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = time.monotonic()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        self._check(args, state)
        if control.should_save or control.should_training_stop:
            self.check_weights(args, state, model)
        self._loss, self._before, self._sources = 0.0, self._sources, Counter()
        # Steps are counted over the whole run, also when it resumes without reading its data again.
        state.epoch = state.global_step / state.max_steps

    def check_weights(self, args, state, model):
        """Stops what would be saved; the step itself can overflow, with a loss and a gradient that were finite."""
        if summed([_not_finite(model)], args.device)[0]:
            raise TrainingDiverged(self._message(state, "the weights are not finite"))

    def on_log(self, args, state, control, **kwargs):
        self._mark = time.monotonic()

    def on_evaluate(self, args, state, control, **kwargs):
        self._mark = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_progress(checkpoint, self.reader, self.progress, self.total)
        self._mark = time.monotonic()

    def throughput(self, arguments: TrainingArguments) -> dict[str, float]:
        """Log fields of the steps since the last call; every process has to call it."""
        *counts, tokens_seen, seconds = summed(
            [*asdict(self.window).values(), self.total.tokens, self._seconds], arguments.device
        )
        window, seconds = Tally(*map(int, counts)), seconds / self.reader.ranks
        fields = {
            "tokens": int(tokens_seen),
            "tokens_per_second": round(window.tokens / max(seconds, 1e-9), 1),
            "padding_share": round(window.padding_share, 4),
            "lost_share": round(window.lost_share, 4),
        }
        if (peak := self.recipe.peak_tflops or device_peak(arguments)) is not None:
            operations = peak * 1e12 * self.reader.ranks * max(seconds, 1e-9)
            fields["mfu"] = round(training_flops(self.config, window) / operations, 4)
        self.window, self._seconds = Tally(), 0.0
        return fields

    def summary(self, device: torch.device) -> dict[str, float]:
        """Log fields of the whole run; every process has to call it."""
        total = Tally(*map(int, summed([*asdict(self.total).values()], device)))
        kept = total.tokens - 2 * total.sequences
        return {
            "data_sequences": total.sequences,
            "data_tokens_read": kept + total.lost,
            "data_tokens_kept": kept,
            "data_tokens_lost": total.lost,
            "data_positions_padded": total.positions - total.tokens,
            "data_lost_share": round(total.lost_share, 4),
            "data_padding_share": round(total.padding_share, 4),
        }

    def _check(self, args, state):
        """Raises `TrainingDiverged` in all processes if the loss of this step or its gradient is not to be trusted."""
        own = float(self._loss) / self.reader.ranks
        loss = summed([own], args.device)[0]
        norm = "-" if self.grad_norm is None else f"{self.grad_norm:.4g}"
        self._history.append(
            f"step {state.global_step}: loss {loss:.4f}, gradient norm {norm}, learning rate {self._learning_rate:.4g}"
        )
        if not math.isfinite(loss):
            raise TrainingDiverged(self._message(state, f"the loss is {loss}", math.isfinite(own)))
        # Under fp16 an overflow of the gradients is how the loss scale is found: that step was skipped.
        if self.grad_norm is not None and not math.isfinite(self.grad_norm) and not args.fp16:
            raise TrainingDiverged(self._message(state, f"the gradient norm is {self.grad_norm}"))
        self._steps += 1
        self._mean = _DECAY * self._mean + (1 - _DECAY) * loss
        mean = self._mean / (1 - _DECAY**self._steps)
        rise = self.recipe.max_loss_rise
        if rise is not None and mean > self._lowest + rise:
            reason = f"the running mean of the loss rose from {self._lowest:.3f} to {mean:.3f}"
            raise TrainingDiverged(self._message(state, reason))
        if self._steps >= _WARM:
            self._lowest = min(self._lowest, mean)

    def _message(self, state, reason: str, own_is_finite: bool = True) -> str:
        sources = ", ".join(f"{name} ({rows} rows)" for name, rows in (self._sources or self._before).most_common())
        places = {consumer: self.progress.batches[consumer] for consumer in self.reader.own}
        culprit = "" if own_is_finite else " This process's own batches gave it."
        lines = [
            f"step {state.global_step}, process {self.reader.rank}: {reason}.{culprit} This step is not saved.",
            *self._history,
            f"rows of this step on this process: {sources}; batches read by each of its readers: {places}",
            "Look at the gradient norm (it rose for a while: a lower learning_rate or more warmup_steps; at once: the "
            "rows of that source), at the precision (bf16 in place of fp16), then go on with --resume.",
        ]
        return "\n  ".join(lines)


def monitored_arguments(
    cls: type[TrainingArguments], recipe: Any, *, command: str | None, **decided: Any
) -> TrainingArguments:
    """The arguments of a `MonitoredTrainer`, the fields that it decides among them.

    Args:
        cls: `TrainingArguments` or a subclass.
        recipe: Its `training` holds fields of `cls`.
        command: Module of the stage, for the message that says how to launch it; None takes one process alone.
        **decided: Fields that the stage decides besides.

    Raises:
        RecipeError: A field or value that cannot be trained with.
    """
    if recipe.training.get("save_total_limit") == 1:
        raise RecipeError("training.save_total_limit=1: a run that is killed while saving would leave nothing; use 2.")
    decided |= {
        "ignore_data_skip": True,  # the place of the data comes from the checkpoint
        "logging_nan_inf_filter": False,  # it hides what the monitor looks for, and synchronises at every batch
    }
    arguments = training_arguments(cls, recipe, **decided)
    if arguments.n_gpu > 1:
        launch = f"start with accelerate launch --config_file training/accelerate/ddp.yaml -m {command} ..., or "
        raise RecipeError(
            f"{arguments.n_gpu} GPUs in one process: {launch if command else ''}set CUDA_VISIBLE_DEVICES to one of "
            "them."
        )
    return arguments


def trained_steps(checkpoint: str | None) -> int:
    """Optimiser steps of a checkpoint; 0 for None."""
    if checkpoint is None:
        return 0
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step


def resumed_progress(
    checkpoint: str | None, reader: Reader, *, accumulated: int, otherwise: str
) -> tuple[Progress, Tally]:
    """How far the data were read, and what this process has trained on before.

    Args:
        checkpoint: To resume from; None begins.
        reader: Which process this is.
        accumulated: Batches of an optimiser step, by which those of a checkpoint are counted that does not say.
        otherwise: What becomes of the data of such a checkpoint, for the log; {steps} are its optimiser steps.

    Raises:
        RecipeError: A checkpoint of another number of readers.
    """
    if checkpoint is None:
        return Progress.after(0, reader), Tally()
    found = load_progress(Path(checkpoint), reader)
    if found is not None:
        return found
    steps = trained_steps(checkpoint)
    logger.warning("%s does not say where its data were: %s", checkpoint, otherwise.format(steps=steps))
    return Progress.after(steps * accumulated, reader), Tally()


class MonitoredTrainer(Trainer):
    """A Trainer that tells a monitor what it trains on and what comes of it, and logs what the monitor says.

    Before another Trainer among the bases of a class, it makes that one a monitored one.

    Args:
        monitor: Is told.
        **kwargs: Of the Trainer.
    """

    def __init__(self, *, monitor: Monitor, **kwargs: Any):
        super().__init__(**kwargs)
        self.monitor = monitor
        self.add_callback(monitor)

    def report_of(self, batch: dict[str, Any]) -> Report:
        """What a batch of this process holds; called once a batch, in their order, and before the model sees it.

        What is no input of the model is taken out of the batch here.
        """
        raise NotImplementedError

    def train_recorded(self, recorder: RunRecorder, checkpoint: str | None):
        """Trains; why a run that diverges has stopped is the last entry of its log.

        Args:
            recorder: Of the log.
            checkpoint: To resume from; None starts anew.

        Raises:
            TrainingDiverged: See `Monitor`.
        """
        if self.args.world_size > 1:
            torch.manual_seed(self.args.seed + self.args.process_index)  # dropout of its own in every process
        try:
            self.train(resume_from_checkpoint=checkpoint)
        except TrainingDiverged as error:
            if self.is_world_process_zero():
                recorder.write(self.args.output_dir, self.state.global_step, {"stopped": str(error)})
            raise

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(self._reported(epoch_iterator), num_batches, device)

    def _reported(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            self.monitor.add_report(self.report_of(batch))
            yield batch

    def _save_checkpoint(self, *args: Any, **kwargs: Any):
        if self.args.save_strategy != SaveStrategy.STEPS:  # the last step did not know that it would be saved
            self.monitor.check_weights(self.args, self.state, self.model)
        super()._save_checkpoint(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.monitor.add_loss(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any):
        norm = super()._get_grad_norm(*args, **kwargs)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.monitor.grad_norm = None if norm is None else float(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.monitor.throughput(self.args))
        elif "train_loss" in logs:  # the last entry of the training itself
            logs.update(self.monitor.summary(self.args.device))
        super().log(logs, start_time)
