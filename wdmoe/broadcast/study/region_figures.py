"""Figures of the comparison, as PNG and SVG that come out the same on every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wdmoe.broadcast.baselines.classical_fading import TOLD_BLOCKS
from wdmoe.broadcast.quality.front_comparison import FLOOR_DB, Standing, standings
from wdmoe.broadcast.quality.pareto_front import Front
from wdmoe.broadcast.study.study import JOINT, MAIN_CBR, SINGLE, SNR_PAIRS_DB, Fronts, Setting, main_settings

STYLE: dict[Any, Any] = {"svg.hashsalt": "wdmoe", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "figure.dpi": 120}

_COLOURS = {JOINT: "#d62728", SINGLE: "#1f77b4", "AVIF": "#2ca02c", "HEVC intra": "#9467bd", "JPEG 2000": "#8c564b"}
_LABELS = {"psnr_db": "PSNR of user {}, dB", "ssim": "SSIM of user {}", "ms_ssim": "MS-SSIM of user {}"}

Grid = Mapping[str, Fronts]  # by title of the panel


def draw_all(folder: Path, settings: Sequence[Setting], results: Mapping[str, Fronts], photos: Grid) -> list[str]:
    """Write every figure that the settings have the points for. Returns the names of the files."""
    most = max(each.pictures for each in settings)
    main = {str(each.kind): results[each.name] for each in main_settings(most)}
    few = min(each.pictures for each in settings)
    swept = [each for each in settings if each.pictures == few]
    made: list[str] = []
    with mpl.rc_context(STYLE):
        for quality in ("psnr_db", "ssim"):
            made += save_figure(regions(main, quality), folder / f"regions-{_short(quality)}")
        for kind in dict.fromkeys(each.kind for each in swept):
            panels = {
                f"{each.snr_db[0]:g} and {each.snr_db[1]:g} dB": results[each.name]
                for each in swept
                if each.kind == kind and each.cbr == MAIN_CBR and each.csi_error is None and each.snr_db in SNR_PAIRS_DB
            }
            made += save_figure(regions(panels, "psnr_db"), folder / f"snr-pairs-{kind.replace(' ', '-')}")
        made += save_figure(areas({kind: standings(fronts) for kind, fronts in main.items()}), folder / "hypervolumes")
        for name, about, place in _SWEEPS:
            chosen = [each for each in swept if about(each)]
            if len({place(each) for each in chosen}) > 1:
                made += save_figure(sweep_of(name, chosen, results, place), folder / f"sweep-{name}")
        for quality in ("psnr_db", "ssim", "ms_ssim"):
            if photos:
                made += save_figure(regions(photos, quality), folder / f"photographs-{_short(quality)}")
    return made


def regions(panels: Grid, quality: str) -> Figure:
    """One panel a setting: both users' means, the points of each system joined."""
    figure, grid = _panels(len(panels))
    for axes, (title, fronts) in zip(grid, panels.items(), strict=True):
        for system, front in fronts.items():
            _region(axes, system, front, quality)
        axes.set_title(title)
        axes.set_xlabel(_LABELS[quality].format(1))
        axes.set_ylabel(_LABELS[quality].format(2))
        if quality == "psnr_db":
            axes.set_xlim(left=FLOOR_DB)
            axes.set_ylim(bottom=FLOOR_DB)
        axes.grid(alpha=0.3)
    _legend(figure, grid)
    return figure


def areas(panels: Mapping[str, Mapping[str, Standing]]) -> Figure:
    """Hypervolumes with their 95 % intervals as bars."""
    figure = Figure(figsize=(4.2 * len(panels) + 1.5, 4.2), layout="constrained")
    for number, (title, stood) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        names = list(stood)
        values = [stood[name].area for name in names]
        errors = np.array([(each.value - each.low, each.high - each.value) for each in values]).T
        places = np.arange(len(names))[::-1]
        colours = [_colour(name) for name in names]
        axes.barh(places, [each.value for each in values], xerr=errors, color=colours, height=0.62, capsize=3)
        axes.set_yticks(places, names)
        axes.set_title(title)
        axes.set_xlabel(f"hypervolume above {FLOOR_DB:g} dB, dB²")
        axes.grid(axis="x", alpha=0.3)
    return figure


def sweep_of(
    name: str, settings: Sequence[Setting], results: Mapping[str, Fronts], place: Callable[[Setting], float]
) -> Figure:
    """Hypervolume and PSNR at equal quality along a sweep, one row of panels for each kind of pairs."""
    kinds = list(dict.fromkeys(each.kind for each in settings))
    figure, grid = _panels(2 * len(kinds), columns=2)
    for row, kind in enumerate(kinds):
        own = sorted((each for each in settings if each.kind == kind), key=place)
        stood = [standings(results[each.name]) for each in own]
        for axes, measure in zip(grid[2 * row : 2 * row + 2], ("area", "equal_db"), strict=True):
            _sweep_panel(axes, [place(each) for each in own], stood, measure)
            axes.set_title(kind)
            axes.set_xlabel(_PLACES[name])
            axes.set_ylabel("hypervolume, dB²" if measure == "area" else "PSNR of both at equal quality, dB")
    _legend(figure, grid)
    return figure


def _sweep_panel(axes: Axes, places: Sequence[float], stood: Sequence[Mapping[str, Standing]], measure: str) -> None:
    for system in stood[0]:
        values = [getattr(each[system], measure) for each in stood if system in each]
        if len(values) < len(places):
            continue
        colour, line = _colour(system), _line(system)
        axes.plot(places, [each.value for each in values], line, color=colour, marker="o", ms=3, label=system)
        axes.fill_between(
            places, [each.low for each in values], [each.high for each in values], color=colour, alpha=0.1, lw=0
        )
    axes.set_xticks(list(places), [f"{place:.3g}" for place in places])
    axes.grid(alpha=0.3)


def _region(axes: Axes, system: str, front: Front, quality: str) -> None:
    means = getattr(front, quality).astype(float).mean(axis=1)
    width = 2.2 if system == JOINT else 1.2
    axes.plot(means[:, 0], means[:, 1], _line(system), color=_colour(system), lw=width, marker="o", ms=3, label=system)


def _colour(system: str) -> str:
    return next((colour for name, colour in _COLOURS.items() if system.startswith(name)), "#7f7f7f")


def _line(system: str) -> str:
    if TOLD_BLOCKS in system:
        return ":" if system.endswith("time division") else "-."
    if system.endswith("time division"):
        return "--"
    return ":" if "subtracting" in system else "-"


def _panels(count: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    columns = 2 if count == 4 else min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.9 * rows + 0.9), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _legend(figure: Figure, grid: Sequence[Axes]) -> None:
    found: dict[str, Artist] = {}
    for axes in grid:
        found |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=3, fontsize=8)


def save_figure(figure: Figure, stem: Path) -> list[str]:
    """As `stem`.png and `stem`.svg. Returns the names of the files."""
    FigureCanvasAgg(figure)
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    figure.savefig(png, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None})
    return [png.name, svg.name]


def _short(quality: str) -> str:
    return quality.removesuffix("_db").replace("_", "-")


_PLACES = {"gap": "gap of the SNRs around 10 dB, dB", "cbr": "channel uses per value (CBR)", "csi": "CSI error"}
_SWEEPS: tuple[tuple[str, Callable[[Setting], bool], Callable[[Setting], float]], ...] = (
    (
        "gap",
        lambda each: each.csi_error is None and sum(each.snr_db) == 20 and each.kind == "different class",
        lambda each: each.snr_db[0] - each.snr_db[1],
    ),
    ("cbr", lambda each: each.csi_error is None and each.snr_db == (10.0, 5.0), lambda each: each.cbr),
    ("csi", lambda each: each.csi_error is not None, lambda each: each.csi_error or 0.0),
)
