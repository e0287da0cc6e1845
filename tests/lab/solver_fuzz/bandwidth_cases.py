"""Random calls of bandwidth allocation and of its inverse, and what holds for every answer."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.lab.solver_fuzz.numbers import LOADS, Given
from wdmoe.solver import Allocation, Links, allocate_bandwidth, allocate_bandwidth_many
from wdmoe.solver.reference import bandwidth as reference
from wdmoe.solver.required_bandwidth import needed_hz

TOTALS = (1e-30, 1.0, 1e6, 1e8, 1e30)
TOLERANCES = (1e-11, 1e-8, 1e-3, 1.0)
ROUNDING = 1e-9  # relative: what two ways of computing a time may differ by


def some_links(given: Given, shape: tuple[int, ...]) -> Links:
    kind = given.one("snr_hz", "efficiency")
    names = ("downlink_bits", "uplink_bits", f"downlink_{kind}", f"uplink_{kind}", "compute_s")
    free = {"downlink_bits", "uplink_bits"} if given.chance(0.15) else set()
    free |= {"compute_s"} if given.chance(0.3) else set()
    rows: dict[str, Any] = {
        name: 0.0 if name in free else given.odd(given.values(shape), shape=False) for name in names
    }
    if given.chance(0.05) and free != set(names):
        del rows[given.one(*names[:4])]
        given.wrong = True
    return Links(**rows) if len(rows) == len(names) else _without(rows)


def _without(rows: dict[str, Any]) -> Links:
    try:
        return Links(**rows)
    except TypeError as error:  # Python's own word for an argument that is missing
        raise ValueError(str(error)) from error


def usual_links(given: Given, devices: int) -> Links:
    """Of the ranges that a radio has; where sums are compared to the last digits, extremes prove nothing."""
    rng = given.rng
    return Links(
        downlink_snr_hz=10 ** rng.uniform(5, 9, devices),
        uplink_snr_hz=10 ** rng.uniform(5, 9, devices),
        downlink_bits=16384.0 * given.one(0, 1),
        uplink_bits=16384.0,
        compute_s=rng.uniform(0, 2e-4, devices),
    )


def limits(given: Given, devices: int, total_hz: float) -> dict[str, Any]:
    """Floors and caps: none, equal, nothing left over, next to nothing, or extreme."""
    found: dict[str, Any] = {}
    if given.chance(0.35):
        share = given.one(0.0, 1e-15, 1e-12, 0.5, 1.0, 1.1) / devices
        found["floor_hz"] = given.one(0.0, share * total_hz, None)
        if found["floor_hz"] is None:
            found["floor_hz"] = given.odd(given.rng.uniform(0, share, devices) * total_hz)
    if given.chance(0.35):
        factor = given.one(0.0, 1e-300, 1e-18, 1e-3, 1.0, 2.0, 1e9, np.inf)
        floor = found.get("floor_hz", 0.0) if isinstance(found.get("floor_hz", 0.0), float) else total_hz
        found["cap_hz"] = np.broadcast_to(floor + factor * total_hz, devices).copy()
    return found


def allocate(given: Given) -> None:
    devices, blocks = int(given.rng.integers(1, 7)), given.one(0, 1, 1, 1, 2, 3, 6)
    links = usual_links(given, devices) if given.chance(0.3) else some_links(given, (devices,))
    devices = links.table.shape[-1]
    total_hz = given.one(*TOTALS)
    loads = given.values((blocks, devices), LOADS)
    if given.chance(0.3):
        loads[:, given.rng.integers(devices)] = 0
    load = given.odd(loads[0] if blocks == 1 and given.chance(0.5) else loads)
    options: dict[str, Any] = limits(given, devices, total_hz)
    if given.chance(0.3):
        options["fixed_s"] = given.odd(given.values(np.shape(load)))
    options |= {"tolerance": given.one(*TOLERANCES), "iterations": given.one(1, 3, 150)}
    answer = allocate_bandwidth(load, links, total_hz, **options)
    check_allocation(given, answer, np.asarray(load, float).reshape(-1, devices), links, total_hz, options)
    again = allocate_bandwidth(load, links, total_hz, **options, start=answer)
    check_allocation(given, again, np.asarray(load, float).reshape(-1, devices), links, total_hz, options)


def allocate_many(given: Given) -> None:
    draws, devices, blocks = given.one(0, 1, 3), int(given.rng.integers(1, 5)), given.one(0, 1, 1, 2, 3)
    links = some_links(given, (max(draws, 1), devices))
    draws, devices = links.table.shape[0], links.table.shape[-1]
    shape = (draws, blocks, devices) if given.chance(0.3) else (blocks, devices)
    load = given.odd(given.values(shape, LOADS))
    total_hz = given.one(*TOTALS)
    options = limits(given, devices, total_hz)
    for number, answer in enumerate(allocate_bandwidth_many(load, links, total_hz, warm=given.chance(0.5), **options)):
        table = Links.__new__(Links)
        object.__setattr__(table, "table", links.table[number])
        object.__setattr__(table, "flat", links.flat)
        loads = np.asarray(load, float)
        mine = loads[number] if loads.ndim == 3 else loads.reshape(-1, devices)
        check_allocation(given, answer, mine, table, total_hz, options | {"tolerance": 1e-8})


def invert(given: Given) -> None:
    links = usual_links(given, 3) if given.chance(0.5) else some_links(given, (int(given.rng.integers(1, 5)),))
    wanted_s = given.odd(10.0 ** given.rng.uniform(-9, 9, given.one(0, 1, 4)), shape=False)
    hertz = needed_hz(links, wanted_s)
    assert hertz.shape == (links.table.shape[1], np.size(wanted_s)), hertz.shape
    assert (hertz >= 0).all(), "a negative or NaN band"  # infinite where nothing is enough
    finite = np.isfinite(hertz) & (hertz > 0)
    for place, seconds in enumerate(np.ravel(wanted_s)):
        at = np.where(finite[:, place], hertz[:, place], 1.0)
        with np.errstate(all="ignore"):  # where nothing gets through
            back = reference.seconds_per_token(links.table, links.flat, at) + links.table[4]
        assert (back[finite[:, place]] <= seconds * (1 + 1e-6)).all(), (back, seconds, hertz[:, place])


def check_allocation(
    given: Given, answer: Allocation, load: np.ndarray, links: Links, total_hz: float, options: dict[str, Any]
) -> None:
    """What holds for every answer, whatever was asked."""
    band, latency, bound = answer.bandwidth_hz, answer.latency_s, answer.lower_bound_s
    devices = load.shape[1]
    assert band.shape == (devices,), band.shape
    assert answer.weight.shape == load.shape, answer.weight.shape
    assert not np.isnan([latency, bound, answer.price_s_per_hz]).any(), (latency, bound, answer.price_s_per_hz)
    assert 0 <= bound <= latency, (bound, latency)
    expected = reference.status_of(latency, bound, options["tolerance"])
    assert answer.status == expected, (answer.status, expected, latency, bound)
    if expected == "infeasible":
        assert not band.any(), band
        return
    floor = np.broadcast_to(options.get("floor_hz", 0.0), devices)
    cap = np.broadcast_to(options.get("cap_hz", np.inf), devices)
    assert np.isfinite(band).all(), band
    assert band.sum() <= total_hz * (1 + 1e-11), (band.sum(), total_hz)
    assert (band >= floor).all(), (band, floor)
    assert (band <= cap).all(), (band, cap)
    busy = load.any(axis=1)
    assert (answer.weight >= 0).all(), answer.weight
    assert not answer.weight[load == 0].any(), answer.weight
    assert np.allclose(answer.weight[busy].sum(axis=1), 1), answer.weight
    _check_times(given, answer, load, links, total_hz, options)


def _check_times(
    given: Given, answer: Allocation, load: np.ndarray, links: Links, total_hz: float, options: dict[str, Any]
) -> None:
    """Latency as a plain twin computes it, and no other allocation below the bound."""
    fixed = np.zeros(load.shape) + np.asarray(options.get("fixed_s", 0.0), float)
    floor = np.broadcast_to(options.get("floor_hz", 0.0), load.shape[1])
    cap = np.broadcast_to(options.get("cap_hz", np.inf), load.shape[1])
    seconds = latency_of(load, links, fixed, answer.bandwidth_hz)
    assert close(seconds, answer.latency_s), (seconds, answer.latency_s)
    rest = total_hz - floor.sum()
    for share in (np.full(load.shape[1], 1.0 / load.shape[1]), given.rng.dirichlet(np.ones(load.shape[1]))):
        other = np.minimum(floor + max(rest, 0.0) * share, cap)
        assert answer.lower_bound_s <= latency_of(load, links, fixed, other) * (1 + ROUNDING), "below the bound"


def latency_of(load: np.ndarray, links: Links, fixed: np.ndarray, band: np.ndarray) -> float:
    table, used = links.table, load.any(axis=0)
    each = np.zeros(load.shape[1])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        each[used] = reference.seconds_per_token(table[:, used], links.flat, np.maximum(band[used], 1e-320))
        times = np.where(load > 0, load * each + load * table[4] + fixed, 0.0)
    return float(times.max(axis=1, initial=0.0).sum())


def close(one: float, other: float) -> bool:
    return one == other or abs(one - other) <= ROUNDING * abs(other) + 1e-300
