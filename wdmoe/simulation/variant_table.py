"""One [[variant]] of a scenario file -> its record."""

from __future__ import annotations

from typing import Any

from wdmoe.config import RANKS
from wdmoe.errors import ConfigError
from wdmoe.simulation.scenario import Variant
from wdmoe.simulation.toml_table import Table
from wdmoe.simulation.used_keys import VARIANT_USES, refuse_unused
from wdmoe.solver.layer.analog_downlink import TRANSFORMS, Analog
from wdmoe.solver.layer.latency import MULTICASTS, Levers
from wdmoe.solver.layer.plan import Policy
from wdmoe.solver.selection import POLICIES

PLACEMENTS = ("spread", "greedy", "exact")
_USUAL = Policy()
_ANALOG = Analog()


def read_variant(table: Table) -> Variant:
    """One way to run the layer.

    Raises:
        ConfigError: a value cannot be, a key is for another policy or mode, or policy "budget" has no bound.
    """
    name = table.text("name")
    policy, levers, analog = _policy(table), _levers(table), _analog(table)
    rest: dict[str, Any] = {
        "placement": table.text("placement", "spread", PLACEMENTS),
        "replicas": table.integer("replicas", 1, 1, 4096),
        "rank": table.text("rank", "probability", RANKS),
        "whole_layers": table.integer("whole_layers", 0, 0, 4096),
        "csi_layers": table.integer("csi_layers", 1, 0, 4096),
        "csi_delay": table.integer("csi_delay", 0, 0, 4096),
    }
    refuse_unused(table, f"[[variant]] {name!r}", VARIANT_USES)
    table.done()
    if policy["name"] == "budget":
        _check_bound(name, table, policy["budget_s"])
    try:
        lever = None if analog is None else Analog(**analog)
        made = Policy(levers=Levers(analog=lever, **levers), **policy)
    except ValueError as error:
        raise ConfigError(f"[[variant]] {name!r}: {error}") from error
    return Variant(name=name, policy=made, **rest)


def _check_bound(name: str, table: Table, budget_s: float) -> None:
    """Policy "budget" without a bound would be "topk" under another name."""
    stated = [key for key in ("max_dropped", "budget") if key in table.stated]
    if len(stated) != 1:
        raise ConfigError(
            f'[[variant]] {name!r}: policy = "budget" needs max_dropped, as in 0.05, or budget, as in "20ms", '
            f"and one of them alone; got {' and '.join(stated) or 'neither'}"
        )
    if stated == ["budget"] and budget_s <= 0:
        raise ConfigError(f"[[variant]] {name!r}: budget must be above 0")


def _policy(table: Table) -> dict[str, Any]:
    return {
        "name": table.text("policy", "topk", POLICIES),
        "max_dropped": table.number("max_dropped", 0.0, 0.0, 1.0),
        "budget_s": table.quantity("budget", "time", "0ms"),
        "light": table.number("light", _USUAL.light, 0.0, 1.0),
        "theta": table.number("theta", _USUAL.theta, 0.0, 1.0),
        "theta_step": table.number("theta_step", _USUAL.theta_step, 0.001, 1.0),
        "gamma": table.number("gamma", _USUAL.gamma, 1e-6, 1e6),
        "least_similarity": table.number("least_similarity", _USUAL.least_similarity, -1.0, 2.0),
        "times_faster": table.number("times_faster", _USUAL.times_faster, 1.0, 1e6),
    }


def _levers(table: Table) -> dict[str, Any]:
    return {
        "bits": table.integer("bits", 16, 4, 16),
        "coarse_bits": table.integer("coarse_bits", 0, 0, 16),
        "coarse_share": table.number("coarse_share", _USUAL.levers.coarse_share, 0.0, 1.0),
        "max_distortion": table.number("max_distortion", 0.0, 0.0, 1.0),
        "partial_sums": table.flag("partial_sums"),
        "multicast": table.switch("multicast", MULTICASTS),
        "micro_batches": table.integer("micro_batches", 1, 1, 1024),
        "equal_bandwidth": table.text("bandwidth", "optimal", ("optimal", "equal")) == "equal",
    }


def _analog(table: Table) -> dict[str, Any] | None:
    """How a variant broadcasts hidden vectors without bits; None: it does not, and has no key of it."""
    if table.text("downlink", "digital", ("digital", "analog")) == "digital":
        return None
    return {
        "ratio": table.number("analog_ratio", _ANALOG.ratio),
        "floor_db": table.number("analog_floor_db", _ANALOG.floor_db),
        "transform": table.text("analog_transform", _ANALOG.transform, TRANSFORMS),
        "share": table.number("analog_share", _ANALOG.share),
    }
