"""What the radio's numbers must be. Every failure names the quantity, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import BoolArray, FloatArray
from wdmoe.errors import ConfigError

Entry = TypeVar("Entry")
MOST_DB = 1000.0


def unmasked(name: str, value: npt.ArrayLike) -> npt.ArrayLike:
    """The value itself; ConfigError for a masked array, whose mask NumPy would leave out without a word."""
    if isinstance(value, np.ma.MaskedArray):
        raise ConfigError(f"{name} must not be a masked array: fill in or take out what is masked")
    return value


def numbers_of(name: str, value: npt.ArrayLike) -> FloatArray:
    """The value as float64, perhaps NaN or infinite; ConfigError if it is not numbers."""
    try:
        return np.asarray(unmasked(name, value), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be a number or an array of numbers, got {value!r:.60}") from error


def finite(name: str, value: npt.ArrayLike) -> FloatArray:
    """The value as float64, neither NaN nor infinite, else ConfigError."""
    numbers = numbers_of(name, value)
    return _all(name, numbers, np.isfinite(numbers), "finite")


def positive(name: str, value: npt.ArrayLike) -> FloatArray:
    """The value as float64, finite and above 0, else ConfigError."""
    numbers = finite(name, value)
    return _all(name, numbers, numbers > 0, "positive")


def not_negative(name: str, value: npt.ArrayLike) -> FloatArray:
    """The value as float64, finite and at least 0, else ConfigError."""
    numbers = finite(name, value)
    return _all(name, numbers, numbers >= 0, "zero or positive")


def within(name: str, value: npt.ArrayLike, lowest: float, highest: float, why: str = "") -> FloatArray:
    """The value as float64 within two bounds that belong to it, else ConfigError; `why` ends the message."""
    numbers = finite(name, value)
    inside = (numbers >= lowest) & (numbers <= highest)
    return _all(name, numbers, inside, f"within {lowest:g} to {highest:g}{why}")


def decibels(name: str, value: npt.ArrayLike, lowest: float = -MOST_DB) -> FloatArray:
    """The value as float64 within -1000 (or `lowest`) to 1000 dB, whose ratios never overflow, else ConfigError."""
    return within(name, value, lowest, MOST_DB)


def one_of(name: str, value: str, known: Mapping[str, Entry]) -> Entry:
    """What a name stands for, else ConfigError."""
    try:
        return known[value]
    except (KeyError, TypeError):
        raise ConfigError(f"{name} must be one of {', '.join(known)}; got {value!r}") from None


def broadcast(**arrays: npt.ArrayLike) -> tuple[int, ...]:
    """The common shape of arrays, by NumPy's broadcasting.

    Raises:
        ConfigError: there is none; the message has every name and shape.
    """
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ConfigError(f"shapes must fit each other (equal, or 1 where they differ), got {told}") from None


def flags(name: str, value: npt.ArrayLike) -> BoolArray:
    """The value as booleans, else ConfigError: a number is more likely a mistake than a truth value."""
    array = np.asarray(unmasked(name, value))
    if array.dtype != np.bool_:
        raise ConfigError(f"{name} must be true or false, got {value!r:.60}")
    return array


def _all(name: str, numbers: FloatArray, good: BoolArray, demand: str) -> FloatArray:
    if not np.all(good):
        wrong = numbers[~np.asarray(good)] if numbers.ndim else numbers.reshape(1)
        raise ConfigError(f"{name} must be {demand}, got {wrong[0]:g}")
    return numbers
