"""Stages II and III: contrastive training on pairs, then on pairs with hard negatives (paper sections 5.1, 5.2).

Law: what is wrong with the recipe, its data or its model is said before the first step. The parts: `pair_sources.py`
reads, `pair_sampling.py` makes batches, `losses.py` compares, `pair_trainer.py` trains, `pair_evaluation.py` looks at
what is held out.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, set_seed

from modeling_jina_bert import JinaBertConfig, JinaBertModel

from .lora import add_lora, merge_lora
from .losses import build_loss
from .monitor import Monitor, trained_steps
from .packing import Reader
from .pair_evaluation import build_evaluator
from .pair_sources import load_sources, split_heldout
from .pair_trainer import PairTrainer, open_batches, pair_arguments
from .recipe import ContrastiveRecipe, RecipeError
from .run import RunRecorder, check_checkpoint, check_data, resume_checkpoint

logger = logging.getLogger(__name__)

Objective = Callable[
    [ContrastiveRecipe, SentenceTransformer, DatasetDict, SentenceTransformerTrainingArguments],
    tuple[DatasetDict, nn.Module],
]
"""Rows and loss of a stage, from its recipe, model, rows and arguments."""


def load_model(recipe: ContrastiveRecipe) -> SentenceTransformer:
    """Transformer, mean pooling and normalisation around the checkpoint the stage starts from, at `max_length`.

    A folder or repository of the official form (`jinaai/jina-embeddings-v2-small-en`) is written anew in our form,
    into `output_dir/base`, and loaded from there: checkpoints and adapters name it.

    Raises:
        RecipeError: There is no such checkpoint, or it is no JinaBERT; `max_length` leaves no room for a token.
    """
    if recipe.max_length < 3:
        raise RecipeError(f"max_length={recipe.max_length} leaves no room between [CLS] and [SEP].")
    try:
        config, _ = PreTrainedConfig.get_config_dict(recipe.model)
        folder = recipe.model
        if config.get("model_type") != JinaBertConfig.model_type:
            folder = str(_converted(recipe, config))
        transformer = Transformer(
            folder,
            max_seq_length=recipe.max_length,
            # TRAP: a folder that says float16 would be trained in float16.
            model_kwargs={
                "trust_remote_code": True,
                "dtype": torch.float32,
                "attn_implementation": recipe.attn_implementation,
            },
            config_kwargs={"trust_remote_code": True},
        )
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"model {recipe.model}: {error}") from error
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()])
    # A model built from modules would refuse to load its own checkpoints again.
    model.trust_remote_code = True
    if getattr(transformer.auto_model, "pooler", None) is not None:
        transformer.auto_model.pooler.requires_grad_(False)  # takes no part in the mean
    return model


def _converted(recipe: ContrastiveRecipe, config: dict[str, Any]) -> Path:
    """The folder of the same model in our form, written by the first process that sees it is not there."""
    if config.get("position_embedding_type") != "alibi":
        raise ValueError(f"a {config.get('model_type')} model, not a JinaBERT.")
    base, state = Path(recipe.output_dir) / "base", PartialState()
    with state.main_process_first():
        # A folder that is there may be another model's, of a run that stopped before its first checkpoint.
        if state.is_main_process or (state.is_local_main_process and not base.is_dir()):
            partial = base.with_name("base-partial")
            JinaBertModel.from_pretrained(recipe.model, dtype=torch.float32).save_pretrained(partial)
            AutoTokenizer.from_pretrained(recipe.model).save_pretrained(partial)
            shutil.rmtree(base, ignore_errors=True)
            partial.rename(base)
            logger.info("model %s is of the official form: written in ours to %s", recipe.model, base)
    state.wait_for_everyone()
    return base


def prepare_model(recipe: ContrastiveRecipe, arguments: SentenceTransformerTrainingArguments) -> SentenceTransformer:
    """The model to train, with adapters and activation checkpointing as the recipe says.

    Raises:
        RecipeError: See `load_model` and `add_lora`.
    """
    model = load_model(recipe)
    if recipe.lora is not None:
        add_lora(model, recipe.lora)
    if arguments.activation_checkpointing:
        # On the encoder itself: sentence-transformers 6.2 passes on only the name that transformers has deprecated.
        model[0].auto_model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=arguments.activation_checkpointing_kwargs
        )
        arguments.activation_checkpointing = False
    return model


def run_training(recipe: ContrastiveRecipe, trainer: PairTrainer, checkpoint: str | None) -> Path:
    """Trains, evaluates before and after where something is held out, and saves the final model.

    Returns:
        `output_dir/final`; `output_dir/heldout.json` has the metrics before and after.

    Raises:
        TrainingDiverged: See `Monitor`.
    """
    recorder = RunRecorder(recipe)
    trainer.add_callback(recorder)  # the last to write into checkpoints
    report = Path(recipe.output_dir) / "heldout.json"
    if trainer.evaluator is not None and checkpoint is None:
        _write_heldout(report, "before", trainer)
    trainer.train_recorded(recorder, checkpoint)
    if trainer.evaluator is not None:
        _write_heldout(report, "after", trainer)
    return save_final(recipe, trainer)


def _write_heldout(report: Path, moment: str, trainer: PairTrainer):
    step, history = trainer.state.global_step, trainer.state.log_history
    here = [entry for entry in history if entry["step"] == step and "eval_sequential_score" in entry]
    if trainer.args.load_best_model_at_end:
        here = []  # the model is no longer that of the last step
    metrics = here[-1] if here else trainer.evaluate()  # by all processes
    if trainer.is_world_process_zero():
        known = json.loads(report.read_text(encoding="utf-8")) if moment == "after" and report.is_file() else {}
        found = {name.removeprefix("eval_"): value for name, value in metrics.items() if "@" in name}
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({**known, moment: found}, indent=1), encoding="utf-8")


def whole_texts(model: SentenceTransformer):
    """Takes back the length that training cut texts at: the model reads what its configuration says."""
    model.max_seq_length = model[0].auto_model.config.model_max_length
    model.tokenizer.init_kwargs.pop("max_length", None)
    model.tokenizer.backend_tokenizer.no_truncation()  # of the last call
    model.tokenizer.backend_tokenizer.no_padding()


def save_final(recipe: ContrastiveRecipe, trainer: PairTrainer) -> Path:
    """Saves `final`, a plain model: adapters are saved by themselves in `adapter`, and merged."""
    output_dir = Path(recipe.output_dir)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        whole_texts(model)
        if recipe.lora is not None:
            model.save_pretrained(str(output_dir / "adapter"))
            merge_lora(model)
        model.save_pretrained(str(output_dir / "final"))
        add_sources(output_dir / "final" / "README.md", recipe)
    trainer.accelerator.wait_for_everyone()
    return output_dir / "final"


def add_sources(card: Path, recipe: ContrastiveRecipe):
    """Adds to the card that sentence-transformers wrote a table of what was trained on: kind, licence, origin."""
    rows = ["", "## Training sources", "", "| source | weight | kind | licence | origin |", "|---|---:|---|---|---|"]
    for source in recipe.sources:
        kind = source.kind.value.replace("_", " ") if source.kind else "not stated"
        rows.append(
            f"| {source.name} | {source.weight:g} | {kind} | {source.licence or 'not stated'} "
            f"| {source.url or source.hub or source.path} |"
        )
    card.write_text(card.read_text(encoding="utf-8").rstrip() + "\n" + "\n".join(rows) + "\n", encoding="utf-8")


def contrastive_loss(
    recipe: ContrastiveRecipe,
    model: SentenceTransformer,
    datasets: DatasetDict,
    arguments: SentenceTransformerTrainingArguments,
) -> tuple[DatasetDict, nn.Module]:
    """The loss of stages II and III, whose rows are what they are."""
    return datasets, build_loss(model, recipe, processes=arguments.world_size)


def train(
    recipe: ContrastiveRecipe,
    *,
    command: str | None = None,
    resume: bool | str | None = None,
    objective: Objective = contrastive_loss,
) -> Path:
    """Runs stage II (`num_negatives: 0`) or III, in every process of a distributed run alike.

    Args:
        recipe: What to train.
        command: Module that `accelerate launch` starts; None if it takes one process alone.
        resume: See `resume_checkpoint`.
        objective: Gives the rows to train on, with a column of labels if need be, and the loss.

    Returns:
        The folder of the final sentence-transformers model.

    Raises:
        RecipeError: Before the first step, for anything wrong with the recipe, its data or its model.
        TrainingDiverged: The loss or its gradient is not finite, or the loss rose by `max_loss_rise`.
    """
    checkpoint = resume_checkpoint(recipe.output_dir, resume)
    arguments = pair_arguments(recipe, command)
    set_seed(arguments.seed)
    model = prepare_model(recipe, arguments)
    check_pair_checkpoint(checkpoint, recipe, model)
    check_data(checkpoint, recipe)
    with arguments.main_process_first(desc="reading the sources"):
        rows, heldout = split_heldout(load_sources(recipe), recipe)
    evaluator = build_evaluator(recipe, heldout, rows, batch_size=arguments.per_device_eval_batch_size)
    datasets, loss = objective(recipe, model, rows, arguments)
    reader = Reader(arguments.process_index, arguments.world_size)
    batches, progress, total = open_batches(recipe, datasets, arguments, reader=reader, checkpoint=checkpoint)
    monitor = Monitor(model[0].auto_model.config, recipe=recipe, reader=reader, progress=progress, total=total)
    trainer = PairTrainer(
        batches=batches,
        trained_steps=trained_steps(checkpoint),
        monitor=monitor,
        model=model,
        args=arguments,
        train_dataset=datasets,
        loss=loss,
        evaluator=evaluator,
    )
    return run_training(recipe, trainer, checkpoint)


def check_pair_checkpoint(checkpoint: str | None, recipe: ContrastiveRecipe, model: SentenceTransformer):
    """Raises `RecipeError` if a checkpoint is of a model of another shape, or of adapters where there are none."""
    if checkpoint is None:
        return
    adapted = (Path(checkpoint) / "adapter_config.json").is_file()
    if adapted != (recipe.lora is not None):
        kinds = ("an adapter", "a whole model")
        raise RecipeError(f"{checkpoint} is a checkpoint of {kinds[not adapted]}, the recipe's of {kinds[adapted]}.")
    if not adapted:  # an adapter of another shape does not load
        check_checkpoint(checkpoint, model[0].auto_model.config)
