"""Figures of a study, as PNG and SVG that come out the same on every run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wdmoe.simulation.statistics import Summary
from wdmoe.simulation.study import Study

STYLE: dict[Any, Any] = {"svg.hashsalt": "wdmoe", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "figure.dpi": 120}
_WIDTH_IN = 8.0


def draw_figures(study: Study, summaries: Sequence[Summary], folder: Path) -> list[Path]:
    """Write all figures. Returns the files."""
    with mpl.rc_context(STYLE):
        figures = {
            "latency": _latency(study, summaries),
            "distribution": _distribution(study),
            "dropped": _dropped(summaries),
        }
        return [file for name, figure in figures.items() for file in save_figure(figure, folder / name)]


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write one figure as PNG and SVG, without dates."""
    FigureCanvasAgg(figure)
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(files[0], metadata={"Software": None})
    figure.savefig(files[1], metadata={"Date": None})
    return files


def _unit(seconds: float) -> tuple[float, str]:
    """Factor and unit in which a latency is pleasant to read."""
    if not np.isfinite(seconds) or seconds >= 1:
        return 1.0, "s"
    return (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")


def _latency(study: Study, summaries: Sequence[Summary]) -> Figure:
    """Latency relative to the baseline's on the same draw, since a few deep fades can make the mean of seconds."""
    figure, axes = _axes(1.0 + 0.38 * len(summaries))
    places = np.arange(len(summaries))[::-1]
    means = [100 * (1 - np.nan_to_num(each.saving)) for each in summaries]
    halves = [100 * np.nan_to_num(each.saving_ci) for each in summaries]
    axes.barh(places, means, xerr=halves, color="#4c78a8", height=0.62, capsize=3)
    for place, each, mean, half in zip(places, summaries, means, halves, strict=True):
        factor, unit = _unit(each.median_s)
        text = f"{mean:.1f} ± {half:.1f} %, median {factor * each.median_s:.3g} {unit}"
        axes.annotate(text, (mean + half, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [each.variant for each in summaries])
    axes.set_xlim(0, 1.45 * max(m + h for m, h in zip(means, halves, strict=True)))
    tokens = study.scenario.model.tokens
    axes.set_xlabel(
        f"latency of {tokens} token{'s' * (tokens > 1)} through all layers, % of the first row's on the same draw\n"
        "(mean and its 95 % interval)"
    )
    axes.set_title(f"{study.scenario.name}: {study.scenario.draws} draws", loc="left")
    return figure


def _distribution(study: Study) -> Figure:
    """How latency is spread over draws."""
    latency = study.of("latency_s")
    finite = latency[np.isfinite(latency)]
    factor, unit = _unit(float(np.median(finite)) if finite.size else 1.0)
    figure, axes = _axes(4.5)
    for index, variant in enumerate(study.scenario.variants):
        values = np.sort(latency[:, index])
        share = np.arange(1, len(values) + 1) / len(values)
        style = ("-", "--", ":", "-.")[index // 10 % 4]
        axes.step(factor * values, share, style, where="post", label=variant.name, linewidth=1.5)
    axes.set_xscale("log")
    axes.set_xlabel(f"latency, {unit}")
    axes.set_ylabel("share of draws that are done")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _dropped(summaries: Sequence[Summary]) -> Figure:
    """What latency is paid with: gate weight that is not computed."""
    figure, axes = _axes(4.5)
    for index, each in enumerate(summaries):
        look = {"marker": "os^Dv<>PX*"[index % 10], "color": f"C{index % 10}", "linestyle": ""}
        axes.plot(100 * each.dropped_weight, 100 * (1 - each.saving), label=each.variant, **look)
    axes.set_xlabel("gate weight that is dropped, %")
    axes.set_ylabel("latency, % of the baseline's on the same draw")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _axes(height_in: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    return figure, figure.add_subplot()
