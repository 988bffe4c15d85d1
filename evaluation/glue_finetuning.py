"""Fine-tuning on one task of GLUE: backbones, the runs of a grid, what is on disk of them.

Laws: the encoder starts from the checkpoint (or from the MNLI model), never from random weights, and the head from
random ones, never from a checkpoint; the folder of a run is named by everything that decides its outcome, so that a
finished run is found again and another one never taken for it; a run is finished once its result.json is there.
COST: the weights of the best run of every grid point until the task is finished, then of the selected one; while it
trains, a checkpoint with the optimiser (3 x the weights).
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    set_seed,
)

from modeling_jina_bert import JinaBertConfig, JinaBertForSequenceClassification

from .glue_data import Split, TaskData
from .glue_recipe import FineTuning, training_arguments
from .glue_tasks import Task, decode, measure, task_score
from .sets import EvaluationError

logger = logging.getLogger(__name__)

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)


@dataclass(frozen=True)
class Backbone:
    """A checkpoint that fine-tuning starts from.

    Attributes:
        name: Its name in the results.
        path: Folder or Hub repository.
        tokenizer: Its tokenizer.
        sha256: Of the tensors that come from the checkpoint.
        positions: Most tokens it can read; None is no limit.
    """

    name: str
    path: str
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    positions: int | None


def load_backbone(name: str, path: str) -> Backbone:
    """Checks that a checkpoint can be fine-tuned, and describes it.

    Args:
        name: Name in the results.
        path: Folder or Hub repository: a JinaBERT, published or of stage I to III, or a plain model of transformers.

    Raises:
        EvaluationError: There is none, it cannot be loaded, its encoder would be random in part, or it has a
            classification head already.
    """
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise EvaluationError(f"model {path}: no such folder.")
    try:
        model, missing = load_classifier(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except _LOADING_ERRORS as error:
        raise EvaluationError(f"model {path}: cannot be loaded ({' '.join(str(error).split())}).") from error
    prefix = f"{model.base_model_prefix}."
    random = sorted(key for key in missing if key.startswith(prefix) and not key.startswith(f"{prefix}pooler."))
    if random:
        raise EvaluationError(f"model {path}: {len(random)} tensors of the encoder are missing, {random[0]} first.")
    if not any(not key.startswith(prefix) for key in missing):
        raise EvaluationError(f"model {path}: has a classification head already; name the backbone it was made from.")
    if len(tokenizer) > model.config.vocab_size:
        raise EvaluationError(
            f"model {path}: its tokenizer has {len(tokenizer)} entries, its embedding {model.config.vocab_size}."
        )
    positions = None
    if not isinstance(model, JinaBertForSequenceClassification):
        positions = min(getattr(model.config, "max_position_embeddings", sys.maxsize), tokenizer.model_max_length)
    weights = {key: tensor for key, tensor in model.state_dict().items() if key not in missing}
    return Backbone(name, path, tokenizer, _digest(weights), positions)


def _digest(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(weights.items()):
        digest.update(key.encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_classifier(
    path: str, task: Task | None = None, *, hidden_dropout_prob: float | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """A backbone with a new head, in float32 whatever is stored, and the names of the tensors that are new.

    Args:
        path: Folder or Hub repository. A JinaBERT is loaded by `modeling_jina_bert` (published ones, too, whose own
            code is not run); anything else by its class in transformers.
        task: Whose head it gets; None is two labels.
        hidden_dropout_prob: Dropout of encoder and head; None keeps that of the checkpoint.
    """
    options: dict[str, Any] = {"num_labels": 2, "problem_type": "single_label_classification"}
    if task is not None and task.is_regression:
        options = {"num_labels": 1, "problem_type": "regression"}
    elif task is not None:
        options |= {"id2label": dict(enumerate(task.labels)), "num_labels": task.num_labels}
        options["label2id"] = {label: number for number, label in options["id2label"].items()}
    if hidden_dropout_prob is not None:
        options["hidden_dropout_prob"] = hidden_dropout_prob
    raw, _ = PreTrainedConfig.get_config_dict(path)
    config_class: Any = AutoConfig
    model_class: Any = AutoModelForSequenceClassification
    if raw.get("model_type") == JinaBertConfig.model_type or raw.get("position_embedding_type") == "alibi":
        config_class, model_class = JinaBertConfig, JinaBertForSequenceClassification
    config = config_class.from_pretrained(path, **options)
    model, info = model_class.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    return model, set(info["missing_keys"])


def _short_digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Run:
    """One fine-tuning of a task.

    Attributes:
        point: `learning_rate` and `batch_size`.
        seed: See `FineTuning.seeds`.
        identity: Everything that decides the outcome, as JSON values.
        folder: Where its result and its weights are.
    """

    point: dict[str, Any]
    seed: int
    identity: dict[str, Any]
    folder: Path

    @property
    def digest(self) -> str:
        """Of the identity: ten hexadecimal digits."""
        return _short_digest(self.identity)

    @property
    def result_path(self) -> Path:
        return self.folder / "result.json"

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def is_finished(self) -> bool:
        return self.result_path.is_file()

    def result(self) -> dict[str, Any]:
        """What `fine_tune` wrote."""
        return json.loads(self.result_path.read_text(encoding="utf-8"))


def plan(backbone: Backbone, data: TaskData, settings: FineTuning, work: Path, *, start: Run | None) -> list[Run]:
    """The runs of a task: every point of the grid with every seed, point by point.

    Args:
        backbone: What is fine-tuned.
        data: The task.
        settings: The grid, and how.
        work: Folder of all runs.
        start: The run whose encoder these start from; None is the backbone's.
    """
    shared = {
        "task": data.task.name,
        "backbone_sha256": backbone.sha256,
        "start": f"MNLI {start.digest}" if start else "backbone",
        "data_sha256": {name: split.sha256 for name, split in {"train": data.train, **data.dev}.items()},
        "epochs": settings.epochs,
        "max_length": settings.max_length,
        "best_epoch": settings.best_epoch,
        "hidden_dropout_prob": settings.hidden_dropout_prob,
        "training": settings.training,
    }
    runs = []
    for rate, size, seed in itertools.product(settings.learning_rates, settings.batch_sizes, settings.seeds):
        point = {"learning_rate": rate, "batch_size": size}
        identity = {**shared, **point, "seed": seed}
        name = f"lr{rate:g}-bs{size}-seed{seed}-{_short_digest(identity)}"
        runs.append(Run(point, seed, identity, work / backbone.name.replace("/", "--") / data.task.name / name))
    return runs


class _Rows(Dataset):
    """(first, second, label) of the rows of a split."""

    def __init__(self, split: Split):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[str, str | None, int | float | None]:
        columns = (self.split.first, self.split.second, self.split.labels)
        return tuple(column[index] if column is not None else None for column in columns)


@dataclass(frozen=True)
class _Collator:
    """Tokenises a batch and pads it to its longest row; texts stay text until they are needed."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, rows: Sequence[tuple[str, str | None, int | float | None]]) -> dict[str, torch.Tensor]:
        first, second, labels = (list(column) for column in zip(*rows, strict=True))
        batch = self.tokenizer(
            first,
            None if second[0] is None else second,
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
        )
        if labels[0] is not None:
            batch["labels"] = torch.tensor(labels)  # int64, or float32 for regression
        return dict(batch)


def measures_of(task: Task, logits: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    """`measure` of a model's outputs; all 0 if one of them is not finite."""
    if not np.isfinite(logits).all():
        logger.warning("%s: outputs that are not finite; the run counts 0.", task.name)
        return dict.fromkeys(task.measures, 0.0)
    return measure(task, decode(task, logits), labels)


def _trainer(model: PreTrainedModel, backbone: Backbone, settings: FineTuning, run: Run, **options: Any) -> Trainer:
    arguments = training_arguments(settings, {**run.point, "seed": run.seed}, run.folder / "trainer")
    arguments.disable_tqdm = not sys.stderr.isatty()
    if arguments.world_size * max(1, arguments.n_gpu) > 1:
        raise EvaluationError("GLUE runs on one device: set CUDA_VISIBLE_DEVICES to one, start no second process.")
    collator = _Collator(backbone.tokenizer, settings.max_length)
    trainer = Trainer(model=model, args=arguments, data_collator=collator, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def fine_tune(
    run: Run, backbone: Backbone, data: TaskData, settings: FineTuning, *, start: Run | None
) -> dict[str, Any]:
    """Carries out a run, or goes on with it after its last whole epoch.

    Args:
        run: One of `plan`.
        backbone: What is fine-tuned.
        data: The task.
        settings: How.
        start: The run whose encoder it starts from; None is the backbone's.

    Returns:
        What is in result.json: `identity`, `dev` (part -> measures), `score` (that of the first part), `history` (what
        the Trainer logged).
    """
    set_seed(run.seed)
    model = _starting_model(backbone, data.task, settings, start)
    options: dict[str, Any] = {}
    if settings.best_epoch:
        first = next(iter(data.dev.values()))
        options = {"eval_dataset": _Rows(first), "compute_metrics": partial(_epoch_score, data.task, first)}
    trainer = _trainer(model, backbone, settings, run, train_dataset=_Rows(data.train), **options)
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(run.folder / "trainer"))
    trainer.compute_metrics = None  # the measures of the task are wanted, not its score
    dev = {}
    for name, split in data.dev.items():
        logits = np.asarray(trainer.predict(_Rows(split)).predictions)
        dev[name] = measures_of(data.task, logits, split.labels or [])
    result = {
        "identity": run.identity,
        "dev": dev,
        "score": task_score(next(iter(dev.values()))),
        "history": [_reproducible(entry) for entry in trainer.state.log_history],
    }
    _finish(run, trainer.model, backbone.tokenizer, result)
    return result


def _starting_model(backbone: Backbone, task: Task, settings: FineTuning, start: Run | None) -> PreTrainedModel:
    """The backbone with a new head; its encoder, pooler included, is that of `start` if there is one."""
    model, _ = load_classifier(backbone.path, task, hidden_dropout_prob=settings.hidden_dropout_prob)
    if start is not None:
        finished = AutoModelForSequenceClassification.from_pretrained(start.model_folder, dtype=torch.float32)
        model.base_model.load_state_dict(finished.base_model.state_dict())
    return model


def _epoch_score(task: Task, split: Split, prediction: EvalPrediction) -> dict[str, float]:
    return {"score": task_score(measures_of(task, np.asarray(prediction.predictions), split.labels or []))}


def _reproducible(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the Trainer's log without times; what is not finite is null, as JSON has no such numbers."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
        if not key.endswith(("_runtime", "_per_second", "_flos"))
    }


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end: trainer_state.json is the last of its files."""
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
        except ValueError:  # cut off
            continue
    return max(whole)[1] if whole else None


def _finish(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, result: dict[str, Any]):
    """Writes weights and result, in this order, and removes the Trainer's checkpoints."""
    shutil.rmtree(run.model_folder, ignore_errors=True)
    model.save_pretrained(run.model_folder)
    # TRAP: a tokenizer keeps the truncation and padding of its last call and would save them.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(run.model_folder)
    partial = run.result_path.with_name("result.json.partial")
    partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, run.result_path)
    shutil.rmtree(run.folder / "trainer", ignore_errors=True)


def predict(
    run: Run, backbone: Backbone, data: TaskData, settings: FineTuning, splits: dict[str, Split]
) -> dict[str, np.ndarray]:
    """Outputs of the model of a finished run: name of a split -> `(rows, num_labels) float`."""
    model = AutoModelForSequenceClassification.from_pretrained(run.model_folder, dtype=torch.float32)
    trainer = _trainer(model, backbone, dataclasses.replace(settings, best_epoch=False), run)  # no epochs here
    outputs = {}
    for name, split in splits.items():
        unlabelled = Split(split.first, split.second, None)
        outputs[name] = np.asarray(trainer.predict(_Rows(unlabelled)).predictions)
        if outputs[name].shape != (len(split), data.task.num_labels):
            raise RuntimeError(f"{run.model_folder}: outputs of shape {outputs[name].shape} for {len(split)} rows.")
    shutil.rmtree(run.folder / "trainer", ignore_errors=True)
    return outputs


def drop_weights(runs: Sequence[Run], *, keep: Run):
    """Removes the weights of all runs but one; their results stay."""
    for run in runs:
        if run != keep:
            shutil.rmtree(run.model_folder, ignore_errors=True)
