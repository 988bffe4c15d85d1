"""Distillation: a JinaBERT learns a teacher's similarities of the texts of a batch, and its vectors. Not in the paper.

    python -m training.distillation --config training/recipes/tiny-distillation.yaml model=RUN/final output_dir=RUN2

The teacher may be any sentence-transformers model, of any vocabulary: what is learnt are distributions over the
documents of the batch and, if the teacher is at least as wide as the student, its vectors. Nothing is added to the
model. Before, in place of, or after stage II.

Laws: the teacher reads every text once, to disk, and is not in memory while the model trains; another run finds its
vectors again. Batches, checkpoints and resuming are those of stage II.

COST: the texts of a batch are in memory at once, there are no mini-batches, and one process trains; on disk 2 bytes a
dimension of the teacher and text.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from omegaconf import MISSING
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize

from .contrastive import train
from .embedding_shards import Embedder, Vectors, embed, load_embedder
from .mining_texts import Texts
from .pair_sampling import LABEL
from .recipe import ContrastiveRecipe, RecipeError, command_line, load_recipe
from .run import exit_on_recipe_error
from .teacher_windows import WindowedVectors, windows_of

_SHARD_ROWS = 20_000
"""Texts after which what the teacher has read is safe on disk."""
_AXES_ROWS = 50_000
"""Vectors that principal axes are taken from, at most."""
_FITTED_TEXTS = 2_000
"""Texts that axes are fitted to, at most: the student embeds them."""


class Axes(StrEnum):
    """How the teacher's vectors come to the student's width."""

    principal = "principal"
    fitted = "fitted"


@dataclass
class DistillationRecipe(ContrastiveRecipe):
    """A `ContrastiveRecipe` with a teacher; `temperature` is that of both distributions.

    Attributes:
        teacher: Folder, Hub name, or "all-MiniLM-L6-v2" from its PyPI package.
        teacher_max_length: Tokens the teacher cuts a text at; None keeps its own limit.
        teacher_bf16: Whether the teacher multiplies in bfloat16 (autocast); `training.bf16` is the student's.
        teacher_windows: Whether a longer text has the mean of the teacher's vectors of all its windows, in place of
            the vector of its beginning; see `teacher_windows`.
        cache_dir: Folder of the teacher's vectors.
        vector_weight: Of `vector_loss`, which is added to `distillation_loss`; 0 is that alone.
        axes: `principal`, those of `principal_axes`, for a student that is new to the teacher; `fitted`, those of
            `fitted_axes`, to go on with one that has learnt this teacher's vectors, on any texts.
        word_embeddings: Whether to begin with the teacher's word embeddings, see `take_word_embeddings`.
    """

    teacher: str = MISSING
    teacher_max_length: int | None = None
    teacher_bf16: bool = False
    teacher_windows: bool = False
    cache_dir: str = "runs/teacher-vectors"
    vector_weight: float = 0.0
    axes: Axes = Axes.principal
    word_embeddings: bool = False


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


def vector_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], axes: Tensor) -> Tensor:
    """Cosine distance of the student's vectors from the teacher's, the mean over texts.

    Args:
        student: `(texts, width)` float, of each column.
        teacher: `(texts, teacher width)` float, of each column; constants.
        axes: `(teacher width, width)`, see `principal_axes` and `fitted_axes`.
    """
    found = torch.cat([normalize(column, dim=1) for column in student])
    wanted = normalize(torch.cat(list(teacher)) @ axes, dim=1)
    return 1 - (found * wanted).sum(dim=1).mean()


def principal_axes(vectors: Tensor, width: int) -> Tensor:
    """The axes on which vectors keep most of their inner products: `(vectors' width, width)`, orthonormal columns.

    Those of PCA without centring: cosines, not variances, are what is learnt. The largest component of an axis is
    positive, so that a run that is resumed elsewhere does not find one turned round.

    Args:
        vectors: `(rows, vectors' width)` float.
        width: At most that of the vectors.
    """
    _, axes = torch.linalg.eigh(vectors.T @ vectors)  # of ascending eigenvalue
    axes = axes[:, -width:].flip(1)
    return axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()


def fitted_axes(vectors: Tensor, student: Tensor) -> Tensor:
    """The axes on which vectors come nearest to those that a student gives the same texts: orthonormal columns.

    Orthogonal Procrustes: of all such axes those with the largest sum of inner products with the student's vectors.

    Args:
        vectors: `(rows, vectors' width)` float.
        student: `(rows, width)` float, at most as wide.
    """
    left, _, right = torch.linalg.svd(vectors.T @ student, full_matrices=False)
    return left @ right


@torch.no_grad()
def take_word_embeddings(student: SentenceTransformer, teacher: SentenceTransformer):
    """Gives the student the teacher's word embeddings, on as many of their principal axes as it has dimensions.

    They are scaled to the standard deviation of the student's; tokens that only the student has keep their own.

    Raises:
        RecipeError: The vocabularies differ, or the teacher's embeddings are the narrower ones.
    """
    known = student.tokenizer.get_vocab()
    ids = teacher.tokenizer.get_vocab()
    mine = student[0].auto_model.get_input_embeddings()
    theirs = teacher[0].auto_model.get_input_embeddings().weight[: len(ids)].float().to(mine.weight.device)
    whole = sorted(ids.values()) == list(range(len(theirs)))
    if not whole or any(known.get(token) != number for token, number in ids.items()):
        raise RecipeError("word_embeddings: the teacher's vocabulary is not the model's; use word_embeddings=false.")
    width = mine.weight.shape[1]
    if theirs.shape[1] < width:
        raise RecipeError(f"word_embeddings: the teacher's have {theirs.shape[1]} dimensions, the model's {width}.")
    centred = theirs - theirs.mean(dim=0)
    taken = centred @ principal_axes(centred, width)
    mine.weight[: len(ids)] = taken * (mine.weight.std() / taken.std())
    if mine.padding_idx is not None:
        mine.weight[mine.padding_idx] = 0


class DistillationLoss(nn.Module):
    """`distillation_loss`, and `vector_loss` by its weight, against vectors on disk.

    Args:
        model: The student.
        teacher: Vectors of the teacher for queries and for documents. Labels are `(batch, columns)` numbers of them:
            the first column's of the queries, the others' of the documents.
        temperature: See `distillation_loss`.
        axes: See `vector_loss`; None with a weight of 0.
        weight: Of `vector_loss`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        teacher: tuple[Vectors | WindowedVectors, Vectors | WindowedVectors],
        temperature: float,
        *,
        axes: Tensor | None = None,
        weight: float = 0.0,
    ):
        super().__init__()
        self.model, self.temperature, self.weight = model, temperature, weight
        self._teacher = teacher
        self.register_buffer("axes", axes, persistent=False)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        student = [self.model(features)["sentence_embedding"] for features in sentence_features]
        queries, documents = self._teacher
        teacher = [
            torch.from_numpy((documents if column else queries).take(numbers)).to(student[0].device)
            for column, numbers in enumerate(labels.cpu().numpy().T)
        ]
        loss = distillation_loss(student, teacher, self.temperature)
        return loss + self.weight * vector_loss(student, teacher, self.axes) if self.weight else loss


def distillation(
    recipe: DistillationRecipe,
    model: SentenceTransformer,
    datasets: DatasetDict,
    arguments: SentenceTransformerTrainingArguments,
) -> tuple[DatasetDict, nn.Module]:
    """The rows with the numbers of their texts' vectors as labels, and the loss that looks these up.

    Raises:
        RecipeError: A teacher that cannot be loaded, or cannot give what is wanted of it; what stage II can do and
            distillation cannot.
    """
    for field in ("mini_batch_size", "mini_batch_tokens", "matryoshka_dims"):
        if getattr(recipe, field):
            raise RecipeError(f"{field}={getattr(recipe, field)}: distillation has none; use a smaller batch.")
    if not recipe.bidirectional:
        raise RecipeError("bidirectional=false: distillation has both directions.")
    shortest = 3 if recipe.teacher_max_length is None else recipe.teacher_max_length
    if recipe.temperature <= 0 or recipe.vector_weight < 0 or shortest < 3:
        raise RecipeError("distillation wants temperature > 0, vector_weight >= 0 and teacher_max_length >= 3.")
    if recipe.word_embeddings and recipe.lora is not None:
        raise RecipeError("word_embeddings=true changes the base that adapters are saved without; leave out lora.")
    if arguments.world_size > 1:
        raise RecipeError(f"distillation runs in one process, not in {arguments.world_size}: leave out the launcher.")
    embedder = load_embedder(
        recipe.teacher,
        max_length=recipe.teacher_max_length,
        batch_size=arguments.per_device_eval_batch_size,
        bf16=recipe.teacher_bf16,
    )
    if recipe.word_embeddings:
        take_word_embeddings(model, embedder.model)
    numbered = {}
    parts: dict[str, list[Dataset]] = {"query": [], "document": []}
    for name, dataset in datasets.items():
        starts = []
        for column in dataset.column_names:
            role = "document" if starts else "query"
            starts.append(sum(map(len, parts[role])))
            parts[role].append(dataset.select_columns([column]).rename_columns({column: "text"}))
        numbered[name] = dataset.add_column(LABEL, [[start + row for start in starts] for row in range(len(dataset))])
    folder = Path(recipe.cache_dir)
    texts = {role: Texts(concatenate_datasets(part)) for role, part in parts.items()}
    vectors = {role: _vectors(recipe, embedder, text, role, folder) for role, text in texts.items()}
    loss = DistillationLoss(
        model,
        (vectors["query"], vectors["document"]),
        recipe.temperature,
        axes=_axes(recipe, model, texts, vectors) if recipe.vector_weight else None,
        weight=recipe.vector_weight,
    )
    return DatasetDict(numbered), loss


def _vectors(
    recipe: DistillationRecipe, embedder: Embedder, texts: Texts, role: str, folder: Path
) -> Vectors | WindowedVectors:
    options = {"folder": folder, "dtype": "float16", "shard_rows": _SHARD_ROWS}
    if not recipe.teacher_windows:
        return embed(embedder, texts, role, **options)
    windows = windows_of(texts, embedder, role)
    return WindowedVectors(embed(embedder, windows.texts, role, **options), windows)


def _axes(
    recipe: DistillationRecipe,
    model: SentenceTransformer,
    texts: dict[str, Texts],
    teacher: dict[str, Vectors | WindowedVectors],
) -> Tensor:
    """The teacher's axes in the student's width, from texts all over the sources.

    Principal ones are those of the documents. They are fitted to queries, which are short: the student embeds them.
    """
    width = model.get_embedding_dimension()
    if teacher["document"].width < width:
        raise RecipeError(
            f"teacher {recipe.teacher}: {teacher['document'].width} dimensions, the model has {width}; use "
            "vector_weight=0."
        )
    role, most = ("query", _FITTED_TEXTS) if recipe.axes is Axes.fitted else ("document", _AXES_ROWS)
    vectors = teacher[role]
    chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), most)).astype(np.int64)
    taken = torch.from_numpy(vectors.take(chosen))
    if recipe.axes is Axes.principal:
        return principal_axes(taken, width)
    student = model.encode(texts[role].take(chosen), prompt="", normalize_embeddings=True, convert_to_tensor=True)
    return fitted_axes(normalize(taken, dim=1), student.float().cpu())


def main():
    arguments = command_line("Distillation: a teacher's similarities.")
    recipe = load_recipe(DistillationRecipe, arguments.config, arguments.overrides)
    final = train(recipe, command=None, resume=arguments.resume, objective=distillation)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"distillation finished: {final}")


if __name__ == "__main__":
    exit_on_recipe_error(main)
