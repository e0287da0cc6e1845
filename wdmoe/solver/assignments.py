"""The one check of what selection policies are given: experts per token, their weights, and who serves them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]


def check_assignments(
    experts: npt.ArrayLike, weights: npt.ArrayLike, device_of: npt.ArrayLike, devices: int
) -> tuple[Int32Array, FloatArray, Int32Array]:
    """Experts, weights and the device of each assignment, all (tokens, top_k), C-contiguous.

    Args:
        experts: (tokens, top_k) int, -1 where there is none.
        weights: (tokens, top_k) finite, >= 0.
        device_of: (experts,) int, the device that serves each expert; or (tokens, top_k) int, the device that serves
            each assignment, where experts have replicas. -1: none does.
        devices: how many there are.
    Returns:
        int32, float64, int32; the device is -1 where nobody serves the assignment, or there is none.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    chosen, home = _integers("experts", experts), np.asarray(device_of)
    weight = np.ascontiguousarray(weights, dtype=np.float64)
    if chosen.ndim != 2:
        raise ValueError(f"experts must be integers (tokens, top_k), got {chosen.dtype} {chosen.shape}")
    if weight.shape != chosen.shape:
        raise ValueError(f"weights must have the shape of experts {chosen.shape}, got {weight.shape}")
    if weight.size and not (weight.min() >= 0 and weight.max() < np.inf):  # also refuses NaN
        raise ValueError("weights must be finite and not negative")
    if home.ndim != 1 and home.shape != chosen.shape:
        raise ValueError(f"device_of must be (experts,) or the shape of experts {chosen.shape}, got {home.shape}")
    if home.ndim == 1 and not home.size:
        raise ValueError("device_of must have at least one expert, got none")
    home = _integers("device_of", home)
    _check_range("device_of", home, devices)
    _check_range("experts", chosen, len(home) if home.ndim == 1 else 2**31)
    if home.ndim == 1:
        home = home[chosen]  # -1 takes some device, and loses it below
    device = np.where(chosen >= 0, home, -1)
    return chosen.astype(np.int32, copy=False), weight, device.astype(np.int32, copy=False)


def _integers(name: str, values: npt.ArrayLike) -> npt.NDArray[np.integer]:
    array = np.ascontiguousarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype} {array.shape}")
    return array


def _check_range(name: str, values: npt.NDArray[np.integer], end: int) -> None:
    if values.size and (values.min() < -1 or values.max() >= end):
        raise ValueError(f"{name} must be from -1 to {end - 1}, got {values.min()} to {values.max()}")


def check_positive(**values: float) -> None:
    """Raises ValueError for a number that is not positive and finite."""
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
