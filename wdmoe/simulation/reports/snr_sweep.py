"""Latency beside quality at several mean SNRs: which way down pays where. A table and a figure.

The SNR of the way down is moved by the station's power: the way up stays as it is. (Moved by the noise, at a mean of
20 dB down, devices of 17 dB less power spend nearly all time on the way up, whatever comes down.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from wdmoe.errors import ConfigError
from wdmoe.simulation.channel_draw import make_draw
from wdmoe.simulation.figures import STYLE, save_figure
from wdmoe.simulation.scenario import Scenario, Variant
from wdmoe.simulation.scenario_file import parse_scenario
from wdmoe.simulation.statistics import Summary, records_text

if TYPE_CHECKING:
    from wdmoe.simulation.quality import Quality

_POWER_LINE = re.compile(r'^station_power[ \t]*=[ \t]*"[^"\n]*"', re.MULTILINE)
_MARKS = "osD^v<>PXph*"
_TICKS = (-1, 0, 1, 3, 10, 30, 100)  # percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One variant at one mean SNR. Times are of the simulated draws, quality of the model; ranges are at 95 %."""

    snr_db: float  # down, over the whole band, without fading; mean of decibels over devices and draws
    variant: str
    latency_s: float
    median_s: float
    saving: float  # share of the baseline's latency, paired draw by draw
    saving_ci: float
    cast_share: float  # of the layers in which all devices were sent to at once
    distortion_db: float  # of hidden vectors on their way down, mean over layers
    perplexity: float
    perplexity_ratio: float  # to the baseline's, paired window by window
    perplexity_ratio_low: float
    perplexity_ratio_high: float


def at_mean_snr(scenario: Scenario, snr_db: float) -> Scenario:
    """The same scenario with the station's power that gives this mean SNR down, to 0.01 dB.

    Raises:
        ConfigError: its text has not one line `station_power = "..."`, or the power would be none that can be.
    """
    found = _POWER_LINE.findall(scenario.source)
    if len(found) != 1:
        raise ConfigError(f'scenario {scenario.name} must have one line station_power = "...", it has {len(found)}')
    power_dbm = 30 + 10 * np.log10(scenario.radio.station_power_w) + snr_db - mean_snr_db(scenario)
    text = _POWER_LINE.sub(f'station_power = "{power_dbm:.2f}dBm"', scenario.source)
    return replace(parse_scenario(text), seed=scenario.seed, draws=scenario.draws, backend=scenario.backend)


def mean_snr_db(scenario: Scenario) -> float:
    """Down, over the whole band, without fading: mean of decibels over devices and draws."""
    each = [make_draw(scenario, number, 1, 1).mean.downlink_snr_hz for number in range(scenario.draws)]
    return float(np.mean(10 * np.log10(np.stack(each) / scenario.radio.bandwidth_hz)))


def hears_no_noise(variant: Variant) -> bool:
    """Whether what is computed with which values is the same at every SNR, so that quality is measured once."""
    policy, levers = variant.policy, variant.policy.levers
    choosing = policy.name != "topk" or policy.least_similarity <= 1
    rounding = levers.coarse_bits > 0 or levers.max_distortion > 0 or levers.partial_sums  # of whose bits, or sums
    return not choosing and not rounding and levers.analog is None


def points(snr_db: float, summaries: Sequence[Summary], found: Sequence[Quality]) -> list[Point]:
    """Both halves of each variant, `summaries` and `found` being of the same ones in the same order."""
    return [_point(snr_db, summary, quality) for summary, quality in zip(summaries, found, strict=True)]


def save_bridge(made: Sequence[Point], title: str, folder: Path) -> None:
    """Write bridge.csv, .md, .png and .svg."""
    (folder / "bridge.csv").write_text(records_text(Point, made), encoding="utf-8")
    (folder / "bridge.md").write_text(markdown(made, title), encoding="utf-8")
    with mpl.rc_context(STYLE):
        save_figure(_figure(made, title), folder / "bridge")


def markdown(made: Sequence[Point], title: str) -> str:
    """A table to be put into a document: a row for each variant, for each SNR three columns."""
    levels = list(dict.fromkeys(each.snr_db for each in made))
    head = ["variant", *(f"{level:g} dB: median, ms | distortion, dB | perplexity" for level in levels)]
    lines = [f"{title}; perplexity in times the baseline's", "", f"| {' | '.join(head)} |"]
    lines.append("| --- " * (1 + 3 * len(levels)) + "|")
    for name in dict.fromkeys(each.variant for each in made):
        cells = [name]
        for each in (each for each in made if each.variant == name):
            median = np.format_float_positional(1e3 * each.median_s, 4, fractional=False, trim="-")
            cells += [median, f"{each.distortion_db:.1f}", f"{each.perplexity_ratio:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _point(snr_db: float, summary: Summary, quality: Quality) -> Point:
    with np.errstate(divide="ignore"):
        distortion_db = float(10 * np.log10(quality.distortion))
    return Point(
        snr_db=snr_db,
        variant=summary.variant,
        latency_s=summary.latency_s,
        median_s=summary.median_s,
        saving=summary.saving,
        saving_ci=summary.saving_ci,
        cast_share=summary.multicast_share,
        distortion_db=distortion_db,
        perplexity=quality.perplexity,
        perplexity_ratio=quality.ratio,
        perplexity_ratio_low=quality.ratio_low,
        perplexity_ratio_high=quality.ratio_high,
    )


def _figure(made: Sequence[Point], title: str) -> Figure:
    """A panel for each SNR: down and to the left is better."""
    levels = list(dict.fromkeys(each.snr_db for each in made))
    figure = Figure(figsize=(2.2 + 2.6 * len(levels), 5.2), layout="constrained")
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    for axes, level in zip(panels, levels, strict=True):
        _panel(axes, level, [each for each in made if each.snr_db == level])
    panels[0].set_ylabel("perplexity above the baseline's, %")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def _panel(axes: Any, level: float, made: Sequence[Point]) -> None:
    colours = mpl.colormaps["tab20"]
    for number, each in enumerate(made):
        above = 100 * (each.perplexity_ratio - 1)
        ends = [each.perplexity_ratio - each.perplexity_ratio_low, each.perplexity_ratio_high - each.perplexity_ratio]
        whiskers = 100 * np.nan_to_num(np.maximum(ends, 0.0))[:, None]
        colour, mark = colours(number % colours.N), _MARKS[number % len(_MARKS)]
        axes.errorbar(
            [100 * (1 - each.saving)],
            [above],
            yerr=whiskers,
            label=each.variant,
            color=colour,
            ecolor=(*colour[:3], 0.45),
            marker=mark,
            linestyle="none",
        )
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(-2.0, None)
    axes.set_yticks(_TICKS)
    axes.yaxis.set_major_formatter(lambda percent, _: f"{percent:g}")
    axes.minorticks_off()
    axes.set_xlabel("latency, % of the baseline's")
    axes.set_title(f"mean SNR {level:g} dB", fontsize=10)
    axes.grid(alpha=0.3)
