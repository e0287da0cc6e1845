"""The table at the end of the demo, and its picture."""

from __future__ import annotations

import io
import math
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
from wdmoe.nodes.demo.phases import Phases
from wdmoe.nodes.demo.plan import RunPlan
from wdmoe.nodes.demo.verdict import verdict
from wdmoe.units import format_quantity

PICTURE_COLUMNS = 110
_PICTURE_LINES = 100
_FONT_FACE = re.compile(r"@font-face \{.*?\n    \}\n", re.DOTALL)
_STAGES = (
    ("bs_compute", "base station computes"),
    ("wire_down", "wire down"),
    ("device_compute", "device computes"),
    ("wire_up", "wire up"),
    ("wait", "wait"),
)


def report(runs: Sequence[Run], phases: Phases | None = None) -> RenderableType:
    """Figures as rows, runs as columns; how alike the answers are, where the time went, and what was won."""
    columns = [figures(run) for run in runs]
    table = Table("", *(run.plan.name for run in runs), box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("whole answer", *(_time(each.answer_s) for each in columns), style="bold")
    table.add_row("tokens per second", *(_number(each.tokens_per_s) for each in columns))
    table.add_row("time to first token", *(_time(each.first_token_s) for each in columns))
    table.add_row("time per token, median", *(_time(each.token_latency_p50_s) for each in columns))
    table.add_row("time per token, 95 %", *(_time(each.token_latency_p95_s) for each in columns))
    if any(each.perplexity for each in columns):
        table.add_row("perplexity, held-out text", *(_number(each.perplexity, 2) for each in columns), style="bold")
    table.add_row("gate weight dropped", *(f"{each.dropped_weight:.1%}" for each in columns))
    table.add_row("of that, lost", *(f"{each.lost_weight:.1%}" for each in columns))
    if len(runs) > 1:
        table.add_row("tokens as in column 1", "", *(_alike(agreement(runs[0], other)) for other in runs[1:]))
    table.add_row("to devices, per token", *(format_quantity(each.bytes_down_per_token, "size") for each in columns))
    table.add_row("from devices, per token", *(format_quantity(each.bytes_up_per_token, "size") for each in columns))
    table.add_section()
    table.add_row("at the base station", *(_time(each.elapsed_s) for each in columns))
    for name, words in _STAGES:
        table.add_row(f"  {words}", *(_stage(each, name) for each in columns))
    lines = [_radio(runs[0].plan)] if runs[0].plan.bandwidth_hz else []
    lines += _spent(phases) if phases else []
    last = verdict(runs)
    return Group(table, *(Text(f"{line}\n") for line in lines), *([Text(last, "bold green")] if last else []))


def save_picture(path: Path, parts: Sequence[RenderableType], title: str) -> None:
    """Write what was shown as an SVG image that loads nothing from elsewhere.

    Raises:
        ConfigError: the file cannot be written.
    """
    # With a height, or rich takes 80 columns where $TERM is "dumb".
    console = Console(
        record=True, width=PICTURE_COLUMNS, height=_PICTURE_LINES, file=io.StringIO(), force_terminal=True
    )
    for part in parts:
        console.print(part)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_FONT_FACE.sub("", console.export_svg(title=title, theme=MONOKAI)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the picture {path}: {error.strerror or error}") from error


def _alike(found: Agreement) -> str:
    return f"{found.equal} of {found.of}, first {found.same_start}"


def _radio(plan: RunPlan) -> str:
    snr_db = sorted(10 * math.log10(link.downlink_snr_hz / plan.bandwidth_hz) for link in plan.links)
    return (
        f"All columns over one emulated radio: {format_quantity(plan.bandwidth_hz, 'frequency')} shared by "
        f"{len(plan.links)} devices, SNR from {snr_db[0]:.0f} to {snr_db[-1]:.0f} dB if one had it all."
    )


def _spent(phases: Phases) -> list[str]:
    spent = ", ".join(f"{name} {format_quantity(spent_s, 'time')}" for name, spent_s in phases.spent_s.items())
    seen = phases.first_token_s
    first = "" if seen is None else f"First token in sight after {format_quantity(seen, 'time')}. "
    return [f"{first}Where the time went: {spent}; in all {format_quantity(phases.total_s, 'time')}."]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _time(value_s: float | None) -> str:
    return "-" if value_s is None else format_quantity(value_s, "time")


def _stage(found: Figures, name: str) -> str:
    spent_s = getattr(found.stages_s, name)
    return f"{format_quantity(spent_s, 'time')} ({spent_s / max(found.elapsed_s, 1e-9):4.0%})"
