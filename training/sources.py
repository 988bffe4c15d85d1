"""Reading training data: local JSONL (.zst), parquet and text files, or Hub data sets, all through `datasets`.

Law: before the first step every source exists, has the columns the recipe names and at least one row; otherwise a
`RecipeError` names the source. Streams never hold a whole source in memory.
"""

from pathlib import Path

from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from .recipe import MLMRecipe, RecipeError, Source

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def open_source(source: Source, data_dir: str, *, streaming: bool) -> Dataset | IterableDataset:
    """Opens one source and checks it.

    Args:
        source: What to open.
        data_dir: Root of a relative `source.path`.
        streaming: Whether to stream it instead of preparing it on disk.

    Returns:
        The data set, all its columns.

    Raises:
        RecipeError: Neither or both of `path` and `hub`; no such file; a file type we do not read; no rows; a Hub data
            set that cannot be opened.
    """
    if (source.path is None) == (source.hub is None):
        raise RecipeError(f"source {source.name}: give exactly one of path and hub.")
    if source.hub is not None:
        try:
            return load_dataset(source.hub, source.hub_config, split=source.split, streaming=streaming)
        except (OSError, ValueError) as error:  # no such repository, configuration or split; no connection
            raise RecipeError(f"source {source.name}: {source.hub}: {error}") from error
    root = Path(data_dir).expanduser()
    files = sorted(root.glob(source.path)) if not Path(source.path).is_absolute() else [Path(source.path)]
    if not files or not all(file.is_file() for file in files):
        raise RecipeError(f"source {source.name}: no file matches {root / source.path}.")
    extension = Path(str(files[0]).removesuffix(".zst").removesuffix(".gz")).suffix
    if extension not in _BUILDERS:
        raise RecipeError(f"source {source.name}: {files[0].name} is none of {', '.join(_BUILDERS)} (.zst, .gz).")
    if all(file.stat().st_size == 0 for file in files):
        raise RecipeError(f"source {source.name}: {files[0]} is empty.")
    dataset = load_dataset(
        _BUILDERS[extension], data_files=[str(f) for f in files], split="train", streaming=streaming
    )
    return dataset


def check_columns(dataset: Dataset | IterableDataset, source: Source, columns: list[str]):
    """Raises `RecipeError` if the data set has no rows or lacks one of the columns; reads one row."""
    first = next(iter(dataset), None)
    if first is None:
        raise RecipeError(f"source {source.name}: no rows.")
    for column in columns:
        if column not in first:
            raise RecipeError(f"source {source.name}: no column {column!r}; it has {', '.join(first)}.")


def sequences(recipe: MLMRecipe, sources: list[Source], tokenizer: PreTrainedTokenizerBase) -> IterableDataset:
    """Token sequences of at most `max_length`, mixed from the sources by weight, in a deterministic order.

    Args:
        recipe: Gives `data_dir`, `max_length` and `long_documents`.
        sources: What to read.
        tokenizer: A fast tokenizer.

    Returns:
        A stream of {"input_ids": list[int]}.
    """
    if recipe.long_documents not in ("cut", "split"):
        raise RecipeError(f"long_documents={recipe.long_documents!r} is neither 'cut' nor 'split'.")
    streams = []
    for source in sources:
        stream = open_source(source, recipe.data_dir, streaming=True)
        check_columns(stream, source, [source.text])
        stream = stream.select_columns([source.text]).map(
            _tokenize,
            batched=True,
            batch_size=16,
            remove_columns=[source.text],
            fn_kwargs={
                "column": source.text,
                "tokenizer": tokenizer,
                "max_length": recipe.max_length,
                "split": recipe.long_documents == "split",
            },
        )
        streams.append(stream)
    if len(streams) == 1:
        return streams[0]
    total = sum(source.weight for source in sources)
    return interleave_datasets(
        streams,
        probabilities=[source.weight / total for source in sources],
        seed=int(recipe.training.get("seed", 42)),
        stopping_strategy="all_exhausted",
    )


def _tokenize(
    batch: dict[str, list], *, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int, split: bool
) -> dict[str, list[list[int]]]:
    texts = [text for text in batch[column] if text and text.strip()]
    if not texts:
        return {"input_ids": []}
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=split,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return {"input_ids": encoded["input_ids"]}
