"""Which keys of a scenario only some choices look at. One table: what it does not allow is refused, and
docs/simulation.md shows it.

A key that does nothing means that a line was forgotten: gamma without `policy = "cosine"` gives a plausible figure of
another question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wdmoe.errors import ConfigError
from wdmoe.simulation.toml_table import Table
from wdmoe.solver.layer.latency import Levers
from wdmoe.solver.selection import POLICIES
from wdmoe.wireless.tr38901 import SCENARIOS

Stated = Mapping[str, Any]  # the table as it stands in the file: its values are checked already


@dataclass(frozen=True, slots=True)
class Use:
    """Keys, and what looks at them."""

    keys: tuple[str, ...]
    by: str  # as TOML, or in words
    holds: Callable[[Stated], bool]


def _where(choice: str, default: str, *values: str) -> tuple[str, Callable[[Stated], bool]]:
    """That a key has one of these values."""
    named = " or ".join(f'"{value}"' for value in values)
    return f"{choice} = {named}", lambda stated: stated.get(choice, default) in values


def _bits(stated: Stated) -> int:
    return int(stated.get("bits", Levers().bits))


def _replaces(stated: Stated) -> bool:
    return float(stated.get("least_similarity", 2.0)) <= 1


def _ranks(stated: Stated) -> bool:
    """Whether anything looks at weights."""
    few = stated.get("coarse_bits", 0) or stated.get("max_distortion", 0)
    return stated.get("policy", "topk") != "topk" or bool(few) or _replaces(stated)


_DROPPING = tuple(policy for policy in POLICIES if policy != "topk")
VARIANT_USES = (
    Use(("max_dropped", "budget"), *_where("policy", "topk", "budget")),
    Use(("light",), *_where("policy", "topk", "bottleneck")),
    Use(("theta", "theta_step", "gamma"), *_where("policy", "topk", "cosine")),
    Use(("whole_layers",), *_where("policy", "topk", *_DROPPING)),
    Use(("rank",), "a policy that drops, coarse_bits, max_distortion or least_similarity", _ranks),
    Use(("least_similarity",), "a value of at most 1", _replaces),
    Use(("times_faster",), "least_similarity of at most 1", _replaces),
    Use(("coarse_share",), "coarse_bits above 0", lambda stated: stated.get("coarse_bits", 0) > 0),
    Use(("coarse_bits",), "another number than bits", lambda stated: stated.get("coarse_bits") != _bits(stated)),
    Use(("max_distortion",), "bits above 4", lambda stated: _bits(stated) > 4 or not stated.get("max_distortion")),
    Use(
        ("analog_ratio", "analog_floor_db", "analog_transform", "analog_share"),
        *_where("downlink", "digital", "analog"),
    ),
)
CHANNEL_USES = (
    Use(("exponent",), *_where("path_loss", "log-distance", "log-distance")),
    Use(("shadowing_db",), "a path_loss without one of its own", lambda s: s.get("path_loss") not in SCENARIOS),
    Use(("k_factor_db",), *_where("fading", "rayleigh", "rician")),
    Use(("fading_changes",), *_where("fading", "rayleigh", "rayleigh", "rician")),
    Use(("doppler", "speed_m_s", "block_time"), *_where("fading_changes", "pass", "doppler")),
)


def model_uses(reads_weights: bool) -> tuple[Use, ...]:
    """Of [model]; `reads_weights`: some device has a memory rate."""
    return (Use(("weight_bytes",), "[devices] memory_bytes_s above 0", lambda stated: reads_weights),)


def refuse_unused(table: Table, name: str, uses: tuple[Use, ...]) -> None:
    """Raises ConfigError for the first key that nothing in this table looks at.

    Args:
        name: how an error names the table.
    """
    for use in uses:
        idle = [key for key in use.keys if key in table.stated]
        if idle and not use.holds(table.stated):
            raise ConfigError(f"{name}: {idle[0]} does nothing here: it is for {use.by}")
