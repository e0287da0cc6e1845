"""What the draws say: means with 95 % intervals, and savings paired draw by draw."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from wdmoe.arrays import FloatArray
from wdmoe.simulation.study import Study

LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One variant. Intervals are half widths at 95 %, by Student's t over draws; NaN with a single draw."""

    variant: str
    latency_s: float  # mean over the draws where neither it nor the baseline is in outage
    latency_ci_s: float
    median_s: float  # fading has heavy tails: a few draws can make the mean
    saving: float  # mean over draws of 1 - latency / latency of the baseline on the same draw
    saving_ci: float
    dropped_weight: float
    replaced_weight: float
    experts_per_token: float
    link_bits: float
    multicast_share: float
    outage: float  # share of draws on which a device could not be reached: latency is infinite


def summarise(study: Study) -> list[Summary]:
    """One summary for each variant; the first variant is the baseline."""
    latency = study.of("latency_s")
    fine = np.isfinite(latency) & np.isfinite(latency[:, :1])
    return [_summary(study, index, latency, fine[:, index]) for index in range(latency.shape[1])]


def records_text(kind: type[Any], records: Sequence[Any]) -> str:
    """CSV of flat dataclasses, a column for each field: shortest digits that give each float64 back."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(each) for each in records)
    return out.getvalue()


def mean_and_interval(values: FloatArray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; NaN where there are too few values."""
    if not values.size:
        return float("nan"), float("nan")
    if values.size == 1:
        return float(values[0]), float("nan")
    half = float(student_t.ppf((1 + LEVEL) / 2, values.size - 1)) * float(values.std(ddof=1)) / np.sqrt(values.size)
    return float(values.mean()), float(half)


def _summary(study: Study, index: int, latency: FloatArray, fine: npt.NDArray[np.bool_]) -> Summary:
    mean_s, half_s = mean_and_interval(latency[fine, index])
    saving, saving_half = mean_and_interval(1 - latency[fine, index] / latency[fine, 0])
    return Summary(
        variant=study.scenario.variants[index].name,
        latency_s=mean_s,
        latency_ci_s=half_s,
        median_s=float(np.median(latency[fine, index])) if fine.any() else float("nan"),
        saving=saving,
        saving_ci=saving_half,
        dropped_weight=float(study.of("dropped_weight")[:, index].mean()),
        replaced_weight=float(study.of("replaced_weight")[:, index].mean()),
        experts_per_token=float(study.of("experts_per_token")[:, index].mean()),
        link_bits=float(study.of("link_bits")[:, index].mean()),
        multicast_share=float(study.of("multicast_share")[:, index].mean()),
        outage=float(np.isinf(latency[:, index]).mean()),
    )
