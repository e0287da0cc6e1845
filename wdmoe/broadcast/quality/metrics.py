"""How good a picture is, and how large a region of two users' qualities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wdmoe.arrays import FloatArray
from wdmoe.errors import ConfigError

MOST_PSNR_DB = 100.0  # what an exact copy counts as; one wrong value in a 32x32 picture is 83 dB
_PEAK = 255.0
MS_SSIM_SIDE = 161  # five scales of an 11x11 window


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its bootstrap interval."""

    value: float
    low: float
    high: float


def psnr_db(wanted: npt.ArrayLike, got: npt.ArrayLike) -> FloatArray:
    """Peak signal-to-noise ratio of each picture, over its pixels and channels.

    Args:
        wanted, got: (..., height, width, channel), 0 to 255.
    Returns:
        (...,) dB, at most 100.
    Raises:
        ConfigError: shapes differ, or are not those of pictures.
    """
    one, other = _same(wanted, got)
    error = ((one.astype(np.float64) - other) ** 2).mean(axis=(-3, -2, -1))
    return np.asarray(10 * np.log10(_PEAK**2 / np.maximum(error, _PEAK**2 * 10 ** (-MOST_PSNR_DB / 10))))


def ssim(wanted: npt.ArrayLike, got: npt.ArrayLike) -> FloatArray:
    """Structural similarity of each picture, mean over channels; 11x11 Gaussian window, sigma 1.5.

    Args:
        wanted, got: (picture, height, width, channel), 0 to 255, sides of 11 or more.
    Returns:
        (picture,), at most 1.
    Raises:
        ConfigError: shapes differ or are not as above.
    Source: Wang et al., IEEE Trans. Image Processing 13(4), 2004.
    """
    from pytorch_msssim import ssim as of_batch

    return _structural(of_batch, wanted, got, 11)


def ms_ssim(wanted: npt.ArrayLike, got: npt.ArrayLike) -> FloatArray:
    """SSIM over five scales: as `ssim`, for sides of 161 or more.

    Source: Wang, Simoncelli and Bovik, Asilomar 2003.
    """
    from pytorch_msssim import ms_ssim as of_batch

    return _structural(of_batch, wanted, got, MS_SSIM_SIDE)


def hypervolume(points: npt.ArrayLike, floor: npt.ArrayLike) -> FloatArray:
    """Area of what the points reach above a floor: the union of the rectangles between the floor and each of them.

    It is a staircase, so systems are compared with equally many points.

    Args:
        points: (..., point, 2) qualities of the two users.
        floor: (2,) below which a quality counts nothing.
    Returns:
        (...,) in squared units of quality.
    Raises:
        ConfigError: shapes are not as above, or a value is not finite.
    """
    reached, least = np.asarray(points, dtype=np.float64), np.asarray(floor, dtype=np.float64)
    if reached.ndim < 2 or reached.shape[-1] != 2 or least.shape != (2,):
        raise ConfigError(f"need points (..., point, 2) and floor (2,), got {reached.shape} and {least.shape}")
    if not (np.isfinite(reached).all() and np.isfinite(least).all()):
        raise ConfigError("points and floor must be finite")
    above = np.maximum(reached - least, 0)
    order = np.argsort(-above[..., 0], axis=-1)  # from the best for the first user on, the second one's best so far
    first = np.take_along_axis(above[..., 0], order, -1)
    second = np.maximum.accumulate(np.take_along_axis(above[..., 1], order, -1), axis=-1)
    step = first - np.concatenate([first[..., 1:], np.zeros_like(first[..., :1])], axis=-1)
    return np.asarray((step * second).sum(axis=-1))


def hypervolume_interval(
    qualities: npt.ArrayLike, floor: npt.ArrayLike, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Hypervolume of mean qualities, with the percentile interval of a bootstrap over pairs of pictures.

    Every point of a resample has the same pairs, so what they have in common does not widen the interval.

    Args:
        qualities: (point, pair, 2).
        floor: (2,), as in `hypervolume`.
        seed: of the resamples.
    Raises:
        ConfigError: shapes are not as above, or there is no pair.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    values = np.asarray(qualities, dtype=np.float64)
    if values.ndim != 3 or values.shape[1] == 0 or values.shape[2] != 2:
        raise ConfigError(f"qualities must be (point, pair, 2), got {values.shape}")
    pairs = values.shape[1]
    counts = np.random.default_rng(seed).multinomial(pairs, np.full(pairs, 1 / pairs), size=resamples)
    means = np.einsum("rn,pnu->rpu", counts / pairs, values, optimize=True)
    low, high = np.quantile(hypervolume(means, floor), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(hypervolume(values.mean(axis=1), floor)), float(low), float(high))


def _same(wanted: npt.ArrayLike, got: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    one, other = np.asarray(wanted), np.asarray(got)
    if one.shape != other.shape or one.ndim < 3:
        raise ConfigError(f"need two arrays of pictures (..., height, width, channel), got {one.shape}, {other.shape}")
    return one, other


def _structural(of_batch: Callable[..., Any], wanted: npt.ArrayLike, got: npt.ArrayLike, least: int) -> FloatArray:
    one, other = _same(wanted, got)
    if one.ndim != 4 or min(one.shape[1:3]) < least:
        raise ConfigError(f"need pictures (picture, height, width, channel) of sides {least} or more, got {one.shape}")
    tensors = (torch.from_numpy(np.moveaxis(each, -1, 1).astype(np.float32)) for each in (one, other))
    with torch.no_grad():
        value = of_batch(*tensors, data_range=_PEAK, size_average=False)
    return np.asarray(value.numpy(), dtype=np.float64)
