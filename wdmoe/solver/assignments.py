"""The one check of what selection policies are given: experts per token, their weights, and who serves them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray, Int32Array
from wdmoe.solver import _native
from wdmoe.solver.bandwidth import SMALLEST


@dataclass(frozen=True, slots=True, eq=False)
class Assignments:
    """All (tokens, top_k) and C-contiguous."""

    experts: Int32Array  # -1 where there is none; may be the caller's own array
    weights: FloatArray  # 0 where there is none
    device: Int32Array  # -1 where nobody serves it, or there is none


def check_assignments(
    experts: npt.ArrayLike, weights: npt.ArrayLike, device_of: npt.ArrayLike, devices: int
) -> Assignments:
    """Experts, weights and the device of each assignment.

    Args:
        experts: (tokens, top_k) int, -1 where there is none.
        weights: (tokens, top_k) finite, >= 0.
        device_of: (experts,) int, the device that serves each expert; or (tokens, top_k) int, the device that serves
            each assignment, where experts have replicas. -1: none does.
        devices: how many there are.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    chosen, home = check_int32("experts", experts), check_int32("device_of", device_of)
    weight = _native.floats("weights", weights)
    if chosen.ndim != 2:
        raise ValueError(f"experts must be integers (tokens, top_k), got shape {chosen.shape}")
    if weight.shape != chosen.shape:
        raise ValueError(f"weights must have the shape of experts {chosen.shape}, got {weight.shape}")
    if home.ndim not in (1, 2):
        raise ValueError(f"device_of must be (experts,) or the shape of experts {chosen.shape}, got {home.shape}")
    device, weight = _native.resolve(chosen, weight, np.atleast_2d(home), home.ndim == 1, devices)
    return Assignments(chosen, weight, device)


def check_int32(name: str, values: npt.ArrayLike) -> Int32Array:
    """C-contiguous int32. Raises ValueError for what is no integer, or too large for it."""
    array = _native.regular(name, values)
    if array.dtype == np.int32:
        return np.asarray(array, order="C")
    if array.dtype.kind not in "iu" and (array.size or array.dtype.kind != "f"):  # an empty list is float64
        raise ValueError(f"{name} must be integers, got {array.dtype} {array.shape}")
    limit = np.iinfo(np.int32)
    if array.size and (array.min() < limit.min or array.max() > limit.max):
        raise ValueError(f"{name} must be within 32 bits, got {array.min()} to {array.max()}")
    return np.asarray(array, dtype=np.int32, order="C")


def check_seconds(name: str, values: npt.ArrayLike, count: int | None = None, positive: bool = True) -> FloatArray:
    """(count,) float64 from 1e-100 (0 unless `positive`) to 1e100, within which nothing overflows. None: one or more.

    Raises:
        ValueError: it is not; the message names it.
    """
    array = _native.floats(name, values)
    wanted = "devices" if count is None else count
    if array.ndim != 1 or not array.size or (count is not None and len(array) != count):
        raise ValueError(f"{name} must be ({wanted},), got shape {array.shape}")
    bad = _native.first_bad(array.reshape(1, -1), positive)
    if bad >= 0:
        demand = "positive and finite" if positive else "finite and not negative"
        raise ValueError(f"{name} must be ({wanted},), {demand} (at most 1e100), got {array[bad]} at {bad}")
    return array


def check_positive(**values: float) -> None:
    """Raises ValueError for a number that is not finite, or below 1e-30, where quotients inside overflow."""
    for name, value in values.items():
        if not SMALLEST <= value < np.inf:  # also refuses NaN
            raise ValueError(f"{name} must be positive and finite, at least {SMALLEST:g}, got {value}")
