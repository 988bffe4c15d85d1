"""Fine-tuning of a released model on pairs of your own, from a CSV file to a folder that can be published.

    python -m training.finetune --config training/recipes/finetune.yaml data=my.csv \
        model=jinaai/jina-embeddings-v2-small-en output_dir=runs/mine

It is stage II, or with negatives stage III, with a share of the anchors held out and searched for before and after.
FINETUNE.md goes through it step by step.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from omegaconf import MISSING

from .contrastive import train
from .recipe import ContrastiveRecipe, command_line, load_recipe
from .run import exit_on_recipe_error

_SHOWN = ("ndcg@10", "mrr@10", "accuracy@1", "accuracy@10")


@dataclass
class FinetuneRecipe(ContrastiveRecipe):
    """A `ContrastiveRecipe` whose one source is named by fields of its own, for the command line.

    Attributes:
        data: File of the pairs (.csv, .tsv, .jsonl, .parquet).
        anchor: Its column with the query.
        positive: Its column with the matching text.
        negatives: Its column, or pattern of columns, with texts that do not match; read if `num_negatives` is not 0.
        heldout_share: Share of the anchors that is evaluated and not trained on; 0 evaluates nothing.
        language: Of the texts, ISO 639-1, for the card.
        license: Identifier of the Hub for the card, for example "apache-2.0"; None leaves it out, and nothing without
            one is published.
    """

    data: str = MISSING
    anchor: str = "query"
    positive: str = "positive"
    negatives: str = "negative*"
    heldout_share: float = 0.1
    language: str = "en"
    license: str | None = None


def complete_card(path: Path, recipe: FinetuneRecipe):
    """Adds to the card that sentence-transformers wrote what it cannot know: language, licence, base model."""
    card = ModelCard.load(path)
    card.data.language = recipe.language
    if recipe.license is not None:
        card.data.license = recipe.license
    if not Path(recipe.model).exists():  # a path means nothing to others
        card.data.base_model = recipe.model
    card.save(path)


def summary(metrics: dict[str, dict[str, float]]) -> str:
    """A table of the held-out metrics, a line for each and each source, with the moments as columns.

    >>> print(summary({"before": {"data_cosine_ndcg@10": 0.25}, "after": {"data_cosine_ndcg@10": 0.5}}))
    held out                before    after
    ndcg@10                 0.2500   0.5000
    """
    names = list(dict.fromkeys(name for found in metrics.values() for name in found))
    shown = [name for measure in _SHOWN for name in names if name.endswith(f"_{measure}")]
    several = len({name.rpartition("_")[0] for name in shown}) > 1
    labels = {name: name.replace("_cosine_", " ") if several else name.rpartition("_")[2] for name in shown}
    width = max(20, *map(len, labels.values())) + 1 if labels else 21
    lines = [f"{'held out':<{width}}" + "".join(f"{moment:>9}" for moment in metrics)]
    for name, label in labels.items():
        row = [f"{found[name]:>9.4f}" if name in found else f"{'-':>9}" for found in metrics.values()]
        lines.append(f"{label:<{width}}" + "".join(row))
    return "\n".join(lines)


def main():
    arguments = command_line("Fine-tunes a JinaBERT on pairs of your own.")
    recipe = load_recipe(FinetuneRecipe, arguments.config, arguments.overrides)
    if not any(source.heldout_share for source in recipe.sources):
        recipe.training["eval_strategy"] = "no"
    final = train(recipe, command="training.finetune", resume=arguments.resume)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    complete_card(final / "README.md", recipe)
    report = Path(recipe.output_dir) / "heldout.json"
    if report.is_file():
        print(summary(json.loads(report.read_text(encoding="utf-8"))))
    print(f"fine-tuning finished: {final}")


if __name__ == "__main__":
    exit_on_recipe_error(main)
