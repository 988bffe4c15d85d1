"""What the commands share: the options that say how models are loaded, and how a command ends.

Law: a wrong input ends a command with one line and status 2, Ctrl-C with one line that says how to go on and status
130; neither with a traceback.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .loading import DTYPES, Placement
from .set_types import EvaluationError


def add_placement(parser: argparse.ArgumentParser, *, dtype: bool = True):
    """Adds --device, --revision and, where it is wanted, --dtype."""
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--revision", help="commit, branch or tag of the Hub repository of --model")
    if dtype:
        parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of --model; baselines stay in float32")


def placement_of(arguments: argparse.Namespace) -> Placement:
    """What the options of `add_placement` say.

    Raises:
        EvaluationError: No such device; --revision without a model, or with several.
    """
    models = [arguments.model] if isinstance(arguments.model, str) else arguments.model or []
    if arguments.revision is not None and len(set(models)) != 1:
        raise EvaluationError(f"--revision {arguments.revision}: is of one --model, there are {len(set(models))}.")
    placement = Placement(arguments.device, getattr(arguments, "dtype", DTYPES[0]), arguments.revision)
    return Placement(placement.torch_device, placement.dtype, placement.revision)


@contextmanager
def ending(output: Path | None) -> Iterator[None]:
    """Ends the process as the law says.

    Args:
        output: From which the same command goes on; None where it begins anew.
    """
    try:
        yield
    except (EvaluationError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        goes_on = "begins anew" if output is None else f"goes on from {output}"
        print(f"interrupted; the same command {goes_on}", file=sys.stderr)
        sys.exit(130)
