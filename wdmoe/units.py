"""Quantities as people type them (`20MHz`, `150ms`, `-174dBm/Hz`) to SI floats, and back."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from wdmoe.errors import ConfigError

Dimension = Literal["frequency", "time", "size", "rate", "power", "gain", "noise density"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """How one dimension is written. `shown` are the units a value is printed in, smallest first."""

    example: str
    linear: dict[str, float]  # unit -> factor to SI
    decibel: dict[str, float]  # unit -> factor to SI of 0 dB
    shown: tuple[str, ...]


_SCALES: dict[Dimension, _Scale] = {
    "frequency": _Scale(
        example="20MHz",
        linear={"Hz": 1.0, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9},
        decibel={},
        shown=("Hz", "kHz", "MHz", "GHz"),
    ),
    "time": _Scale(
        example="150ms",
        linear={"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0},
        decibel={},
        shown=("us", "ms", "s"),
    ),
    "size": _Scale(
        example="2GiB",
        linear={"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
        decibel={},
        shown=("B", "KiB", "MiB", "GiB"),
    ),
    "rate": _Scale(
        example="20Mbit/s",
        linear={"bit/s": 1.0, "kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9},
        decibel={},
        shown=("bit/s", "kbit/s", "Mbit/s", "Gbit/s"),
    ),
    "power": _Scale(
        example="23dBm", linear={"W": 1.0, "mW": 1e-3}, decibel={"dBm": 1e-3, "dBW": 1.0}, shown=("mW", "W")
    ),
    "gain": _Scale(example="-90dB", linear={}, decibel={"dB": 1.0}, shown=("dB",)),
    "noise density": _Scale(example="-174dBm/Hz", linear={"W/Hz": 1.0}, decibel={"dBm/Hz": 1e-3}, shown=("dBm/Hz",)),
}

_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*")


def parse_quantity(text: str, dimension: Dimension) -> float:
    """Read a number with its unit; a bare `0` needs no unit where the scale is linear.

    Returns:
        The value in SI units: Hz, s, bytes, bit/s, W, W/Hz; a gain as a plain ratio.
    Raises:
        ConfigError: not such a quantity, negative where that means nothing, or not finite.
    """
    scale = _SCALES[dimension]
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a {dimension}: write a number with its unit, as in {scale.example}")
    number, unit = float(match[1]), match[2]
    if unit in scale.decibel:
        value = _from_decibel(number) * scale.decibel[unit]
    elif unit in scale.linear:
        value = number * scale.linear[unit]
    elif not unit and number == 0 and scale.linear:
        return 0.0
    else:
        units = ", ".join((*scale.linear, *scale.decibel))
        fault = f"no {dimension} has the unit {unit!r}" if unit else "the unit is missing"
        raise ConfigError(f"{text!r}: {fault}: use one of {units}, as in {scale.example}")
    if not 0 <= value < math.inf:
        raise ConfigError(f"{text!r}: a {dimension} must be finite and not negative, as in {scale.example}")
    return value


def format_quantity(value: float, dimension: Dimension) -> str:
    """The value (SI) with three digits in the unit a person would choose, as in `20 MHz` or `-174 dBm/Hz`."""
    scale = _SCALES[dimension]
    first = scale.shown[0]
    if first in scale.decibel:
        level = 10 * math.log10(value / scale.decibel[first]) if value > 0 else -math.inf
        return f"{level:.4g} {first}"
    fitting = [unit for unit in scale.shown if scale.linear[unit] <= abs(value)]
    unit = fitting[-1] if fitting else first
    number = value / scale.linear[unit]
    # Three digits, but never an exponent: 1023 KiB stays 1023 KiB.
    return f"{number:.0f} {unit}" if abs(number) >= 100 else f"{number:.3g} {unit}"


def _from_decibel(level: float) -> float:
    try:
        return math.pow(10.0, level / 10)
    except OverflowError:
        return math.inf
