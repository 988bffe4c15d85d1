"""Stage I: masked language modelling, from raw text to a backbone.

    python -m training.mlm --config training/recipes/tiny-mlm.yaml data_dir=DATA output_dir=RUN

COST: the logits exist at masked positions only (`sparse_prediction`), 30 % of (tokens x vocabulary).
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from modeling_jina_bert import JinaBertConfig, JinaBertForMaskedLM

from .masking import IGNORED, WholeWordMaskingCollator
from .recipe import MLMRecipe, RecipeError, command_line, load_recipe, training_arguments
from .run import RunRecorder, check_checkpoint, exit_on_recipe_error, resume_checkpoint
from .sources import sequences

logger = logging.getLogger(__name__)


def build_model(recipe: MLMRecipe, tokenizer: PreTrainedTokenizerBase) -> JinaBertForMaskedLM:
    """A freshly initialised model of the recipe's shape.

    Raises:
        RecipeError: An unknown field, or a vocabulary smaller than the tokenizer's.
    """
    fields = set(JinaBertConfig.__dataclass_fields__)
    unknown = sorted(set(recipe.model) - fields)
    if unknown:
        raise RecipeError(f"model.{unknown[0]} is not a field of JinaBertConfig.")
    config = JinaBertConfig(**recipe.model, sparse_prediction=True)
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(f"model.vocab_size={config.vocab_size} is below the tokenizer's {len(tokenizer)} entries.")
    return JinaBertForMaskedLM(config)


class MLMTrainer(Trainer):
    """Trainer whose evaluation reports masked accuracy from sparse logits."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        labels = inputs["labels"]
        labels = labels[labels != IGNORED]
        self._correct += int((outputs.logits.argmax(dim=-1) == labels).sum())
        self._predicted += labels.numel()
        return outputs.loss.detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._correct = self._predicted = 0
        metrics = super().evaluate(*args, **kwargs)
        accuracy = {"eval_accuracy": self._correct / max(self._predicted, 1), "eval_masked_tokens": self._predicted}
        self.log(accuracy)
        return metrics | accuracy


def train(recipe: MLMRecipe, *, resume: bool | str | None = None) -> Path:
    """Runs stage I.

    Args:
        recipe: What to train.
        resume: See `resume_checkpoint`.

    Returns:
        The folder of the final model: weights, code and tokenizer, loadable with trust_remote_code.

    Raises:
        RecipeError: Before the first step, for anything wrong with the recipe or its data.
    """
    checkpoint = resume_checkpoint(recipe.output_dir, resume)
    arguments = training_arguments(TrainingArguments, recipe, remove_unused_columns=False)
    if arguments.max_steps <= 0:
        raise RecipeError("training.max_steps must be set: the corpus is a stream without a length.")
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer)
    # Length warnings of the tokenizer do not apply: documents are cut or split here.
    tokenizer.model_max_length = max(tokenizer.model_max_length, 8192)
    model = build_model(recipe, tokenizer)
    check_checkpoint(checkpoint, model.config)
    stream = sequences(recipe, recipe.sources, tokenizer)
    heldout = None
    if recipe.heldout:
        heldout = list(sequences(recipe, recipe.heldout, tokenizer).take(recipe.heldout_sequences))
    trainer = MLMTrainer(
        model=model,
        args=arguments,
        train_dataset=stream.shuffle(seed=arguments.seed, buffer_size=recipe.shuffle_buffer),
        eval_dataset=heldout,
        data_collator=WholeWordMaskingCollator(tokenizer, recipe.mlm_probability, arguments.seed),
        callbacks=[RunRecorder(recipe)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if heldout:
        trainer.evaluate()
    final = Path(recipe.output_dir) / "final"
    trainer.model.config.sparse_prediction = False
    trainer.save_model(str(final))
    tokenizer.save_pretrained(final)
    return final


def main():
    arguments = command_line("Stage I: masked language modelling.")
    recipe = load_recipe(MLMRecipe, arguments.config, arguments.overrides)
    print(f"stage I finished: {train(recipe, resume=arguments.resume)}")


if __name__ == "__main__":
    exit_on_recipe_error(main)
