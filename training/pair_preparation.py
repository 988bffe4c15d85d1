"""Preparation of text pairs as in Jina Embeddings v1: duplicates, language, consistency; with a report of what went.

    python -m training.pair_preparation --config training/recipes/pairs-preparation.yaml data_dir=DATA output_dir=PAIRS

Law: the same stages of datatrove run on one machine, on Slurm or on Ray, as the recipe's `executor` says; a run that
was killed goes on with the tasks that had not finished. The result depends on the pairs and the seed alone, not on
their order; the number of tasks changes how texts share batches, hence vectors by 1e-7.
COST: the pairs lie on disk once as read (`work/read`), once as cleaned (`clean`) and as kept (`pairs`). In memory: a
bucket of signatures, or the vectors of the pool; see `pair_filters`, `consistency`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .executors import Stage, executors, run
from .pair_recipe import PairRecipe, check
from .preparation import announce, command_line, show
from .recipe import RecipeError, load_recipe

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from .pair_filters import RemovedPairs


def stages(recipe: PairRecipe) -> list[Stage]:
    """What runs, in order; each stage needs all tasks of the one before."""
    from .pair_filters import FindDuplicates
    from .pair_report import WriteReport

    root = Path(recipe.output_dir).resolve()
    tasks = recipe.executor.tasks
    find = FindDuplicates(str(root / "work" / "signatures"), str(root / "work" / "duplicates"))
    return [
        Stage("read", _read_pipeline(recipe, root), tasks),
        Stage("duplicates", [find], recipe.buckets),
        Stage("clean", _clean_pipeline(recipe, root), tasks),
        *(_consistency_stages(recipe, root) if recipe.consistency else []),
        Stage("report", [WriteReport(str(root))], 1),
    ]


def _removed(recipe: PairRecipe, root: Path, step: str) -> "RemovedPairs":
    from .pair_filters import RemovedPairs

    return RemovedPairs(str(root / "removed" / step), recipe.removed_examples)


def _read_pipeline(recipe: PairRecipe, root: Path) -> list["PipelineStep"]:
    from .corpus_steps import Tally
    from .pair_filters import PairFiles, PairReader, PairRule, Signatures, is_different, is_filled

    pipeline = [PairReader(source, recipe.data_dir) for source in recipe.sources]
    for name, keeps in (("empty", is_filled), ("identical", is_different)):
        pipeline += [PairRule(name, keeps, _removed(recipe, root, name)), Tally(name)]
    names = [source.name for source in recipe.sources]
    signatures = Signatures(str(root / "work" / "signatures"), names, recipe.buckets)
    return [*pipeline, signatures, PairFiles(str(root / "work" / "read"))]


def _clean_pipeline(recipe: PairRecipe, root: Path) -> list["PipelineStep"]:
    from .consistency import HashedTexts
    from .corpus_steps import Tally
    from .pair_filters import DuplicateFilter, PairFiles, PairLanguageFilter, StoredPairs

    stored = StoredPairs(str(root / "work" / "read"), [source.name for source in recipe.sources])
    duplicates = DuplicateFilter(str(root / "work" / "duplicates"), _removed(recipe, root, "duplicate"))
    pipeline = [stored, Tally("read"), duplicates, Tally("duplicate")]
    if recipe.language:
        pipeline += [PairLanguageFilter(recipe.language, _removed(recipe, root, "language")), Tally("language")]
    if recipe.consistency:
        pipeline.append(HashedTexts(str(root / "work" / "hashes"), recipe.seed))
    return [*pipeline, PairFiles(str(root / ("clean" if recipe.consistency else "pairs")))]


def _consistency_stages(recipe: PairRecipe, root: Path) -> list[Stage]:
    from .consistency import Choose, ConsistencyFilter, EmbedPool, SampleFilter
    from .corpus_steps import Tally
    from .pair_filters import PairFiles, StoredPairs

    consistency, tasks = recipe.consistency, recipe.executor.tasks
    hashes, chosen, pool = (str(root / "work" / name) for name in ("hashes", "chosen", "pool"))
    stored = StoredPairs(str(root / "clean"), [source.name for source in recipe.sources])
    judging: list[PipelineStep] = [stored, Tally("clean")]
    if consistency.pairs_per_source:
        judging += [SampleFilter(chosen, recipe.seed, _removed(recipe, root, "sample")), Tally("sample")]
    removed = _removed(recipe, root, "consistency")
    judging += [ConsistencyFilter(pool, consistency, recipe.seed, removed), Tally("consistency")]
    return [
        Stage("choose", [Choose(hashes, chosen, consistency.pool, consistency.pairs_per_source)], 1),
        Stage("pool", [stored, EmbedPool(chosen, pool, consistency, recipe.seed)], tasks),
        Stage("consistency", [*judging, PairFiles(str(root / "pairs"))], tasks),
    ]


def prepare(recipe: PairRecipe) -> Path:
    """Runs all stages, or goes on where an earlier call with the same recipe stopped.

    Args:
        recipe: What to do.

    Returns:
        The folder of the pairs. On Slurm its jobs are submitted when this returns, not finished.

    Raises:
        RecipeError: Before any work, for anything wrong with the recipe, its sources, its teacher or the output
            folder; during it, for a row that cannot be read or holds something else than text, and if nothing is left.
        RuntimeError: A stage did not finish.
    """
    check(recipe)
    root = Path(recipe.output_dir).resolve()
    for stage in run(recipe, executors(recipe, stages(recipe), job="pairs")):
        folder = root / ("clean" if recipe.consistency else "pairs")
        if stage == "clean" and not any(folder.glob("*/*.parquet")):
            raise RecipeError(f"no pair of any source is left; {root / 'removed'} holds examples.")
    return root / "pairs"


def main():
    arguments = command_line(
        "training.pair_preparation",
        description="Preparation of text pairs for stage II: duplicates, language, consistency, and a report.",
        contents="pairs/SOURCE/*.parquet (columns query, positive) are what training.pairs reads, clean/ the same "
        "before the consistency filter",
    )
    recipe = load_recipe(PairRecipe, arguments.config, arguments.overrides)
    if arguments.dry_run:
        check(recipe)
        show(executors(recipe, stages(recipe), job="pairs"))
    else:
        announce(recipe, prepare(recipe), job="pairs", results="pairs")


if __name__ == "__main__":
    # Imported here: tasks in processes of their own import this module too, and need no transformers.
    from .run import exit_on_recipe_error

    exit_on_recipe_error(main)
