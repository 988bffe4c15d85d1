"""Stages II and III: bidirectional InfoNCE on pairs, L_NCE+ on pairs with hard negatives (paper sections 5.1, 5.2).

Law: every batch comes from one source and holds no text twice (a duplicate would be a false negative). The loss is
sentence-transformers' MultipleNegativesRankingLoss with the partition of each direction kept apart.

NOTE: sentence-transformers averages the two directions, the paper adds them: our loss is exactly half the paper's.
AdamW is invariant to that factor; gradient clipping is not, so `max_grad_norm` acts as twice the value on the paper's
scale.
"""

import fnmatch
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from transformers import set_seed

import modeling_jina_bert

from .recipe import ContrastiveRecipe, RecipeError, training_arguments
from .run import RunRecorder, check_checkpoint, resume_checkpoint
from .sources import Source, check_columns, open_source

logger = logging.getLogger(__name__)


def load_sources(recipe: ContrastiveRecipe) -> DatasetDict:
    """All sources as (anchor, positive[, negative_1 ... negative_n]) columns, weighted.

    A source's weight multiplies its rows: below 1 a random share of them is kept, above 1 they are repeated, so that
    drawing sources in proportion to their rows draws them by size times weight.

    Args:
        recipe: Gives `sources`, `data_dir`, `num_negatives`, `fill_negatives`, `max_rows` and the seed.

    Returns:
        One data set a source.

    Raises:
        RecipeError: A missing file or column, an empty source, too few negatives under `fill_negatives: error`.
    """
    if recipe.fill_negatives not in ("random", "error"):
        raise RecipeError(f"fill_negatives={recipe.fill_negatives!r} is neither 'random' nor 'error'.")
    seed = int(recipe.training.get("seed", 42))
    loaded = {}
    for source in recipe.sources:
        if source.name in loaded:
            raise RecipeError(f"source {source.name}: the name is used twice.")
        if source.weight <= 0:
            raise RecipeError(f"source {source.name}: weight={source.weight} is not above 0.")
        loaded[source.name] = _weighted(_load_source(source, recipe, seed), source.weight, seed)
        logger.info("source %s: %d rows after weighting", source.name, len(loaded[source.name]))
    return DatasetDict(loaded)


def _load_source(source: Source, recipe: ContrastiveRecipe, seed: int) -> Dataset:
    # A Hub data set is streamed, and no more of it fetched than max_rows; batches need rows in any order, so what
    # arrives is kept on disk, memory-mapped.
    dataset = open_source(source, recipe.data_dir, streaming=source.hub is not None)
    columns = {source.anchor: "anchor", source.positive: "positive"}
    negatives = []
    if recipe.num_negatives:
        names = dataset.column_names or list(next(iter(dataset), {}))
        negatives = fnmatch.filter(names, source.negatives) or [source.negatives]
    check_columns(dataset, source, [*columns, *negatives])
    dataset = dataset.select_columns([*columns, *negatives])
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    dataset = dataset.filter(_is_pair)
    if isinstance(dataset, IterableDataset):
        dataset = _to_disk(dataset, recipe.max_rows)
    if not len(dataset):
        raise RecipeError(f"source {source.name}: all pairs are empty or have anchor == positive.")
    if recipe.max_rows is not None and len(dataset) > recipe.max_rows:
        dataset = dataset.shuffle(seed=seed).select(range(recipe.max_rows))
    if recipe.num_negatives:
        dataset = _expand_negatives(dataset, negatives, source, recipe, seed)
    return dataset


def _to_disk(stream: IterableDataset, max_rows: int | None) -> Dataset:
    """The first `max_rows` rows of a stream (None: all), as a data set in the cache folder of `datasets`."""
    taken = stream if max_rows is None else stream.take(max_rows)
    first = next(iter(taken), None)
    if first is None:
        return Dataset.from_list([])
    return Dataset.from_generator(_rows, gen_kwargs={"stream": taken})


def _rows(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from stream


def _is_pair(row: dict[str, Any]) -> bool:
    anchor, positive = (row["anchor"] or "").strip(), (row["positive"] or "").strip()
    return bool(anchor and positive) and anchor != positive


def _expand_negatives(
    dataset: Dataset, columns: list[str], source: Source, recipe: ContrastiveRecipe, seed: int
) -> Dataset:
    """Exactly `num_negatives` text columns; rows with fewer are filled with positives of other rows, or refused."""
    wanted = recipe.num_negatives
    positives = dataset["positive"][:]

    def expand(row: dict[str, Any], index: int) -> dict[str, str]:
        given = [text for name in columns for text in _as_list(row[name])]
        if not all(isinstance(text, str) for text in given):
            raise RecipeError(
                f"source {source.name}: {source.negatives!r} of row {index} holds something else than text."
            )
        # A dictionary keeps the order, and each text once.
        kept = {text: None for text in given if text.strip() and text not in (row["positive"], row["anchor"])}
        negatives = list(kept)[:wanted]
        if len(negatives) < wanted and recipe.fill_negatives == "error":
            raise RecipeError(
                f"source {source.name}: row {index} has {len(negatives)} of {wanted} negatives; "
                "set fill_negatives: random."
            )
        generator = np.random.default_rng([seed, index])
        excluded = {row["positive"], row["anchor"], *negatives}
        for _ in range(100 * wanted):
            if len(negatives) == wanted:
                break
            text = positives[int(generator.integers(len(positives)))]
            if text not in excluded:
                excluded.add(text)
                negatives.append(text)
        if len(negatives) < wanted:
            raise RecipeError(
                f"source {source.name}: too few different texts to fill {wanted} negatives of row {index}."
            )
        return {f"negative_{i}": text for i, text in enumerate(negatives, start=1)}

    # remove_columns goes first: a column of the input may have the name of a new one.
    expanded = dataset.map(expand, with_indices=True, remove_columns=columns, load_from_cache_file=False)
    return expanded.select_columns(["anchor", "positive", *(f"negative_{i}" for i in range(1, wanted + 1))])


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _weighted(dataset: Dataset, weight: float, seed: int) -> Dataset:
    whole, share = int(weight), weight - int(weight)
    parts = [dataset] * whole
    if share:
        parts.append(dataset.shuffle(seed=seed).select(range(max(1, round(share * len(dataset))))))
    return concatenate_datasets(parts)


def load_model(recipe: ContrastiveRecipe) -> SentenceTransformer:
    """Transformer, mean pooling and normalisation around the checkpoint the stage starts from.

    Raises:
        RecipeError: There is no such checkpoint, or it is no JinaBERT.
    """
    try:
        transformer = Transformer(
            recipe.model,
            max_seq_length=recipe.max_length,
            model_kwargs={"trust_remote_code": True},
            config_kwargs={"trust_remote_code": True},
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"model {recipe.model}: {error}") from error
    if not isinstance(transformer.auto_model.config, modeling_jina_bert.JinaBertConfig):
        raise RecipeError(f"model {recipe.model}: a {transformer.auto_model.config.model_type} model, not a JinaBERT.")
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()])
    # A model built from modules would refuse to load its own checkpoints again.
    model.trust_remote_code = True
    return model


def build_loss(model: SentenceTransformer, recipe: ContrastiveRecipe) -> nn.Module:
    """Half of L_pairs, or of L_NCE+: anchors against positives and negatives, positives against anchors."""
    options = {
        "scale": 1 / recipe.temperature,
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    }
    if recipe.mini_batch_size is None:
        return MultipleNegativesRankingLoss(model, **options)
    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=recipe.mini_batch_size, **options)


def train(recipe: ContrastiveRecipe, *, resume: bool | str | None = None) -> Path:
    """Runs stage II (`num_negatives: 0`) or III.

    Args:
        recipe: What to train.
        resume: See `resume_checkpoint`.

    Returns:
        The folder of the final sentence-transformers model.

    Raises:
        RecipeError: Before the first step, for anything wrong with the recipe, its data or its model.
    """
    checkpoint = resume_checkpoint(recipe.output_dir, resume)
    options = {"batch_sampler": "no_duplicates", "multi_dataset_batch_sampler": "proportional"}
    arguments = training_arguments(SentenceTransformerTrainingArguments, recipe, **options)
    set_seed(arguments.seed)
    model = load_model(recipe)
    if arguments.activation_checkpointing:
        # On the encoder itself: sentence-transformers 6.2 passes on only the name that transformers has deprecated.
        model[0].auto_model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=arguments.activation_checkpointing_kwargs
        )
        arguments.activation_checkpointing = False
    check_checkpoint(checkpoint, model[0].auto_model.config)
    datasets = load_sources(recipe)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets if len(datasets) > 1 else next(iter(datasets.values())),
        loss=build_loss(model, recipe),
        callbacks=[RunRecorder(recipe)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    final = Path(recipe.output_dir) / "final"
    model.save_pretrained(str(final))
    return final
