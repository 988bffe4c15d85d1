"""The recipe of corpus preparation, and what is checked of it before any work.

Law: a recipe that starts has sources that can be read, a tokenizer that exists, and an output folder that is new or
was begun with the same recipe; otherwise a `RecipeError` names what is wrong.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from omegaconf import MISSING

from .executors import check_output
from .recipe import RecipeError, Source


@dataclass
class Language:
    """Which languages stay.

    Attributes:
        keep: ISO 639-1 codes.
        threshold: Least confidence of lingua in `keep`, between 0 and 1.
        characters: Characters of a document that are looked at: all, or its beginning, middle and end.
    """

    keep: list[str] = field(default_factory=lambda: ["en"])
    threshold: float = 0.65
    characters: int = 1200


@dataclass
class Quality:
    """One of datatrove's quality filters.

    Attributes:
        filter: c4_quality, gopher_quality, gopher_repetition or fineweb_quality.
        name: In the report; the filter's where it is not given. Names are unique.
        arguments: Of datatrove's class, for example {min_doc_words: 20}; null switches most rules off.
        skip: Names of sources that the filter lets pass.
    """

    filter: str = MISSING
    name: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    skip: list[str] = field(default_factory=list)


@dataclass
class Minhash:
    """Near-duplicates over all sources together; of those that belong together one document stays.

    Attributes:
        n_grams: Words of a shingle; documents with fewer are never duplicates.
        num_buckets: Bands of the signature. Two documents of similarity s (Jaccard, of shingles) meet with
            probability 1 - (1 - s^hashes_per_bucket)^num_buckets: 0.92 for s = 0.8 with the defaults.
        hashes_per_bucket: Hashes of a band.
        seed: Of the hash functions.
        workers_per_bucket: Tasks that share a bucket; above 1 only for large corpora.
    """

    n_grams: int = 5
    num_buckets: int = 14
    hashes_per_bucket: int = 8
    seed: int = 1
    workers_per_bucket: int = 1


@dataclass
class Executor:
    """Where the tasks run.

    Attributes:
        kind: local, slurm or ray.
        tasks: Parts the corpus is cut into; each reads files of its own, or rows of its own where files are fewer.
        workers: Tasks at the same time; None is all.
        options: Arguments of datatrove's executor, for example {partition: cpu, time: "20:00:00"} for Slurm.
        stages: The same for single stages (filter, signatures, buckets, clusters, tokens, report), for example
            {clusters: {mem_per_cpu_gb: 64}}.
    """

    kind: str = "local"
    tasks: int = 1
    workers: int | None = 1
    options: dict[str, Any] | None = None
    stages: dict[str, dict[str, Any]] | None = None


@dataclass
class CorpusRecipe:
    """Corpus preparation.

    Attributes:
        output_dir: Folder of the shards (`tokens/train/SOURCE`, `tokens/heldout/SOURCE`), the report, removed texts,
            logs and intermediate files (`work`, which may be deleted at the end). Shared by all machines.
        tokenizer: Folder or Hub name of the tokenizer that stage I will use.
        data_dir: Root of the sources' paths.
        sources: What to read: name, path or hub, and the column `text`.
        language: None keeps all languages.
        quality: Filters, in order.
        minhash: None keeps duplicates.
        heldout_share: Share of the documents that goes to the held-out shards, chosen by a hash of the text.
        shard_tokens: Tokens at which a parquet file is closed and the task begins another.
        removed_examples: Removed texts written down of each task, source and reason, cut short; None: all, whole.
        executor: Where the tasks run.
    """

    output_dir: str = MISSING
    tokenizer: str = MISSING
    data_dir: str = "."
    sources: list[Source] = field(default_factory=list)
    language: Language | None = None
    quality: list[Quality] = field(default_factory=list)
    minhash: Minhash | None = None
    heldout_share: float = 0.01
    shard_tokens: int = 50_000_000
    removed_examples: int | None = 3
    executor: Executor = field(default_factory=Executor)


def check(recipe: CorpusRecipe):
    """Raises `RecipeError` for what would fail later: packages, numbers, names, output folder, sources, tokenizer."""
    for package, module in (("datatrove", "datatrove"), ("lingua-language-detector", "lingua")):
        if find_spec(module) is None:
            raise RecipeError(f'{package} is not installed: pip install -e ".[corpus]".')
    from lingua import IsoCode639_1

    from .corpus_steps import load_tokenizer

    _check_numbers(recipe)
    _check_names(recipe)
    for code in recipe.language.keep if recipe.language else []:
        if not hasattr(IsoCode639_1, code.upper()):
            raise RecipeError(f"language.keep: {code!r} is not an ISO 639-1 code that lingua knows.")
    check_output(recipe, what="corpus preparation")
    for source in recipe.sources:
        _check_source(source, recipe.data_dir)
    load_tokenizer(recipe.tokenizer)


def _check_numbers(recipe: CorpusRecipe):
    positive = {"shard_tokens": recipe.shard_tokens, "executor.tasks": recipe.executor.tasks}
    positive |= {"executor.workers": recipe.executor.workers or 1}
    if recipe.minhash:
        positive |= {f"minhash.{key}": value for key, value in dataclasses.asdict(recipe.minhash).items()}
        del positive["minhash.seed"]
    if recipe.language:
        positive |= {"language.characters": recipe.language.characters, "language.keep": len(recipe.language.keep)}
    for key, value in positive.items():
        if value < 1:
            raise RecipeError(f"{key}={value} must be at least 1.")
    if not 0 <= recipe.heldout_share < 1:
        raise RecipeError(f"heldout_share={recipe.heldout_share} must be at least 0 and below 1.")


def _check_names(recipe: CorpusRecipe):
    """Sources and steps are folders of the output: their names must be fit for that, and unique."""
    sources = [source.name for source in recipe.sources]
    steps = [quality.name or quality.filter for quality in recipe.quality] + [
        "empty",
        "filtered",
        "language",
        "minhash",
    ]
    for key, names in (("sources", sources), ("quality", steps)):
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise RecipeError(f"{key}: {name!r} cannot name a folder; use letters, digits, '_', '-' and '.'.")
            if names.count(name) > 1:
                raise RecipeError(f"{key}: two are named {name!r}.")
    for quality in recipe.quality:
        for name in quality.skip:
            if name not in sources:
                raise RecipeError(f"quality: {quality.filter} skips {name!r}, but no source has this name.")


def _check_source(source: Source, data_dir: str):
    from .source_files import check_source

    if source.tokens is not None or source.heldout_share:
        raise RecipeError(f"source {source.name}: tokens and heldout_share are for stage I, not for its preparation.")
    check_source(source, data_dir, [source.text])
