"""Fronts to figures: areas, quality at equal quality, and by how much one system is ahead of another, and where.

All systems of a setting have the same pairs, so a bootstrap takes the same pairs for all of them, and differences have
narrower intervals than their parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.broadcast.quality.metrics import Interval, hypervolume
from wdmoe.broadcast.quality.pareto_front import Front

FLOOR_DB = 12.0  # about what the mean picture shows
FLOORS = {"psnr_db": FLOOR_DB, "ssim": 0.0, "ms_ssim": 0.0}
RESAMPLES = 2000
SEED = 20240610
_GRID = 201  # qualities of the first user at which the second one's are compared


@dataclass(frozen=True, slots=True)
class Standing:
    """One system in one setting."""

    area: Interval  # dB^2
    equal_db: Interval  # the PSNR that both users have, where it is the same
    ssim_area: Interval
    ms_ssim_area: Interval  # not a number where pictures are too small for it


@dataclass(frozen=True, slots=True)
class Lead:
    """By how much the first system is ahead of another one; negative is behind."""

    area: Interval  # dB^2, of the difference
    equal_db: Interval  # at equal quality of both users
    apart: bool  # the first one's area is larger and the two intervals of the areas do not overlap
    ahead: float  # share of the first user's qualities, from floor up to what both systems reach, 0 to 1
    least_db: float  # of the lead for the second user over these qualities
    least_at_db: float  # the first user's quality there


def standings(fronts: Mapping[str, Front]) -> dict[str, Standing]:
    """Every system's figures with 95 % intervals."""
    counts = _counts(fronts)
    return {
        name: Standing(
            area=_interval(_areas(front, "psnr_db", counts)),
            equal_db=_interval(_equal(front, counts)),
            ssim_area=_interval(_areas(front, "ssim", counts)),
            ms_ssim_area=_interval(_areas(front, "ms_ssim", counts)),
        )
        for name, front in fronts.items()
    }


def leads(fronts: Mapping[str, Front], first: str) -> dict[str, Lead]:
    """The lead of system `first` over every other one."""
    counts = _counts(fronts)
    areas = {name: _areas(front, "psnr_db", counts) for name, front in fronts.items()}
    equals = {name: _equal(front, counts) for name, front in fronts.items()}
    own, found = _interval(areas[first]), {}
    for name, front in fronts.items():
        if name != first:
            levels, lead = lead_along(fronts[first], front)
            least = int(np.argmin(lead))
            found[name] = Lead(
                area=_interval(areas[first] - areas[name]),
                equal_db=_interval(equals[first] - equals[name]),
                apart=own.low > _interval(areas[name]).high,
                ahead=float((lead > 0).mean()),
                least_db=float(lead[least]),
                least_at_db=float(levels[least]),
            )
    return found


def lead_along(one: Front, other: Front) -> tuple[FloatArray, FloatArray]:
    """Qualities of the first user (level,), and how much more the second one has there in the first system, dB.

    From the floor up to the best that the first user gets in both systems; between points fronts are straight, as
    blocks may take turns between two of them.
    """
    fronts = [_falling(front.psnr_db.mean(axis=1)) for front in (one, other)]
    levels = np.linspace(FLOOR_DB, max(FLOOR_DB, min(front[:, 0].max() for front in fronts)), _GRID)
    first, second = (np.interp(levels, front[:, 0], front[:, 1]) for front in fronts)
    return levels, first - second


def equal_quality(means: npt.ArrayLike) -> FloatArray:
    """Where both users have the same: (...,) dB of fronts (..., point, 2), straight between points.

    A front on which one user is always the better gives the best that the worse user gets.
    """
    points = np.asarray(means, dtype=np.float64)
    best = points.min(axis=-1).max(axis=-1)
    gap = points[..., 0] - points[..., 1]
    before, after = gap[..., :-1], gap[..., 1:]
    crosses = before * after < 0
    part = np.where(crosses, before / np.where(crosses, before - after, 1.0), 0.0)
    met = points[..., :-1, 0] + part * (points[..., 1:, 0] - points[..., :-1, 0])
    if not met.shape[-1]:
        return np.asarray(best)
    return np.asarray(np.maximum(best, np.where(crosses, met, -np.inf).max(axis=-1)))


def _counts(fronts: Mapping[str, Front]) -> FloatArray:
    """(1 + resample, pair) shares of pairs; the first row has every pair once."""
    pairs = next(iter(fronts.values())).psnr_db.shape[1]
    drawn = np.random.default_rng(SEED).multinomial(pairs, np.full(pairs, 1 / pairs), size=RESAMPLES)
    return np.asarray(np.concatenate([np.ones((1, pairs)), drawn]) / pairs)


def _means(qualities: FloatArray, counts: FloatArray) -> FloatArray:
    """(resample, point, 2)."""
    return np.asarray(np.einsum("rn,pnu->rpu", counts, qualities, optimize=True))


def _areas(front: Front, quality: str, counts: FloatArray) -> FloatArray:
    values = np.asarray(getattr(front, quality), dtype=np.float64)
    if np.isnan(values).any():
        return np.full(len(counts), np.nan)
    return hypervolume(_means(values, counts), [FLOORS[quality]] * 2)


def _equal(front: Front, counts: FloatArray) -> FloatArray:
    return equal_quality(_means(np.asarray(front.psnr_db, dtype=np.float64), counts))


def _interval(values: FloatArray) -> Interval:
    """Of the value (first) and its resamples."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))


def _falling(points: FloatArray) -> FloatArray:
    """The points that no other one beats, by the first user's quality, and a wall at the last one."""
    order = np.lexsort((points[:, 1], points[:, 0]))[::-1]
    kept, best = [], -np.inf
    for place in order:
        if points[place, 1] > best:
            best = points[place, 1]
            kept.append(place)
    return points[kept[::-1]]
