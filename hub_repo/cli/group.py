"""How every verb of `jina-bert` ends: its status, and one line on the standard error for what went wrong."""

import os
import signal
import sys

import typer
from typer.core import TyperGroup

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE, which not every system names
FAILED = 2

# typer carries its own click today and used to import that package: the class is found, not named.
_UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Group(TyperGroup):
    """The verbs; what one returns is the status."""

    def main(self, *args, standalone_mode: bool = True, **options):
        """Leaves with the status; a wrong command line is one line."""
        try:
            status = super().main(*args, standalone_mode=False, **options)
        except _UsageError as error:
            if message := error.format_message().replace("\n", " "):  # none where the help was printed instead
                fail(message)
            status = FAILED
        except typer.Abort:
            status = INTERRUPTED
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx):
        """Runs the verb."""
        try:
            status = super().invoke(ctx)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # Nobody reads on; without this the interpreter would complain when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except (typer.Exit, typer.Abort):  # they are RuntimeErrors
            raise
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if ctx.params["traceback"]:
                raise
            fail(str(error) or type(error).__name__)
            return FAILED


def fail(message: str):
    """Says what is wrong."""
    print(f"error: {message}", file=sys.stderr)
