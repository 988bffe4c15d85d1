"""Recipes: YAML files checked against dataclasses before anything is loaded.

Law: a recipe that starts is complete. An unknown key, a value of another type, a missing file is a `RecipeError` that
names it; what ran (defaults and overrides included) is written beside every checkpoint.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

R = TypeVar("R")


class RecipeError(ValueError):
    """A recipe or its data cannot be run; the message says which key or file, and what was expected."""


@dataclass
class Source:
    """One set of training data.

    Attributes:
        name: Name in logs and reports.
        path: File or glob (.jsonl, .jsonl.zst, .parquet, .txt), relative to `data_dir`; or None for a Hub data set.
        hub: Name of a Hub data set, for example "allenai/c4"; None for local files.
        hub_config: Configuration of the Hub data set, for example "en".
        split: Split of the data set.
        weight: Sampling weight; sources are drawn by size times weight (stages II and III) or by weight (stage I).
        text: Column with the text (stage I).
        anchor: Column with the query (stages II and III).
        positive: Column with the matching text (stages II and III).
        negatives: Column with a hard negative or a list of them, or a pattern of columns ("negative_*") (stage III).
        url: Public origin, for the model card.
    """

    name: str = MISSING
    path: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    split: str = "train"
    weight: float = 1.0
    text: str = "text"
    anchor: str = "query"
    positive: str = "positive"
    negatives: str = "negatives"
    url: str | None = None


@dataclass
class MLMRecipe:
    """Stage I: masked language modelling (paper section 4).

    Attributes:
        output_dir: Folder of the checkpoints, the log and the final model.
        tokenizer: Folder or Hub name of the tokenizer.
        model: Fields of `JinaBertConfig` (the architecture).
        data_dir: Root of the sources' paths.
        sources: What to train on, mixed by weight.
        heldout: Evaluated for loss and masked accuracy at the end and every `training.eval_steps`; may be empty.
        max_length: Tokens of a sequence, [CLS] and [SEP] included.
        long_documents: "cut" keeps the first `max_length` tokens of a document (the paper's reading of C4), "split"
            makes consecutive sequences of it and loses nothing (books).
        mlm_probability: Expected share of masked tokens; whole words.
        shuffle_buffer: Sequences held for shuffling the stream.
        heldout_sequences: Sequences of the held-out sources that are evaluated.
        training: Fields of `transformers.TrainingArguments`.
    """

    output_dir: str = MISSING
    tokenizer: str = MISSING
    model: dict[str, Any] = field(default_factory=dict)
    data_dir: str = "."
    sources: list[Source] = field(default_factory=list)
    heldout: list[Source] = field(default_factory=list)
    max_length: int = 512
    long_documents: str = "cut"
    mlm_probability: float = 0.3
    shuffle_buffer: int = 10_000
    heldout_sequences: int = 512
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class ContrastiveRecipe:
    """Stages II and III: text pairs, hard negatives (paper sections 5.1 and 5.2).

    Attributes:
        output_dir: Folder of the checkpoints, the log and the final sentence-transformers model.
        model: Folder or Hub name the stage starts from: a stage I or stage II output, or a released model.
        data_dir: Root of the sources' paths.
        sources: Pairs, or pairs with negatives; every batch comes from one source.
        max_length: Tokens a text is cut at.
        temperature: Of the InfoNCE loss; its inverse multiplies the cosine.
        num_negatives: Hard negatives a row; 0 is stage II.
        fill_negatives: What happens to rows with fewer: "random" draws texts of other rows of the source, "error"
            refuses.
        mini_batch_size: Sequences in memory at once through the cached loss (GradCache); None computes whole batches.
        max_rows: Rows read from each source; None reads all.
        training: Fields of `SentenceTransformerTrainingArguments`.
    """

    output_dir: str = MISSING
    model: str = MISSING
    data_dir: str = "."
    sources: list[Source] = field(default_factory=list)
    max_length: int = 512
    temperature: float = 0.05
    num_negatives: int = 0
    fill_negatives: str = "error"
    mini_batch_size: int | None = None
    max_rows: int | None = None
    training: dict[str, Any] = field(default_factory=dict)


def load_recipe(schema: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Reads a recipe.

    Args:
        schema: `MLMRecipe` or `ContrastiveRecipe`.
        path: YAML file; its `extends: OTHER.yaml` takes everything it does not say from the file beside it.
        overrides: "key=value" with dotted keys, for example "training.max_steps=100".

    Returns:
        An instance of `schema`.

    Raises:
        RecipeError: Unreadable file, unknown key, wrong type, or a required value without one.
    """
    try:
        layers = [*_layers(Path(path)), OmegaConf.from_dotlist(list(overrides))]
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *layers))
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe {error.filename}.") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"{path}: {reason} (key: {error.full_key or '?'}).") from error
    except (TypeError, YAMLError) as error:  # a list overridden by an index; a file that is no YAML
        raise RecipeError(f"{path}: {error}.") from error
    if not recipe.sources:
        raise RecipeError(f"{path}: sources is empty; name at least one source of training data.")
    return recipe


def _layers(path: Path) -> list:
    """The recipe and, before it, the one it `extends` (a file name beside it)."""
    layer = OmegaConf.load(path)
    extended = layer.pop("extends", None)
    return [*(_layers(path.parent / extended) if extended else []), layer]


def save_recipe(recipe: Any, folder: str | Path):
    """Writes the resolved recipe as `recipe.yaml` into a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(recipe), Path(folder) / "recipe.yaml")


def training_arguments(cls: type, recipe: Any, **fixed: Any) -> Any:
    """The transformers arguments of a recipe.

    Args:
        cls: `TrainingArguments` or a subclass.
        recipe: The recipe; its `training` holds fields of `cls`.
        **fixed: Fields that the stage decides.

    Raises:
        RecipeError: A field that `cls` does not have, or that the stage decides itself, or a value it refuses.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    for key in recipe.training:
        if key not in known:
            raise RecipeError(f"training.{key} is not a field of {cls.__name__}.")
        if key in fixed:
            raise RecipeError(f"training.{key} is decided by this stage ({fixed[key]!r}); remove it.")
    try:
        return cls(output_dir=recipe.output_dir, **recipe.training, **fixed)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training: {error}") from error


def command_line(description: str) -> argparse.Namespace:
    """Parses `--config RECIPE [--resume [CHECKPOINT]] [key=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="recipe, a YAML file; training/recipes holds ours")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        help="resume from the last checkpoint in output_dir, or from the one named here",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.max_steps=100")
    arguments = parser.parse_args()
    for override in arguments.overrides:
        if "=" not in override:
            parser.error(f"{override!r} is not of the form key=value")
    return arguments
