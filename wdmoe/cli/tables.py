"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_FILE_WIDTH = 160  # characters of a line where no terminal sets a limit


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: int | None = None) -> None:
    """Print rows under their columns; a None is a dash, columns from `right` on are aligned at their right.

    Cells may come from other machines: what would steer a terminal is left out.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD)
    for column in table.columns[len(columns) if right is None else right :]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(Text("-" if cell is None else printable(str(cell))) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(table)


def printable(text: str) -> str:
    """The text without control characters."""
    return "".join(character for character in text if character.isprintable())
