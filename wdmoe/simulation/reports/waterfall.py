"""Latency beside quality: what each step of a scenario saves, and what it costs the model. A table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from wdmoe.simulation.figures import STYLE, save_figure
from wdmoe.simulation.statistics import Summary, records_text

if TYPE_CHECKING:
    from wdmoe.simulation.quality import Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One variant. Times are of the simulated draws, quality of the model; `_ci` is half a 95 % interval."""

    variant: str
    latency_s: float
    latency_ci_s: float
    median_s: float  # fading has heavy tails: a single draw can make the mean
    saving: float  # share of the baseline's latency, paired draw by draw
    saving_ci: float
    dropped_weight: float
    perplexity: float
    perplexity_ratio: float  # to the baseline's, paired window by window
    perplexity_ratio_low: float
    perplexity_ratio_high: float
    accuracy: float  # by likelihood, 0 to 1; NaN without questions
    accuracy_ci: float
    accuracy_change: float  # against the baseline, paired question by question
    accuracy_change_ci: float
    normalised: float  # by likelihood for each byte
    normalised_ci: float


def steps(summaries: Sequence[Summary], found: Sequence[Quality]) -> list[Step]:
    """Both halves of each variant.

    Args:
        summaries, found: the same variants in the same order.
    """
    return [_step(summary, quality) for summary, quality in zip(summaries, found, strict=True)]


def save_waterfall(made: Sequence[Step], title: str, folder: Path) -> list[str]:
    """Write waterfall.csv, .md, .png and .svg. Returns their names."""
    (folder / "waterfall.csv").write_text(records_text(Step, made), encoding="utf-8")
    (folder / "waterfall.md").write_text(markdown(made, title), encoding="utf-8")
    with mpl.rc_context(STYLE):
        files = save_figure(_figure(made, title), folder / "waterfall")
    return ["waterfall.csv", "waterfall.md", *(file.name for file in files)]


def markdown(made: Sequence[Step], title: str) -> str:
    """A table to be put into a document."""
    asked = any(np.isfinite(each.accuracy) for each in made)
    columns = ["variant", "mean latency", "median", "saved, %", "perplexity", "times baseline"]
    columns += ["accuracy, %", "change", "by bytes, %"] if asked else []
    lines = [
        f"{title}; ± and ranges are 95 % intervals",
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
    ]
    for number, each in enumerate(made):
        cells = [each.variant, f"{_time(each.latency_s)} ± {_time(each.latency_ci_s)}", _time(each.median_s)]
        cells.append(_percent(each.saving, each.saving_ci) if number else "baseline")
        low, high = each.perplexity_ratio_low, each.perplexity_ratio_high
        cells.append(f"{each.perplexity:.2f}")
        cells.append(f"{each.perplexity_ratio:.4f} ({low:.4f} to {high:.4f})" if number else "baseline")
        if asked:
            cells.append(_percent(each.accuracy, each.accuracy_ci))
            cells.append(_percent(each.accuracy_change, each.accuracy_change_ci) if number else "baseline")
            cells.append(_percent(each.normalised, each.normalised_ci))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _step(summary: Summary, quality: Quality) -> Step:
    return Step(
        variant=summary.variant,
        latency_s=summary.latency_s,
        latency_ci_s=summary.latency_ci_s,
        median_s=summary.median_s,
        saving=summary.saving,
        saving_ci=summary.saving_ci,
        dropped_weight=summary.dropped_weight,
        perplexity=quality.perplexity,
        perplexity_ratio=quality.ratio,
        perplexity_ratio_low=quality.ratio_low,
        perplexity_ratio_high=quality.ratio_high,
        accuracy=quality.accuracy,
        accuracy_ci=quality.accuracy_ci,
        accuracy_change=quality.accuracy_change,
        accuracy_change_ci=quality.accuracy_change_ci,
        normalised=quality.normalised,
        normalised_ci=quality.normalised_ci,
    )


def _percent(value: float, half: float) -> str:
    return f"{100 * value:.1f} ± {100 * half:.1f}"


def _figure(made: Sequence[Step], title: str) -> Figure:
    asked = any(np.isfinite(each.accuracy) for each in made)
    widths = [2.2, 1.2, 1.2][: 2 + asked]
    figure = Figure(figsize=(8.0 + 2.5 * asked, 1.3 + 0.42 * len(made)), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0]
    places = np.arange(len(made))[::-1]
    _latency(panels[0], places, made)
    _ratio(panels[1], places, made)
    if asked:
        _accuracy(panels[2], places, made)
    panels[0].set_yticks(places, [each.variant for each in made])
    panels[0].set_ylim(-0.6, len(made) - 0.4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def _latency(axes: Any, places: Any, made: Sequence[Step]) -> None:
    """Latency as a share of the baseline's on the same draw: that has an interval even where the mean has none."""
    shares = 100 * (1 - np.array([each.saving for each in made]))
    halves = 100 * np.nan_to_num([each.saving_ci for each in made])
    axes.barh(places, shares, xerr=halves, color="#4c78a8", height=0.62, capsize=3)
    for place, each, end in zip(places, made, shares + halves, strict=True):
        text = f"{_time(each.median_s)}" + (f"  ({-100 * each.saving:+.0f} %)" if each is not made[0] else "")
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.3 * np.nan_to_num(shares + halves, posinf=0.0).max(initial=1.0))
    axes.set_xlabel("latency, % of the baseline's (beside it: median)")


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 or not np.isfinite(seconds) else f"{1e3 * seconds:.3g} ms"


def _ratio(axes: Any, places: Any, made: Sequence[Step]) -> None:
    """Perplexity above the baseline's, %."""
    middle = np.array([each.perplexity_ratio for each in made])
    below = np.nan_to_num(middle - [each.perplexity_ratio_low for each in made])
    above = np.nan_to_num(np.array([each.perplexity_ratio_high for each in made]) - middle)
    axes.axvline(0, color="0.7", linewidth=1)
    axes.errorbar(
        100 * (middle - 1),
        places,
        xerr=100 * np.stack([below, above]),
        fmt="o",
        color="#e45756",
        capsize=3,
        markersize=5,
    )
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("perplexity,\n% above the baseline")


def _accuracy(axes: Any, places: Any, made: Sequence[Step]) -> None:
    """Accuracy, with the interval of its change, which is what steps are told apart by."""
    middle = 100 * np.array([each.accuracy for each in made])
    halves = 100 * np.nan_to_num([each.accuracy_change_ci for each in made])
    axes.axvline(middle[0], color="0.7", linewidth=1)
    axes.errorbar(middle, places, xerr=halves, fmt="s", color="#54a24b", capsize=3, markersize=5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("accuracy, %\n(interval of the change)")
