"""The recipe of pair preparation, and what is checked of it before any work.

Law: a recipe that starts has sources that can be read and hold text, a teacher that loads, and an output folder that
is new or was begun with the same recipe; otherwise a `RecipeError` names what is wrong.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

from omegaconf import MISSING

from .corpus_recipe import Executor
from .executors import check_output
from .mining_recipe import MINILM, MINILM_PACKAGE
from .recipe import RecipeError, Source


@dataclass
class PairLanguage:
    """Which languages stay. A pair goes only if another language is sure: titles and terms have too few letters.

    Attributes:
        keep: ISO 639-1 codes.
        sure: Least confidence of lingua in one other language that removes a pair, between 0 and 1.
        among: Languages that are told apart, ISO 639-1 codes; None is all spoken ones (1.1 GB a process). Fewer are
            faster, and surer of a text that is in none of them.
        characters: Characters of a pair that are looked at: all, or its beginning, middle and end.
    """

    keep: list[str] = field(default_factory=lambda: ["en"])
    sure: float = 0.5
    among: list[str] | None = None
    characters: int = 600


@dataclass
class Consistency:
    """A pair stays if its positive is among those of a random pool that are nearest to the query.

    Attributes:
        teacher: Folder or Hub name of a sentence-transformers model; "all-MiniLM-L6-v2" from its PyPI package.
        pool: Different positives, of all sources, that a pair's own is compared with; the paper's is of 1,000,000.
        top: Places that the own positive may take.
        pairs_per_source: Pairs of a source that are judged, chosen by a hash; the others are left out. None: all.
        max_length: Tokens of the teacher that a text is cut at; None is the teacher's own limit.
        batch_size: Texts in a batch.
        device: None chooses.
        bf16: Whether the teacher multiplies in bfloat16 (autocast): twice as fast on a processor with AVX512-BF16.
        cache_dir: Folder in which the teacher's vectors are kept, in float16, and found again: by another preparation,
            or by a distillation from the same teacher at the same `max_length` and `bf16`. None keeps none.
    """

    teacher: str = MINILM
    pool: int = 1_000_000
    top: int = 2
    pairs_per_source: int | None = None
    max_length: int | None = None
    batch_size: int = 32
    device: str | None = None
    bf16: bool = False
    cache_dir: str | None = None


@dataclass
class PairRecipe:
    """Preparation of text pairs for stage II (Jina Embeddings v1, arXiv 2307.11224).

    Attributes:
        output_dir: Folder of the pairs (`pairs/SOURCE/*.parquet`), the report, removed pairs, logs and intermediate
            files (`work`, which may be deleted at the end). Shared by all machines.
        data_dir: Root of the sources' paths.
        sources: What to read: name, path or hub, and the columns `anchor` and `positive`. Of a pair that is in several
            sources the one named first keeps it.
        buckets: Parts, by hash, in which duplicates are looked for; one has to fit into memory (100 bytes a pair).
        language: None keeps all languages.
        consistency: None keeps all that is left.
        removed_examples: Removed pairs written down of each task, source and reason, cut short; None: all, whole.
        seed: Of the pool, and of the choice of the pairs that are judged.
        executor: Where the tasks run.
    """

    output_dir: str = MISSING
    data_dir: str = "."
    sources: list[Source] = field(default_factory=list)
    buckets: int = 1
    language: PairLanguage | None = None
    consistency: Consistency | None = None
    removed_examples: int | None = 3
    seed: int = 42
    executor: Executor = field(default_factory=Executor)


def step_names(recipe: PairRecipe) -> list[str]:
    """The steps that remove pairs, in order."""
    names = ["empty", "identical", "duplicate"] + ["language"] * bool(recipe.language)
    if recipe.consistency:
        names += ["sample"] * bool(recipe.consistency.pairs_per_source) + ["consistency"]
    return names


def check(recipe: PairRecipe):
    """Raises `RecipeError` for what would fail later: packages, numbers, names, output folder, sources, teacher."""
    for module in ("datatrove", "lingua", "faiss"):
        if find_spec(module) is None:
            raise RecipeError(f'{module} is not installed: pip install -e ".[pairs]".')
    _check_numbers(recipe)
    check_names(recipe.sources)
    if recipe.language:
        _check_languages(recipe.language)
    check_output(recipe, what="pair preparation")
    for source in recipe.sources:
        _check_source(source, recipe.data_dir)
    if recipe.consistency:
        _check_teacher(recipe.consistency)


def _check_numbers(recipe: PairRecipe):
    positive = {"buckets": recipe.buckets, "executor.tasks": recipe.executor.tasks}
    positive |= {"executor.workers": recipe.executor.workers or 1}
    if recipe.language:
        positive |= {"language.characters": recipe.language.characters, "language.keep": len(recipe.language.keep)}
        if not 0 < recipe.language.sure <= 1:
            raise RecipeError(f"language.sure={recipe.language.sure} must be above 0 and at most 1.")
    if recipe.consistency:
        numbers = dataclasses.asdict(recipe.consistency)
        positive |= {f"consistency.{key}": number for key, number in numbers.items() if type(number) is int}
    for key, value in positive.items():
        if value < 1:
            raise RecipeError(f"{key}={value} must be at least 1.")
    if recipe.seed < 0:
        raise RecipeError(f"seed={recipe.seed} must not be negative.")


def check_names(sources: Sequence[Source]):
    """Raises `RecipeError` unless the names can be those of files or folders of the output, and are different."""
    names = [str(source.name) for source in sources]
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name) or name == "all":
            raise RecipeError(f"sources: {name!r} cannot name a folder; use letters, digits, '_', '-' and '.'.")
        if names.count(name) > 1:
            raise RecipeError(f"sources: two are named {name!r}.")


def _check_languages(language: PairLanguage):
    from lingua import IsoCode639_1

    for key, codes in (("keep", language.keep), ("among", language.among or [])):
        for code in codes:
            if not hasattr(IsoCode639_1, code.upper()):
                raise RecipeError(f"language.{key}: {code!r} is not an ISO 639-1 code that lingua knows.")
    if language.among is not None and not set(language.keep) < set(language.among):
        raise RecipeError(f"language.among={language.among} has to hold all of keep={language.keep}, and others.")


def _check_source(source: Source, data_dir: str):
    from .source_files import check_source

    if source.tokens is not None or source.heldout_share:
        raise RecipeError(f"source {source.name}: tokens and heldout_share are not for preparation.")
    check_source(source, data_dir, [source.anchor, source.positive])


def _check_teacher(consistency: Consistency):
    from .consistency import load_teacher

    if consistency.teacher == MINILM and find_spec(MINILM_PACKAGE) is None:
        raise RecipeError(f'consistency.teacher: {MINILM} needs: pip install -e ".[baselines]".')
    load_teacher(consistency)
