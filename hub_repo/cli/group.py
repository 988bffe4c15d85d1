"""How every verb of `jina-bert` ends: its status, and one line on the standard error for what went wrong."""

import os
import signal
import sys
from collections import Counter

import typer
from typer.core import TyperCommand, TyperGroup

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE, which not every system names
FAILED = 2
_EXPECTED = (ValueError, OSError, RuntimeError, ImportError)
"""What bad input raises, with a message that says all; of any other error the type is a part of what went wrong."""

# typer carries its own click today and used to import that package: the class is found, not named.
_UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class ProgramFailure(RuntimeError):
    """A program that a verb runs failed, with the status 1; the message names it."""


class Verb(TyperCommand):
    """A command line that names an option twice is refused: of two values one would be lost silently."""

    def parse_args(self, ctx, args):
        """Parses as before, after a look at what is there."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, times in Counter(given).items():
            if times > 1 and parameter.param_type_name == "option" and not parameter.multiple:
                ctx.fail(f"{max(parameter.opts, key=len)} is there {times} times: give it once.")
        return super().parse_args(ctx, args)


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
        except (typer.Exit, typer.Abort, _UsageError):  # not errors of the verb: `main` sees to them
            raise
        except Exception as error:
            if ctx.params["traceback"]:
                raise
            fail(in_one_line(error))
            return 1 if isinstance(error, ProgramFailure) else FAILED


def in_one_line(error: Exception) -> str:
    """What an error says.

    Example:
        >>> in_one_line(ValueError("no\\nline")), in_one_line(KeyError("text")), in_one_line(MemoryError())
        ('no line', "KeyError: 'text'", 'MemoryError')
    """
    message = " ".join(str(error).split())
    if message and isinstance(error, _EXPECTED):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def fail(message: str):
    """Says what is wrong."""
    print(f"error: {message}", file=sys.stderr)
