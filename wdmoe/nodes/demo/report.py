"""The table at the end of the demo, and its picture."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.terminal_theme import MONOKAI
from rich.text import Text

from wdmoe.errors import ConfigError
from wdmoe.nodes.demo.figures import Agreement, Figures, Run, agreement, figures
from wdmoe.units import format_quantity

PICTURE_COLUMNS = 110
_FONT_FACE = re.compile(r"@font-face \{.*?\n    \}\n", re.DOTALL)
_STAGES = (
    ("bs_compute", "base station computes"),
    ("wire_down", "wire down"),
    ("device_compute", "device computes"),
    ("wire_up", "wire up"),
    ("wait", "wait"),
)


def report(runs: Sequence[Run]) -> RenderableType:
    """Figures as rows, runs as columns, and how alike the answers are."""
    columns = [figures(run) for run in runs]
    table = Table("", *(run.plan.name for run in runs), box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("tokens per second", *(_number(each.tokens_per_s) for each in columns), style="bold")
    table.add_row("time to first token", *(_time(each.first_token_s) for each in columns))
    table.add_row("time per token, median", *(_time(each.token_latency_p50_s) for each in columns))
    table.add_row("time per token, 95 %", *(_time(each.token_latency_p95_s) for each in columns))
    table.add_row("to devices, per token", *(format_quantity(each.bytes_down_per_token, "size") for each in columns))
    table.add_row("from devices, per token", *(format_quantity(each.bytes_up_per_token, "size") for each in columns))
    table.add_row("gate weight dropped", *(f"{each.dropped_weight:.1%}" for each in columns))
    table.add_row("of that, lost", *(f"{each.lost_weight:.1%}" for each in columns))
    table.add_section()
    table.add_row("whole answer", *(_time(each.elapsed_s) for each in columns))
    for name, words in _STAGES:
        table.add_row(f"  {words}", *(_stage(each, name) for each in columns))
    notes = [Text(_sentence(agreement(runs[0], other))) for other in runs[1:]]
    return Group(table, *notes)


def save_picture(path: Path, parts: Sequence[RenderableType], title: str) -> None:
    """Write what was shown as an SVG image that loads nothing from elsewhere.

    Raises:
        ConfigError: the file cannot be written.
    """
    console = Console(record=True, width=PICTURE_COLUMNS, file=io.StringIO(), force_terminal=True)
    for part in parts:
        console.print(part)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_FONT_FACE.sub("", console.export_svg(title=title, theme=MONOKAI)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the picture {path}: {error.strerror or error}") from error


def _sentence(found: Agreement) -> str:
    return (
        f"{found.equal} of {found.of} tokens are the same in '{found.runs[0]}' and '{found.runs[1]}', "
        f"the first {found.same_start} in a row."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _time(value_s: float | None) -> str:
    return "-" if value_s is None else format_quantity(value_s, "time")


def _stage(found: Figures, name: str) -> str:
    spent_s = getattr(found.stages_s, name)
    return f"{format_quantity(spent_s, 'time')} ({spent_s / max(found.elapsed_s, 1e-9):4.0%})"
