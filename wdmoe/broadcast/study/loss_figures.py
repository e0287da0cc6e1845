"""The figure of the comparison of losses: fronts, leads over `sum` along them, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdmoe.broadcast.quality.front_comparison import FLOOR_DB, lead_along
from wdmoe.broadcast.study.loss_plan import KINDS, SNR_PAIRS_DB, START, loss_settings
from wdmoe.broadcast.study.loss_tables import REFERENCE, Results
from wdmoe.broadcast.study.region_figures import STYLE, save_figure
from wdmoe.broadcast.study.study import Fronts
from wdmoe.broadcast.training.learning_curve import AREA, psnr_column
from wdmoe.broadcast.training.training import Row

FIGURES = ("losses.png", "losses.svg")
_COLOURS = {"sum": "#1f77b4", "weighted": "#ff7f0e", "region": "#d62728", START: "#7f7f7f"}
_DASHES = {"different class": "-", "same class": ":"}
_CURVES = {
    AREA: f"hypervolume above {FLOOR_DB:g} dB, dB²",
    psnr_column(1, 0.5): "PSNR of user 1 at alpha 0.5, dB",
    psnr_column(2, 0.5): "PSNR of user 2 at alpha 0.5, dB",
}


def draw_losses(
    folder: Path, pictures: int, points: int, results: Results, curves: Mapping[str, Sequence[Row]]
) -> list[str]:
    """Write losses.png and losses.svg. Returns their names."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 12), layout="constrained")
        grid = figure.subplots(3, 3)
        settings = loss_settings(pictures, points)
        for column, snr_db in enumerate(SNR_PAIRS_DB):
            kinds: dict[str, Fronts] = {each.kind: results[each.name] for each in settings if each.snr_db == snr_db}
            title = f"{snr_db[0]:g} and {snr_db[1]:g} dB"
            _fronts(grid[0, column], f"{title}, {KINDS[0]}", kinds[KINDS[0]])
            _leads(grid[1, column], title, kinds)
        for axes, (name, label) in zip(grid[2], _CURVES.items(), strict=True):
            _curves(axes, curves, name, label)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return save_figure(figure, folder / "losses")


def _fronts(axes: Axes, title: str, fronts: Fronts) -> None:
    for system, front in fronts.items():
        means = front.psnr_db.astype(float).mean(axis=1)
        axes.plot(
            means[:, 0], means[:, 1], _line(system), color=_colour(system), marker="o", ms=3, lw=1.2, label=system
        )
    axes.set_title(title)
    axes.set_xlim(left=FLOOR_DB)
    axes.set_ylim(bottom=FLOOR_DB)
    axes.set_xlabel("PSNR of user 1, dB")
    axes.set_ylabel("PSNR of user 2, dB")
    axes.grid(alpha=0.3)


def _leads(axes: Axes, title: str, kinds: Mapping[str, Fronts]) -> None:
    for kind, fronts in kinds.items():
        for system in (each for each in fronts if each != REFERENCE):
            levels, lead = lead_along(fronts[system], fronts[REFERENCE])
            axes.plot(levels, lead, _DASHES[kind], color=_colour(system), lw=1.4, label=f"{system}, {kind}")
    axes.axhline(0, color=_colour(REFERENCE), lw=1)
    axes.set_title(f"{title}, lead over {REFERENCE} (dotted: same class)")
    axes.set_xlabel("PSNR of user 1, dB")
    axes.set_ylabel("user 2 has more by, dB")
    axes.grid(alpha=0.3)


def _curves(axes: Axes, curves: Mapping[str, Sequence[Row]], name: str, label: str) -> None:
    (start,) = curves[START]
    for system, rows in curves.items():
        if system == START:
            axes.axhline(start[name], ls="--", color=_colour(system), lw=1)
            continue
        own = [start, *rows]
        axes.plot([row["step"] for row in own], [row[name] for row in own], color=_colour(system), marker=".", lw=1.2)
    axes.set_title("learning curves, 10 and 5 dB")
    axes.set_xlabel("steps")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _colour(system: str) -> str:
    return _COLOURS.get(system, "#2ca02c")


def _line(system: str) -> str:
    return "--" if system == START else "-"
