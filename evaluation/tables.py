"""Records as a table, on the terminal and in Markdown.

Law: one row a set and measure, one column a system; a score carries its interval.
"""

import sys
from collections.abc import Sequence
from typing import Any

from .metrics import MEASURES

try:
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise ImportError("evaluation.tables needs: pip install -e '.[evaluate]'") from error

LOG_WIDTH = 200  # characters

Column = tuple[str, int | None]  # model, tokens a text is cut at


def column_of(record: dict[str, Any]) -> Column:
    """The column of a record."""
    return record["model"], record["settings"].get("max_length")


def column_title(column: Column) -> str:
    """Heading of a column.

    Example:
        >>> column_title(("all-MiniLM-L6-v2", 256))
        'all-MiniLM-L6-v2 (256 tokens)'
    """
    name, limit = column
    return name if limit is None else f"{name} ({limit} tokens)"


def size_text(record: dict[str, Any]) -> str:
    """How large the set of a record is, and whether it was cut.

    Example:
        >>> size_text({"sizes": {"queries": 3, "documents": 4}, "protocol": {"max_texts": 4, "cut_from": {}}})
        '3 x 4 (cut)'
    """
    sizes = record["sizes"]
    if "pairs" in sizes:
        text = f"{sizes['pairs']} pairs"
    elif "texts" in sizes:
        text = f"{sizes['texts']} texts, {sizes['labels']} labels"
    else:
        text = f"{sizes['queries']} x {sizes['documents']}"
    return f"{text} (cut)" if "cut_from" in record.get("protocol", {}) else text


def cell(record: dict[str, Any], measure: str) -> str:
    """A score to three decimals with its interval; "-": undefined.

    Example:
        >>> cell({"metrics": {"ap": 0.5}, "intervals": {"ap": [0.45, 0.56]}}, "ap")
        '0.500 [0.450, 0.560]'
    """
    value = record["metrics"][measure]
    interval = record.get("intervals", {}).get(measure)
    if value is None:
        return "-"
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def table_rows(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """One row a set and measure, one column a system.

    Args:
        records: Of `evaluation.local`.

    Returns:
        The header, and the rows: set, its size, measure, and the cells.
    """
    columns = list(dict.fromkeys(column_of(record) for record in records))
    header = ["set", "queries x documents", "measure", *map(column_title, columns)]
    cells: dict[tuple[str, str, str], dict[Column, str]] = {}
    for record in records:
        for measure in record["metrics"]:
            row = cells.setdefault((record["set"], size_text(record), MEASURES[measure]), {})
            row[column_of(record)] = cell(record, measure)
    return header, [[*row, *(found.get(column, "") for column in columns)] for row, found in cells.items()]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 3) -> str:
    """The table in Markdown, the columns behind the first `names` aligned to the right.

    Example:
        >>> print(markdown_table(["set", "size", "measure", "bm25"], [["ir/A", "9 x 70", "MRR@10", "0.5"]]), end="")
        | set | size | measure | bm25 |
        |---|---|---|---:|
        | ir/A | 9 x 70 | MRR@10 | 0.5 |
    """
    rule = "|" + "---|" * names + "---:|" * (len(header) - names)
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 3, title: str | None = None):
    """Prints the table; what is before the measure once for the measures of a set."""
    table = Table(title=title)
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position < names else "right", overflow="fold")
    previous = None
    for row in rows:
        if previous is not None and row[0] != previous:
            table.add_section()
        table.add_row(*(["", *([""] * (names - 2)), *row[names - 1 :]] if row[0] == previous else row))
        previous = row[0]
    # A pipe or a log has no width of its own, and rich would take 80 columns.
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)
