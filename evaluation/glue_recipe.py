"""The recipe of a GLUE evaluation: a YAML file checked against dataclasses before anything is loaded.

Law: an unknown task, an unknown key, a value of another type or out of range is an `EvaluationError` that names it.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from yaml import YAMLError

from .glue_tasks import TASKS
from .sets import EvaluationError

try:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ImportError as error:
    raise ImportError("evaluation.glue needs: pip install -e '.[evaluate]'") from error


@dataclass
class FineTuning:
    """How a task is fine-tuned: every learning rate with every batch size, with every seed.

    Attributes:
        learning_rates: Peak learning rates of the grid.
        batch_sizes: Batch sizes of the grid, in sequences or pairs.
        epochs: Passes over the train split.
        seeds: Seeds of the head, the order of the data and dropout.
        max_length: Tokens that a text or pair is cut at, [CLS] and [SEP] included.
        eval_batch_size: Sequences or pairs in a batch of a prediction.
        max_train_rows: Rows of the train split to train on, drawn at random; null takes all.
        best_epoch: Whether the epoch with the best score on the development set is taken instead of the last.
        hidden_dropout_prob: Dropout of encoder and head; null keeps that of the checkpoint.
        folder: Folder of the task, relative to `--data`; null is its name.
        label_names: What the integer labels of local files mean, by number; null is the Hub's order.
        training: Fields of `transformers.TrainingArguments`.
    """

    learning_rates: list[float] = field(default_factory=lambda: [1e-5, 2e-5, 3e-5])
    batch_sizes: list[int] = field(default_factory=lambda: [16, 32])
    epochs: float = 10
    seeds: list[int] = field(default_factory=lambda: [42])
    max_length: int = 512
    eval_batch_size: int = 64
    max_train_rows: int | None = None
    best_epoch: bool = False
    hidden_dropout_prob: float | None = None
    folder: str | None = None
    label_names: list[str] | None = None
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class GlueRecipe:
    """Which tasks, and how.

    Attributes:
        tasks: Their names at GLUE.
        hub: The Hub's data set, read without `--data`.
        fine_tuning: What holds for all tasks.
        per_task: Task -> fields of `FineTuning` that differ there.
    """

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    hub: str = "nyu-mll/glue"
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    per_task: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[GlueRecipe, dict[str, FineTuning]]:
    """Reads a recipe.

    Args:
        path: YAML file.
        overrides: "key=value" with dotted keys, for example "fine_tuning.epochs=3" or "tasks=[RTE,CoLA]".

    Returns:
        The recipe, and for each of its tasks (MNLI first, others start from it) the settings.

    Raises:
        EvaluationError: See the law above.
    """
    where = str(path)
    try:
        layers = [OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))]
        recipe = OmegaConf.merge(OmegaConf.structured(GlueRecipe), *layers)
        for name in (*recipe.tasks, *recipe.per_task):
            if name not in TASKS:
                raise EvaluationError(f"{path}: unknown task {name!r}; there are {', '.join(TASKS)}.")
        settings = {}
        for name in filter(recipe.tasks.__contains__, TASKS):
            where = f"{path}, {name}"
            differing = recipe.per_task.get(name, {})
            settings[name] = OmegaConf.to_object(OmegaConf.merge(recipe.fine_tuning, differing))
            _check(settings[name], where)
        resolved = OmegaConf.to_object(recipe)
    except FileNotFoundError as error:
        raise EvaluationError(f"There is no recipe {path}.") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise EvaluationError(f"{where}: {reason} (key: {error.full_key or '?'}).") from error
    except (OSError, TypeError, UnicodeDecodeError, YAMLError) as error:  # a folder; a file that is no YAML
        raise EvaluationError(f"{where}: {' '.join(str(error).split())}.") from error
    if not settings:
        raise EvaluationError(f"{path}: tasks is empty; there are {', '.join(TASKS)}.")
    return resolved, settings


def _check(settings: FineTuning, where: str):
    """Raises EvaluationError for a value out of its range or a wrong field of TrainingArguments."""
    for name in ("learning_rates", "batch_sizes", "seeds"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise EvaluationError(f"{where}: {name}={values} is empty or names a value twice.")
    positive = {name: getattr(settings, name) for name in ("epochs", "eval_batch_size", "max_train_rows")}
    positive |= {"learning_rates": min(settings.learning_rates), "batch_sizes": min(settings.batch_sizes)}
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise EvaluationError(f"{where}: {name} must be positive, not {value}.")
    if settings.max_length < 4:
        raise EvaluationError(f"{where}: max_length={settings.max_length} has no room for a pair of texts.")
    if settings.hidden_dropout_prob is not None and not 0 <= settings.hidden_dropout_prob < 1:
        raise EvaluationError(f"{where}: hidden_dropout_prob={settings.hidden_dropout_prob} is not in [0, 1).")
    point = {"learning_rate": settings.learning_rates[0], "batch_size": settings.batch_sizes[0], "seed": 0}
    training_arguments(settings, point, Path("unused"), where=where)


def training_arguments(
    settings: FineTuning, point: dict[str, Any], folder: Path, *, where: str = "recipe"
) -> TrainingArguments:
    """The transformers arguments of one run.

    Args:
        settings: Of the task.
        point: `learning_rate`, `batch_size` and `seed` of the run.
        folder: Where the Trainer writes its checkpoints, one an epoch.
        where: What an error is said to be in.

    Raises:
        EvaluationError: `settings.training` has a field that does not exist, that is decided here, or a value that is
            refused.
    """
    each_epoch = "epoch" if settings.best_epoch else "no"
    fixed = {
        "output_dir": str(folder),
        "per_device_train_batch_size": point["batch_size"],
        "per_device_eval_batch_size": settings.eval_batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": point["learning_rate"],
        "seed": point["seed"],
        "num_train_epochs": settings.epochs,
        "max_steps": -1,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "eval_strategy": each_epoch,
        "load_best_model_at_end": settings.best_epoch,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "logging_strategy": "epoch",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
    }
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key in settings.training:
        if key not in known:
            raise EvaluationError(f"{where}: training.{key} is not a field of TrainingArguments.")
        if key in fixed:
            raise EvaluationError(f"{where}: training.{key} is decided by the command or another key; remove it.")
    try:
        return TrainingArguments(**fixed, **settings.training)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{where}: training: {' '.join(str(error).split())}") from error
