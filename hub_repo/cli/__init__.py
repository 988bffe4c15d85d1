"""The command `jina-bert`: every verb of the project.

    jina-bert --help
    python -m hub_repo.cli --help    # the same, from the repository

Law: a wrong input ends with one line on the standard error and status 2, an interruption (Ctrl-C) with 130 and a
closed pipe with 141, as shells have it; a check or a delegated program that fails, with 1. `--traceback`, or the
variable JINA_BERT_TRACEBACK, shows where an error comes from. A verb imports what it needs when it runs: `--help`
loads no torch.
"""

import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from ..requirements import require

_HELP: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": "markdown", "pretty_exceptions_enable": False}


def application():
    """The application, a `typer.Typer`.

    Raises:
        ImportError: A package of the extra `cli` is missing.
    """
    typer = require("typer", "cli")
    require("rich", "cli")
    from . import chunk, delegate, encode, folder, search
    from .group import Group

    app = typer.Typer(
        name="jina-bert",
        cls=Group,
        help="Jina Embeddings v2: embed, search, convert, train and evaluate.",
        context_settings={"help_option_names": ["--help", "-h"]},
        **_HELP,
    )

    def show_version(wanted: bool):
        if wanted:
            print(f"jina-bert {version('modeling-jina-bert')}")
            raise typer.Exit()

    @app.callback()
    def settings(
        traceback: bool = typer.Option(
            False, "--traceback", envvar="JINA_BERT_TRACEBACK", help="Show where an error comes from."
        ),
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version and exit."
        ),
    ):
        logging.basicConfig(format="%(message)s")

    searches = typer.Typer(help="Search texts by meaning: build an index, query it.", **_HELP)
    _add(app, encode.encode, encode.EXAMPLE)
    _add(app, chunk.chunk, chunk.EXAMPLE)
    app.add_typer(searches, name="search")
    _add(searches, search.build, search.BUILD_EXAMPLE)
    _add(searches, search.query, search.QUERY_EXAMPLE)
    for name, example in folder.EXAMPLES.items():
        _add(app, getattr(folder, name), f"Example: {example}")
    for name, example in delegate.EXAMPLES.items():
        _add(app, getattr(delegate, name), f"Example: {example}", delegate.PASS_THROUGH)
    return app


def _add(app, verb: Callable, example: str, settings: dict[str, Any] | None = None):
    from .group import Verb

    app.command(verb.__name__, cls=Verb, epilog=example, context_settings=settings)(verb)


def main():
    """Entry point."""
    try:
        app = application()
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="jina-bert")
