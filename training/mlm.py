"""Stage I: masked language modelling, from raw text to a backbone.

    python -m training.mlm --config training/recipes/tiny-mlm.yaml data_dir=DATA output_dir=RUN
    accelerate launch --config_file training/accelerate/ddp.yaml -m training.mlm --config RECIPE ...

COST: the logits exist at masked positions only (`sparse_prediction`), 30 % of (tokens x vocabulary).
"""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from modeling_jina_bert import JinaBertConfig, JinaBertForMaskedLM
from modeling_jina_bert.masking import IGNORED

from .bert_start import load_bert, start_from
from .control import SparseBertForMaskedLM
from .heap import HeapTrimmer
from .masking import WholeWordMaskingCollator
from .monitor import Monitor, MonitoredTrainer, monitored_arguments, resumed_progress, summed, trained_steps
from .packing import Reader, Report, Tally, TrainingBatches, data_loader
from .recipe import MLMRecipe, RecipeError, accumulation_steps, command_line, load_recipe
from .run import RunRecorder, check_checkpoint, check_data, exit_on_recipe_error, resume_checkpoint
from .sources import open_sources, open_tokenizer, sequences

_ARCHITECTURES: dict[str, tuple[type, type]] = {
    "jina_bert": (JinaBertConfig, JinaBertForMaskedLM),
    "bert": (BertConfig, SparseBertForMaskedLM),  # the control: learned absolute positions
}
_WITHOUT_EFFECT = ("data_seed", "dataloader_drop_last", "dataloader_persistent_workers", "auto_find_batch_size")
"""Fields of TrainingArguments about batches, which are not the Trainer's here."""
_FITTED_SEQUENCES = 64
"""Sequences that the gates are fitted to where a JinaBERT begins with a BERT."""


def build_model(recipe: MLMRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialised model of the recipe's architecture and shape.

    Raises:
        RecipeError: An unknown architecture or field, or a vocabulary smaller than the tokenizer's.
    """
    if recipe.architecture not in _ARCHITECTURES:
        raise RecipeError(f"architecture={recipe.architecture!r} is none of {', '.join(_ARCHITECTURES)}.")
    config_class, model_class = _ARCHITECTURES[recipe.architecture]
    fields = {name: value for name, value in recipe.model.items() if value is not None}
    unknown = sorted(set(fields) - set(config_class.__dataclass_fields__))
    if unknown:
        raise RecipeError(f"model.{unknown[0]} is not a field of {config_class.__name__}.")
    config = _of_recipe(config_class, **fields)
    if config_class is JinaBertConfig:
        config.sparse_prediction = True
    elif recipe.max_length > config.max_position_embeddings:
        raise RecipeError(
            f"max_length={recipe.max_length} is above model.max_position_embeddings={config.max_position_embeddings}."
        )
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(f"model.vocab_size={config.vocab_size} is below the tokenizer's {len(tokenizer)} entries.")
    model = _of_recipe(model_class, config)
    if recipe.attn_implementation is not None:
        try:
            model.set_attn_implementation(recipe.attn_implementation)
        except (ValueError, ImportError) as error:
            raise RecipeError(f"attn_implementation={recipe.attn_implementation!r}: {error}") from error
    return model


def _of_recipe(cls: type, *arguments: Any, **fields: Any) -> Any:
    """What a class makes of the fields `model` of a recipe; `RecipeError` for what it refuses."""
    try:
        return cls(*arguments, **fields)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        raise RecipeError(f"model: {' '.join(str(error).split())}") from error


class MLMTrainer(MonitoredTrainer):
    """Trainer that takes the batches of `TrainingBatches`, and whose evaluation reports masked accuracy.

    Args:
        finished: Whether a checkpoint to resume from has all of `max_steps`.
        **kwargs: Of MonitoredTrainer; `train_dataset` are `TrainingBatches`.
    """

    def __init__(self, *, finished: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self._finished = finished
        self._model_class = type(self.model)
        if self.is_fsdp_enabled:
            keep_float32(self.accelerator.state.fsdp_plugin)

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate: each process already reads a share of its own.
        # NOTE: resuming a finished run, the Trainer would take one step more.
        return DataLoader([]) if self._finished else data_loader(self.train_dataset, self.args)

    def report_of(self, batch: dict[str, Any]) -> Report:
        return batch.pop("report")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.is_fsdp_enabled and isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = float(num_items_in_batch)  # as a tensor it would be rounded like the activations
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None):
        if not self.is_fsdp_enabled:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_plain(self._model_class, self.model.config, state_dict, output_dir)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        labels = inputs["labels"]
        labels = labels[labels != IGNORED]
        self._correct += int((outputs.logits.argmax(dim=-1) == labels).sum())
        self._predicted += labels.numel()
        if labels.numel():
            self._loss += float(outputs.loss) * labels.numel()
        return outputs.loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Adds the accuracy; the loss is the mean over masked tokens, where the Trainer's is one of batches' means."""
        self._correct, self._predicted, self._loss = 0, 0, 0.0
        output = super().evaluation_loop(*args, **kwargs)
        correct, predicted, loss = summed([self._correct, self._predicted, self._loss], self.args.device)
        means = {"eval_loss": loss / max(predicted, 1), "eval_accuracy": correct / max(predicted, 1)}
        output.metrics.update(means, eval_masked_tokens=int(predicted))
        return output


def stage_arguments(recipe: MLMRecipe) -> TrainingArguments:
    """The Trainer's arguments, the fields that this stage decides among them.

    Raises:
        RecipeError: A field or value that cannot be trained with.
    """
    if recipe.training.get("torch_compile"):
        raise RecipeError("training.torch_compile recompiles for every length; set compile: true instead.")
    decided: dict[str, Any] = {"remove_unused_columns": False}
    if "ddp_find_unused_parameters" not in recipe.training:
        decided["ddp_find_unused_parameters"] = False  # every parameter takes part in every step
    if recipe.global_batch_size is not None and "gradient_accumulation_steps" not in recipe.training:
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch say it
        decided["gradient_accumulation_steps"] = accumulation_steps(recipe, processes)
    arguments = monitored_arguments(TrainingArguments, recipe, command="training.mlm", **decided)
    if not 0 < recipe.mlm_probability <= 1:
        raise RecipeError(f"mlm_probability={recipe.mlm_probability} is no share of tokens, above 0 and at most 1.")
    for field in _WITHOUT_EFFECT:
        if recipe.training.get(field):
            raise RecipeError(f"training.{field} has no effect in stage I, whose batches are made here: leave it out.")
    if arguments.max_steps <= 0:
        raise RecipeError("training.max_steps must be set: the corpus is a stream without a length.")
    return arguments


def heldout_sequences(
    recipe: MLMRecipe, tokenizer: PreTrainedTokenizerBase, arguments: TrainingArguments
) -> list[dict[str, Any]] | None:
    """The sequences to evaluate on, each once, of `heldout` and of the `heldout_share`s in turn; None without any.

    Raises:
        RecipeError: Too few of them for the processes.
    """
    shares = [source for source in recipe.sources if source.heldout_share > 0]
    parts = [sequences(recipe, recipe.heldout, tokenizer)] if recipe.heldout else []
    parts += [sequences(recipe, shares, tokenizer, heldout=True)] if shares else []
    if not parts:
        return None
    once = [(row for row in part if row["visit"] == 0) for part in parts]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*once))
    rows = itertools.islice((row for row in in_turn if row is not None), recipe.heldout_sequences)
    found = [{**row, "input_ids": np.array(row["input_ids"], dtype=np.int32)} for row in rows]
    if arguments.world_size > 1:
        # Equal batches on all processes: otherwise some sequences would be evaluated twice to fill the last ones up.
        together = arguments.world_size * arguments.eval_batch_size
        found = found[: len(found) // together * together]
    if not found:
        raise RecipeError(
            f"heldout: no sequences, or fewer than {arguments.world_size} x {arguments.eval_batch_size} "
            "(processes x training.per_device_eval_batch_size)."
        )
    return found


def training_batches(
    recipe: MLMRecipe, collator: WholeWordMaskingCollator, arguments: TrainingArguments, checkpoint: str | None
) -> tuple[TrainingBatches, Tally]:
    """The data of this process from where a checkpoint left them, and what was trained on before it."""
    reader = Reader(arguments.process_index, arguments.world_size, arguments.dataloader_num_workers)
    accumulated = arguments.gradient_accumulation_steps
    progress, total = resumed_progress(
        checkpoint, reader, accumulated=accumulated, otherwise="reading those of {steps} steps again"
    )
    opened = open_sources(recipe, recipe.sources, collator.tokenizer)
    size = arguments.per_device_train_batch_size
    return TrainingBatches(opened, recipe, collator, size, reader, progress), total


def build_trainer(recipe: MLMRecipe, arguments: TrainingArguments, checkpoint: str | None) -> MLMTrainer:
    """Model, data and monitor of a recipe, the data where the checkpoint to resume from left them.

    Raises:
        RecipeError: Anything wrong with the recipe, its data or the checkpoint.
    """
    set_seed(arguments.seed)
    tokenizer = open_tokenizer(recipe.tokenizer)
    tokenizer.model_max_length = max(tokenizer.model_max_length, 8192)  # of the saved tokenizer
    model = build_model(recipe, tokenizer)
    check_checkpoint(checkpoint, model.config)
    check_data(checkpoint, recipe)
    if recipe.initial_bert is not None and checkpoint is None:
        rows = itertools.islice(sequences(recipe, recipe.sources, tokenizer), _FITTED_SEQUENCES)
        start_from(model, load_bert(recipe.initial_bert), [list(row["input_ids"]) for row in rows])
    try:
        collator = WholeWordMaskingCollator(tokenizer, recipe.mlm_probability, arguments.seed)
    except ValueError as error:
        raise RecipeError(f"tokenizer={recipe.tokenizer}: {error}") from error
    batches, total = training_batches(recipe, collator, arguments, checkpoint)
    trainer = MLMTrainer(
        monitor=Monitor(model.config, recipe=recipe, reader=batches.reader, progress=batches.progress, total=total),
        finished=trained_steps(checkpoint) >= arguments.max_steps,
        model=model,
        args=arguments,
        train_dataset=batches,
        eval_dataset=heldout_sequences(recipe, tokenizer, arguments),
        data_collator=collator,
    )
    trainer.add_callback(HeapTrimmer())
    if trainer.is_fsdp_enabled:
        hold_parameters_once(model)
    if recipe.compile:
        model.base_model.encoder.compile(dynamic=True)
    return trainer


def train(recipe: MLMRecipe, *, resume: bool | str | None = None) -> Path:
    """Runs stage I, in every process of a distributed run alike.

    Args:
        recipe: What to train.
        resume: See `resume_checkpoint`.

    Returns:
        The folder of the final model: weights, code and tokenizer, loadable with trust_remote_code.

    Raises:
        RecipeError: Before the first step, for anything wrong with the recipe or its data.
        TrainingDiverged: The loss or its gradient is not finite, or the loss rose by `max_loss_rise`.
    """
    checkpoint = resume_checkpoint(recipe.output_dir, resume)
    arguments = stage_arguments(recipe)
    trainer = build_trainer(recipe, arguments, checkpoint)
    recorder = RunRecorder(recipe)
    trainer.add_callback(recorder)  # the last to write into checkpoints
    trainer.train_recorded(recorder, checkpoint)
    evaluated = {entry["step"] for entry in trainer.state.log_history if "eval_accuracy" in entry}
    if trainer.eval_dataset and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    return save_final(trainer, recipe)


def save_plain(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state_dict: dict[str, torch.Tensor], folder: str
):
    """Saves weights that were gathered from sharded parameters, as the model they belong to.

    TRAP: FSDP changes the class of the model it shards. Saved through that class, the code beside the weights would be
    torch's file, and the folder would not load.
    """
    with torch.device("meta"):
        model = model_class(config)
    for tied, owner in model_class._tied_weights_keys.items():
        state_dict.setdefault(owner, state_dict[tied])
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def keep_float32(plugin: FullyShardedDataParallelPlugin):
    """Has FSDP add up gradients in float32 and leave what the model returns as it is, whatever it computes in.

    TRAP: by itself accelerate takes the training's dtype for both, and the loss comes back as 10.31 or 10.25.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def hold_parameters_once(model: PreTrainedModel):
    """Takes the second name of the prediction bias away, before a model is sharded.

    TRAP: torch 2.13 refuses to shard a parameter that two groups of modules have, and accelerate puts the decoder,
    with its bias, and the head, which names the same bias, into two. `save_plain` gives the name back.
    """
    predictions = model.cls.predictions
    if predictions.bias is predictions.decoder.bias:
        del predictions.bias


def save_final(trainer: MLMTrainer, recipe: MLMRecipe) -> Path:
    """Saves the trained model, gathered from all processes, with its code and tokenizer."""
    final = Path(recipe.output_dir) / "final"
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    config = trainer.accelerator.unwrap_model(trainer.model).config
    if recipe.architecture == "jina_bert":
        config.sparse_prediction = False
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        if recipe.architecture == "bert":  # config.json names the class that saved it
            BertForMaskedLM.from_pretrained(final).save_pretrained(final)
        trainer.data_collator.tokenizer.save_pretrained(final)
    trainer.accelerator.wait_for_everyone()
    return final


def main():
    arguments = command_line("Stage I: masked language modelling.")
    recipe = load_recipe(MLMRecipe, arguments.config, arguments.overrides)
    final = train(recipe, resume=arguments.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"stage I finished: {final}")


if __name__ == "__main__":
    exit_on_recipe_error(main)
