"""A corpus of any size through a model, on Ray Data: parquet in, parquet with a column `embedding` out.

    python -m hub_repo.ray_embedding CORPUS --output FOLDER --model hub_repo/tiny --workers 2
    ray job submit --working-dir . -- python -m hub_repo.ray_embedding s3://BUCKET/CORPUS --output s3://BUCKET/OUT ...

Law: Ray gives every part to some actor at least once, `part_embedding` makes that exactly once. A killed actor is
replaced and its parts are given out again; after a killed driver the same command goes on. What passes through Ray are
the numbers of parts, never rows. Ends with 0, 2 for a wrong input, 1 for a failure that the same command may mend.
"""

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .corpus.parquet_parts import PART_ROWS, one_line
from .corpus.part_embedding import Job, Outcome, PartEmbedder, Settings, finish, open_output, plan
from .embedding.model_folder import Encoding
from .embedding.vector_files import DTYPES
from .folders.loading import quiet_transformers
from .requirements import require

_BLOCKS = 2000
"""Blocks of parts at most: of each, Ray keeps a few kilobytes."""
_LOCAL_STORE = 2**27
"""Bytes of the object store of a Ray started here, through which nothing but numbers goes."""


@dataclass(frozen=True)
class Cluster:
    """Where the workers run.

    Attributes:
        workers: How many at most; None is as many as there are resources for.
        cpus: Of a worker, which computes with as many threads.
        gpus: Of a worker; a share such as 0.5 puts several on one.
        address: Of a running Ray, as "auto"; None is that of `ray job submit` if there is one, else Ray is started
            here.
    """

    workers: int | None = None
    cpus: float = 1
    gpus: float = 0
    address: str | None = None


class Actor:
    """`PartEmbedder` in the form that `map_batches` calls."""

    def __init__(self, job: Job):
        self._embedder = PartEmbedder(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        """Numbers of parts -> their `Outcome`s, as columns."""
        outcomes = [asdict(self._embedder.make(int(number))) for number in batch["part"]]
        return {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}


def connect(cluster: Cluster) -> int:
    """Joins the running Ray or starts one here.

    Returns:
        The number of workers.

    Raises:
        ConnectionError: There is no Ray at the address.
        ImportError: Ray is missing.
        ValueError: No worker fits into the cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", "ray")
    require("ray.data", "ray")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
    else:
        cpus = None if cluster.workers is None else math.ceil(cluster.workers * cluster.cpus)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=_LOCAL_STORE, **quiet)
    there = ray.cluster_resources()
    fits = there.get("CPU", 0) / cluster.cpus
    if cluster.gpus:
        fits = min(fits, there.get("GPU", 0) / cluster.gpus)
    if fits < 1:
        raise ValueError(
            f"no worker of {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs fits into the {there.get('CPU', 0):g} CPUs "
            f"and {there.get('GPU', 0):g} GPUs of this Ray."
        )
    return int(fits) if cluster.workers is None else cluster.workers


def run(job: Job, cluster: Cluster, workers: int) -> Iterator[Outcome]:
    """Gives the parts out; see `connect` first.

    Args:
        job: With an open output.
        cluster: See there.
        workers: How many at most.

    Yields:
        What was done with each part, in the order in which they end.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # NOTE: Ray Data's defaults restart actors and repeat their tasks without a limit (-1 for both).
    # NOTE: items, not ray.data.range: a range is made by tasks that would wait for the CPUs that the actors hold.
    items = [{"part": part.number} for part in job.parts]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _BLOCKS)).map_batches(
        Actor,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus,
    )
    for row in dataset.iter_rows():
        yield Outcome(**row)


def embed(job: Job, description: dict, cluster: Cluster, *, id_column: str | None, quiet: bool) -> dict[str, Any]:
    """Makes all parts and checks them.

    Args:
        job: See `part_embedding.plan`.
        description: See there.
        cluster: Where the workers run.
        id_column: See there.
        quiet: Whether to say nothing of each part.

    Returns:
        The manifest.

    Raises:
        ValueError: An input or a model that cannot be used, as the first worker to meet it says.
        RuntimeError: Ray failed, or the folder does not hold every row once.
    """
    if job.parts:
        import ray

        try:
            workers = connect(cluster)
            for count, outcome in enumerate(run(job, cluster, workers), 1):
                if outcome.error:
                    raise ValueError(outcome.error)
                if not quiet:
                    how = "was there" if outcome.before else f"by process {outcome.pid}"
                    name = job.parts[outcome.part].name
                    say(f"{name}: {outcome.rows:,} rows, {how}; {count:,} of {len(job.parts):,} parts")
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()[-1]  # below the traceback
            raise RuntimeError(f"Ray: {cause}") from error
        finally:
            ray.shutdown()
    return finish(job, description, id_column=id_column)


def say(message: str):
    """One line on the standard error."""
    print(message, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hub_repo.ray_embedding", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="parquet files, or folders of them; also URIs such as s3://")
    add("--output", required=True, help="folder for the parts, or its URI; the same command goes on with them")
    add("--model", required=True, help="folder or Hub repository of a JinaBERT")
    add("--column", default="text", help="of the texts (text)")
    add("--id-column", help="a column that must not hold a value twice: checked before and after, in memory")
    add("--drop-text", action="store_true", help="leave the texts out of the output; all other columns go into it")
    add("--lenient", action="store_true", help="take null as the empty text and what is not UTF-8 as U+FFFD")
    add("--batch-size", type=int, default=32, help="texts computed together at most (32)")
    add("--max-length", type=int, help="tokens of a text at most; the rest is cut off and counted")
    add("--no-truncation", action="store_true", help="embed texts whole, however long")
    add("--no-normalize", action="store_true", help="do not scale vectors to length 1")
    add("--truncate-dim", type=int, help="keep the first dimensions only")
    add("--dtype", choices=DTYPES, default="float32", help="of the stored vectors (float32)")
    add("--model-dtype", choices=("float32", "float16", "bfloat16"), help="what the model computes in")
    add("--part-rows", type=int, default=PART_ROWS, help=f"rows of a part; a kill loses fewer ({PART_ROWS})")
    add("--workers", type=int, help="at most; as many as there are resources for by default")
    add("--cpus-per-worker", type=float, default=1.0)
    add("--gpus-per-worker", type=float, default=0.0)
    add("--address", help="of a running Ray, as auto; without it that of `ray job submit`, or Ray is started here")
    add("--overwrite", action="store_true", help="drop the parts that the folder holds")
    add("--quiet", action="store_true", help="errors and the last line only")
    return parser


def _settings(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[Settings, Cluster]:
    least = {"batch_size": 1, "max_length": 2, "truncate_dim": 1, "part_rows": 1, "workers": 1}
    for name, value in least.items():
        if (given := getattr(arguments, name)) is not None and given < value:
            parser.error(f"--{name.replace('_', '-')} {given} is less than {value}.")
    if arguments.cpus_per_worker <= 0 or arguments.gpus_per_worker < 0:
        parser.error("a worker has more than 0 CPUs and 0 or more GPUs.")
    if arguments.max_length is not None and arguments.no_truncation:
        parser.error("--max-length cuts texts and --no-truncation does not: give one of them.")
    encoding = Encoding(
        device="cuda" if arguments.gpus_per_worker else "cpu",
        model_dtype=arguments.model_dtype,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        truncation=not arguments.no_truncation,
        normalize=not arguments.no_normalize,
        truncate_dim=arguments.truncate_dim,
    )
    settings = Settings(
        arguments.model, encoding, column=arguments.column, dtype=arguments.dtype, keep_text=not arguments.drop_text,
        lenient=arguments.lenient, part_rows=arguments.part_rows,
    )  # fmt: skip
    cluster = Cluster(arguments.workers, arguments.cpus_per_worker, arguments.gpus_per_worker, arguments.address)
    return settings, cluster


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    settings, cluster = _settings(arguments, parser)
    quiet_transformers()
    start = time.monotonic()
    try:
        require("ray.data", "ray")
        job, description = plan(arguments.inputs, arguments.output, settings, id_column=arguments.id_column)
        open_output(job, description, overwrite=arguments.overwrite)
        manifest = embed(job, description, cluster, id_column=arguments.id_column, quiet=arguments.quiet)
    except (ValueError, ConnectionError, ImportError) as error:
        say(f"error: {one_line(error)}")
        return 2
    except (RuntimeError, OSError) as error:
        say(f"error: {one_line(error)}; the same command goes on with the parts that are done.")
        return 1
    except KeyboardInterrupt:
        return 130
    distinct = f", {arguments.id_column!r} distinct" if arguments.id_column else ""
    say(
        f"{arguments.output}: {manifest['rows']:,} rows of {job.rows:,}{distinct}, in {len(job.parts):,} parts; "
        f"{time.monotonic() - start:.1f} s"
    )
    for name, what in (("cut_texts", "were truncated"), ("lenient_texts", "were null or not UTF-8")):
        if manifest[name]:
            say(f"warning: {manifest[name]:,} texts {what}.")
    return 0


if __name__ == "__main__":
    # Under its own name, not __main__: the actors import the class that they are made of.
    from hub_repo.ray_embedding import main as _main

    sys.exit(_main())
