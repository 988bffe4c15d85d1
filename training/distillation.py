"""Distillation: a JinaBERT learns the similarities that a teacher gives to the texts of a batch. Not in the paper.

    python -m training.distillation --config training/recipes/tiny-distillation.yaml data_dir=DATA model=RUN/final \
        output_dir=RUN2

The teacher may be any sentence-transformers model, of any width and vocabulary: what is learnt are distributions over
the documents of the batch, so nothing is added to the model. In place of, or after, stage II.

Laws: the teacher reads every text once, to disk, and is not in memory while the model trains; another run finds its
vectors again. Batches, checkpoints and resuming are those of stage II.

COST: the texts of a batch are in memory at once, there are no mini-batches; on disk 2 bytes a dimension of the teacher
and text.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import DatasetDict, concatenate_datasets
from omegaconf import MISSING
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize

from .contrastive import train
from .embedding_shards import Vectors, embed, load_embedder
from .mining_texts import Texts
from .pair_sampling import LABEL
from .recipe import ContrastiveRecipe, RecipeError, command_line, load_recipe
from .run import exit_on_recipe_error

_SHARD_ROWS = 20_000
"""Texts after which what the teacher has read is safe on disk."""


@dataclass
class DistillationRecipe(ContrastiveRecipe):
    """A `ContrastiveRecipe` with a teacher; `temperature` is that of both distributions.

    Attributes:
        teacher: Folder, Hub name, or "all-MiniLM-L6-v2" from its PyPI package.
        teacher_max_length: Tokens the teacher cuts a text at; None keeps its own limit.
        cache_dir: Folder of the teacher's vectors.
    """

    teacher: str = MISSING
    teacher_max_length: int | None = None
    cache_dir: str = "runs/teacher-vectors"


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """KL divergence of the student's similarities from the teacher's, the mean of both directions.

    For every anchor the softmax of its cosines, over the temperature, with all documents of the batch; for every
    positive that of its cosines with all anchors. sentence-transformers' DistillKLDivLoss, given the batch's documents
    as candidates, is the first of the two times the temperature squared.

    Args:
        student: Anchors, positives and further documents, `(batch, width)` float each.
        teacher: The same texts, `(batch, teacher width)` float each; constants.
        temperature: Of both softmaxes.
    """
    wanted, found = (_log_probabilities(columns, temperature) for columns in (teacher, student))
    parts = [kl_div(f, w.detach(), reduction="batchmean", log_target=True) for f, w in zip(found, wanted, strict=True)]
    return sum(parts) / len(parts)


def _log_probabilities(columns: Sequence[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """`(batch, documents)` and `(batch, batch)` float32 or float64."""
    wide = torch.promote_types(columns[0].dtype, torch.float32)
    anchors, positives, *rest = (normalize(column.to(wide), dim=1) for column in columns)
    documents = torch.cat([positives, *rest])
    return (
        log_softmax(anchors @ documents.T / temperature, dim=1),
        log_softmax(positives @ anchors.T / temperature, dim=1),
    )


class SimilarityDistillationLoss(nn.Module):
    """`distillation_loss` against vectors on disk.

    Args:
        model: The student.
        teacher: Vectors of the teacher; labels are `(batch, columns)` numbers of them.
        temperature: See `distillation_loss`.
    """

    def __init__(self, model: SentenceTransformer, teacher: Vectors, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature
        self._teacher = teacher

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        student = [self.model(features)["sentence_embedding"] for features in sentence_features]
        vectors = torch.from_numpy(self._teacher.take(labels.flatten().cpu().numpy()))
        vectors = vectors.to(student[0].device).unflatten(0, tuple(labels.shape))  # (batch, columns, teacher width)
        return distillation_loss(student, vectors.unbind(1), self.temperature)


def distillation(
    recipe: DistillationRecipe,
    model: SentenceTransformer,
    datasets: DatasetDict,
    arguments: SentenceTransformerTrainingArguments,
) -> tuple[DatasetDict, nn.Module]:
    """The rows with the numbers of their texts' vectors as labels, and the loss that looks these up.

    Raises:
        RecipeError: A teacher that cannot be loaded; what stage II can do and distillation cannot.
    """
    for field in ("mini_batch_size", "mini_batch_tokens", "matryoshka_dims"):
        if getattr(recipe, field):
            raise RecipeError(f"{field}={getattr(recipe, field)}: distillation has none; use a smaller batch.")
    embedder = load_embedder(
        recipe.teacher, max_length=recipe.teacher_max_length, batch_size=arguments.per_device_eval_batch_size
    )
    numbered, columns, texts = {}, [], 0
    for name, dataset in datasets.items():
        starts = range(texts, texts + len(dataset) * len(dataset.column_names), len(dataset))
        numbered[name] = dataset.add_column(LABEL, [[start + row for start in starts] for row in range(len(dataset))])
        columns += [dataset.select_columns([c]).rename_columns({c: "text"}) for c in dataset.column_names]
        texts += len(dataset) * len(dataset.column_names)
    vectors = embed(
        embedder,
        Texts(concatenate_datasets(columns)),
        "document",
        folder=Path(recipe.cache_dir),
        dtype="float16",
        shard_rows=_SHARD_ROWS,
    )
    return DatasetDict(numbered), SimilarityDistillationLoss(model, vectors, recipe.temperature)


def main():
    arguments = command_line("Distillation: a teacher's similarities.")
    recipe = load_recipe(DistillationRecipe, arguments.config, arguments.overrides)
    final = train(recipe, resume=arguments.resume, objective=distillation)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"distillation finished: {final}")


if __name__ == "__main__":
    exit_on_recipe_error(main)
