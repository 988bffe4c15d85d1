"""Corpus preparation for stage I: language, quality, near-duplicates, token shards, with a report of what was removed.

    python -m training.corpus --config training/recipes/corpus-local.yaml data_dir=DATA output_dir=CORPUS

Law: the same stages of datatrove run on one machine, on Slurm or on Ray, as the recipe's `executor` says; every stage
is cut into tasks, a task that has finished is not run again, and one that was interrupted is run again from its start.
COST: the filtered text lies on disk once (`work/filtered`); signatures take 8 bytes x buckets x hashes a document
(0.9 kB with the defaults); the clustering holds every document with a duplicate in memory, a few hundred bytes each.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from .corpus_recipe import CorpusRecipe, Quality, check
from .executors import Stage, executors, run
from .preparation import announce, command_line, show
from .recipe import RecipeError, load_recipe

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

_QUALITY = {
    "c4_quality": "C4QualityFilter",
    "gopher_quality": "GopherQualityFilter",
    "gopher_repetition": "GopherRepetitionFilter",
    "fineweb_quality": "FineWebQualityFilter",
}


def stages(recipe: CorpusRecipe) -> list[Stage]:
    """What runs, in order; each stage needs all tasks of the one before."""
    from datatrove.pipeline.readers import JsonlReader

    from .corpus_report import WriteReport
    from .corpus_steps import Tally, TokenShards

    root = Path(recipe.output_dir).resolve()
    filtered, tasks = str(root / "work" / "filtered"), recipe.executor.tasks
    duplicates, without_duplicates = _minhash_stages(recipe, root) if recipe.minhash else ([], [])
    shards = TokenShards(str(root / "tokens"), recipe.tokenizer, recipe.heldout_share, recipe.shard_tokens)
    tokens = [JsonlReader(filtered), Tally("filtered"), *without_duplicates, shards]
    return [
        Stage("filter", _filter_pipeline(recipe, root), tasks),
        *duplicates,
        Stage("tokens", tokens, tasks),
        Stage("report", [WriteReport(str(root))], 1),
    ]


def _filter_pipeline(recipe: CorpusRecipe, root: Path) -> list["PipelineStep"]:
    from datatrove.pipeline.writers import JsonlWriter

    from .corpus_steps import CorpusReader, LinguaFilter, QualityFilter, Removed, Tally

    def removed(name: str) -> Removed:
        return Removed(str(root / "removed" / name), recipe.removed_examples)

    pipeline = [*(CorpusReader(source, recipe.data_dir) for source in recipe.sources), Tally("empty")]
    if recipe.language:
        language = recipe.language
        pipeline.append(LinguaFilter(language.keep, language.threshold, language.characters, removed("language")))
        pipeline.append(Tally("language"))
    for quality in recipe.quality:
        name = quality.name or quality.filter
        pipeline += [QualityFilter(name, quality_filter(quality), quality.skip, removed(name)), Tally(name)]
    return [*pipeline, JsonlWriter(str(root / "work" / "filtered"), compression="zstd")]


def quality_filter(quality: Quality) -> "PipelineStep":
    """datatrove's filter of a recipe entry.

    Raises:
        RecipeError: There is none of the name, or it has no such argument.
    """
    from datatrove.pipeline import filters

    from .corpus_steps import Words

    if quality.filter not in _QUALITY:
        raise RecipeError(f"quality: filter={quality.filter!r} is none of {', '.join(_QUALITY)}.")
    cls = getattr(filters, _QUALITY[quality.filter])
    known = set(inspect.signature(cls).parameters) - {"exclusion_writer", "language"}
    for key in quality.arguments:
        if key not in known:
            raise RecipeError(f"quality: {quality.filter} has no argument {key}; it has {', '.join(sorted(known))}.")
    return cls(**quality.arguments, language=Words())


def _minhash_stages(recipe: CorpusRecipe, root: Path) -> tuple[list[Stage], list["PipelineStep"]]:
    """datatrove's first three stages, and the fourth as steps of the stage that writes the shards."""
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import JsonlReader

    from .corpus_steps import OpenFiles, Removed, Tally, Words

    options = dataclasses.asdict(recipe.minhash)
    workers = options.pop("workers_per_bucket")
    config = minhash.MinhashConfig(**options)
    filtered, signatures, buckets, remove = (
        str(root / "work" / name) for name in ("filtered", "signatures", "buckets", "remove")
    )
    signing = [JsonlReader(filtered), minhash.MinhashDedupSignature(signatures, config, language=Words())]
    matching = [OpenFiles(), minhash.MinhashDedupBuckets(signatures, buckets, config=config)]
    clustering = [OpenFiles(), minhash.MinhashDedupCluster(buckets, remove, config=config)]
    excluded = Removed(str(root / "removed" / "minhash"), recipe.removed_examples)
    return [
        Stage("signatures", signing, recipe.executor.tasks),
        Stage("buckets", matching, config.num_buckets * workers),
        Stage("clusters", clustering, 1),
    ], [minhash.MinhashDedupFilter(remove, exclusion_writer=excluded), Tally("minhash")]


def prepare(recipe: CorpusRecipe) -> Path:
    """Runs all stages, or goes on where an earlier call with the same recipe stopped.

    Args:
        recipe: What to do.

    Returns:
        The folder of the shards. On Slurm its jobs are submitted when this returns, not finished.

    Raises:
        RecipeError: Before any work, for anything wrong with the recipe, its sources or the output folder; after the
            filters, if they left nothing.
        RuntimeError: A stage did not finish.
    """
    check(recipe)
    root = Path(recipe.output_dir).resolve()
    for name in run(recipe, executors(recipe, stages(recipe), job="corpus")):
        if name == "filter" and not any((root / "work" / "filtered").glob("*.jsonl.zst")):
            raise RecipeError(f"the filters left no document of any source; {root / 'removed'} holds examples.")
    return root / "tokens"


def main():
    arguments = command_line(
        "training.corpus",
        description="Corpus preparation for stage I: language, quality, near-duplicates, token shards and a report.",
        contents="tokens/train/SOURCE/*.parquet and tokens/heldout/SOURCE/*.parquet are the shards (column "
        "input_ids), tokens/corpus.json says what they hold",
    )
    recipe = load_recipe(CorpusRecipe, arguments.config, arguments.overrides)
    if arguments.dry_run:
        check(recipe)
        show(executors(recipe, stages(recipe), job="corpus"))
    else:
        announce(recipe, prepare(recipe), job="corpus", results="shards")


if __name__ == "__main__":
    # Imported here: tasks in processes of their own import this module too, and need no transformers.
    from .run import exit_on_recipe_error

    exit_on_recipe_error(main)
