"""Random calls of the selection policies, and what holds for every answer."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.lab.solver_fuzz.bandwidth_cases import some_links, usual_links
from tests.lab.solver_fuzz.numbers import Given
from wdmoe.solver import (
    BudgetChoice,
    Links,
    _native,
    choose_copies,
    prune_experts,
    replace_far,
    select_at_most_dropped,
    select_experts,
    select_within_budget,
    shed_bottleneck,
)
from wdmoe.solver.reference import native as twin
from wdmoe.solver.reference.budget import choose_within_budget
from wdmoe.solver.selection import POLICIES, WLR_DEFINITIONS

WEIGHTS = np.array([0.0, 1e-300, 1e-9, 0.1, 0.5, 0.5, 1.0, 1e9, 1e100])
SECONDS = np.array([1e-100, 1e-30, 1e-6, 1e-3, 1e-3, 1.0, 1e30, 1e100])
TOTALS = (1.0, 1e6, 20e6, 1e30)


def some_assignments(given: Given, devices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """experts, weights (tokens, top_k) and device_of, of either shape that it may have."""
    rng = given.rng
    tokens, top_k, experts = given.one(0, 1, 2, 5, 9), given.one(1, 1, 2, 3), int(rng.integers(1, 7))
    chosen = rng.integers(-1 if given.chance(0.3) else 0, experts, (tokens, top_k)).astype(
        given.one(np.int32, np.int64)
    )
    home = rng.integers(-1 if given.chance(0.3) else 0, devices, experts)
    if given.chance(0.3):
        home = rng.integers(-1, devices, (tokens, top_k))
    return chosen, given.values((tokens, top_k), WEIGHTS), home.astype(np.int32)


def budget(given: Given) -> None:
    devices = int(given.rng.integers(1, 5))
    links = usual_links(given, devices) if given.chance(0.5) else some_links(given, (devices,))
    experts, weights, home = some_assignments(given, links.table.shape[-1])
    weights = np.minimum(weights, 1e100)
    shown = given.odd(experts), given.odd(weights, shape=False), given.odd(home, shape=False, numbers=False)
    total_hz, usual = given.one(*TOTALS), float(10.0 ** given.rng.uniform(-4, 1))
    if given.chance(0.5):
        budget_s = given.one(usual, usual, 1e-30, 1e-300, 1e30, 1e300)
        choice = select_within_budget(*shown, links, total_hz, budget_s, given.chance(0.5))
        met = choice.latency_s <= min(budget_s, 1e30) * (1 + 1e-9)
        assert choice.status == ("within" if met else "over"), (choice.status, choice.latency_s, budget_s)
    else:
        share = given.one(0.0, 0.0, 1e-300, 0.1, 0.5, 1.0)
        choice = select_at_most_dropped(*shown, links, total_hz, share, given.chance(0.5))
        met = choice.kept >= (1 - share) * weights[experts >= 0].sum() * (1 - 2e-9) and np.isfinite(choice.latency_s)
        assert met or choice.status == "over", (choice.kept, share, weights)
    device = np.where(experts >= 0, home[np.maximum(experts, 0)] if home.ndim == 1 else home, -1)
    _check_choice(choice, experts, weights, device, total_hz, links)
    if given.chance(0.03) and choice.lower_bound_s == 0 and links.table[0, 0] == 16384.0 and 1e-6 < usual < 1e3:
        _compare_budget(choice, links, device, weights, total_hz, usual)


def _check_choice(
    choice: BudgetChoice, experts: np.ndarray, weights: np.ndarray, device: np.ndarray, total_hz: float, links: Links
) -> None:
    kept = choice.experts >= 0
    reached = (device >= 0) & ((links.table[:2] == 0) | (links.table[2:4] > 0)).all(axis=0)[device]
    assert (choice.experts[kept] == experts[kept]).all(), choice.experts
    assert not (kept & (device < 0)).any() or choice.status == "over", "kept what nobody serves"
    assert np.any(kept, axis=1)[np.any(reached, axis=1)].all(), "a token lost its last expert"
    assert not np.isnan(choice.bandwidth_hz).any(), choice.bandwidth_hz
    assert choice.bandwidth_hz.sum() <= total_hz * (1 + 1e-11), choice.bandwidth_hz
    assert choice.kept <= choice.upper_bound, (choice.kept, choice.upper_bound)
    assert 0 <= choice.lower_bound_s <= choice.latency_s, (choice.lower_bound_s, choice.latency_s)
    assert abs(choice.kept - weights[kept].sum()) <= 1e-9 * choice.kept, (choice.kept, weights)
    assert ((choice.dropped_weight >= -1e-12) & (choice.dropped_weight <= 1)).all(), choice.dropped_weight


def _compare_budget(
    choice: BudgetChoice, links: Any, device: np.ndarray, weights: np.ndarray, total_hz: float, budget_s: float
) -> None:
    """The plain twin finds a choice exactly where the native one does, and of the same weight."""
    if not device.size or total_hz < 1e6:
        return
    given_weights = np.where(device >= 0, weights, 0.0)
    kept, bound, fits = choose_within_budget(device.astype(np.int32), given_weights, links, total_hz, budget_s)
    mine, upper, within = _native.choose_within_budget(
        np.ascontiguousarray(device, np.int32),
        np.ascontiguousarray(given_weights),
        links.table,
        links.flat,
        total_hz,
        budget_s,
    )
    assert within == fits, (within, fits)
    if fits:
        total = float(given_weights[kept].sum())
        assert abs(float(given_weights[mine != 0].sum()) - total) <= 1e-6 * max(total, 1e-300), (mine, kept)
        assert abs(upper - bound) <= 1e-6 * max(bound, 1e-300), (upper, bound)


def prune(given: Given) -> None:
    tokens, count = given.one(0, 1, 3, 8), int(given.rng.integers(1, 10))
    gate = given.values((tokens, count), WEIGHTS)
    latency = given.values((count,) if given.chance(0.7) else (tokens, count), SECONDS)
    latency = np.clip(latency, 1e-100, 1e100)
    policy, renormalise = given.one(*POLICIES), given.chance(0.5)
    options: dict[str, Any] = {"policy": policy, "renormalise": renormalise, "wlr": given.one(*WLR_DEFINITIONS)}
    options |= {"theta": given.one(0.0, 0.5, 1.0), "theta_step": given.one(0.001, 0.05, 1.0)}
    if given.chance(0.3):
        options["available"] = given.odd(given.rng.random(count) < 0.6, numbers=False)
    if policy in ("bottleneck", "budget"):
        options["device_of"] = given.odd(given.rng.integers(-1, 3, count), numbers=False)
        options["budget_s"] = given.one(1e-6, 1.0, 1e9)
    top_k = given.one(1, 2, count, 0)
    shown, times = given.odd(gate, shape=False), given.odd(latency)
    if policy in ("bottleneck", "budget") and latency.ndim == 2 and len(latency) != 1:
        given.wrong = True
    choice = select_experts(shown, times, top_k=top_k, substitute=given.chance(0.3), **options)
    assert choice.experts.shape == (tokens, top_k), choice.experts.shape
    assert ((choice.experts >= -1) & (choice.experts < count)).all(), choice.experts
    assert np.isfinite(choice.weights).all(), choice.weights
    assert (choice.weights >= 0).all(), choice.weights
    assert not choice.weights[choice.experts < 0].any(), choice.weights
    assert not np.isnan(choice.wlr), choice.wlr
    if given.chance(0.3):
        _compare_prune(given, gate, latency, top_k, renormalise)


def _compare_prune(given: Given, gate: np.ndarray, latency: np.ndarray, top_k: int, renormalise: bool) -> None:
    """Equal to the twin, to the bit."""
    rows, times = np.ascontiguousarray(gate), np.ascontiguousarray(np.atleast_2d(latency))
    available = np.asarray(given.rng.random(gate.shape[1]) < 0.7, np.uint8) if given.chance(0.5) else None
    sides = []
    with np.errstate(all="ignore"):
        for side in (_native, twin):
            experts, weights = side.top_k(rows, top_k, available, renormalise)
            dropped, wlr, theta = side.prune(
                experts, weights, times, available, True, renormalise, False, 0.5, 0.05, 1.05
            )
            sides.append((experts.tolist(), weights.tolist(), dropped.tolist(), wlr, theta))
    assert sides[0] == sides[1], sides


def prune_given(given: Given) -> None:
    count = 6
    experts, weights, _ = some_assignments(given, 3)
    latency = np.clip(given.values((count,), SECONDS), 1e-100, 1e100)
    choice = prune_experts(
        given.odd(experts),
        given.odd(weights, shape=False),
        given.odd(latency, shape=False),
        given.one("topk", "cosine"),
    )
    kept = choice.experts >= 0
    assert (choice.experts[kept] == experts[kept]).all(), choice.experts
    if choice.experts.size:
        assert np.any(kept, axis=1)[np.any(experts >= 0, axis=1)].all(), "a token lost its last expert"


def bottleneck(given: Given) -> None:
    devices = int(given.rng.integers(1, 5))
    experts, weights, home = some_assignments(given, devices)
    token_s = np.clip(given.values((devices,), SECONDS), 1e-100, 1e100)
    light = given.one(0.0, 0.35, 1.0)
    shown = (
        given.odd(experts),
        given.odd(weights, shape=False),
        given.odd(home, shape=False, numbers=False),
        given.odd(token_s, shape=False),
    )
    kept = shed_bottleneck(*shown, light)
    device = np.where(experts >= 0, home[np.maximum(experts, 0)] if home.ndim == 1 else home, -1)
    assert kept.dtype == np.bool_, kept.dtype
    assert not kept[device < 0].any(), kept
    if kept.size:
        assert np.any(kept, axis=1)[np.any(device >= 0, axis=1)].all(), "a token lost its last expert"


def copies(given: Given) -> None:
    devices = int(given.rng.integers(1, 5))
    experts, _, _ = some_assignments(given, devices)
    count = max(int(experts.max(initial=0)) + 1, 1)
    holders = given.rng.random((count, devices)) < 0.6
    token_s = np.clip(given.values((devices,), SECONDS), 1e-100, 1e100)
    busy_s = None if given.chance(0.5) else given.odd(np.abs(given.values((devices,))))
    device = choose_copies(
        given.odd(experts, shape=False), given.odd(holders, numbers=False), given.odd(token_s, shape=False), busy_s
    )
    served = (experts >= 0) & np.any(holders, axis=1)[np.maximum(experts, 0)]
    assert ((device >= 0) == served).all(), (device, experts)
    assert holders[experts[served], device[served]].all(), "a device that does not hold the expert"
    _check_makespan(experts, holders, token_s, busy_s, device, served)


def _check_makespan(
    experts: np.ndarray, holders: np.ndarray, token_s: np.ndarray, busy_s: Any, device: np.ndarray, served: np.ndarray
) -> None:
    """Not later than each assignment to the holder that is done with it first."""
    busy = np.zeros(len(token_s)) if busy_s is None else np.asarray(busy_s, float)
    greedy = np.zeros(len(token_s))
    for expert in experts[served].tolist():
        finish = np.where(holders[expert], busy + (greedy + 1) * token_s, np.inf)
        greedy[int(np.argmin(finish))] += 1
    ends = [
        float(np.where(load > 0, busy + load * token_s, 0.0).max())
        for load in (np.bincount(device[served], minlength=len(token_s)), greedy)
    ]
    assert ends[0] <= ends[1] * (1 + 1e-12), ends


def substitute(given: Given) -> None:
    experts, weights, _ = some_assignments(given, 2)
    count = max(int(experts.max(initial=0)) + 1, 1)
    alike = given.rng.uniform(-1, 1, (count, count))
    seconds = np.clip(given.values((count,), SECONDS), 1e-100, 1e100)
    if given.chance(0.3):
        seconds[given.rng.integers(count)] = np.inf
    least, factor = given.one(-1.0, 0.0, 0.5), given.one(1.0, 2.0, 1e300)
    changed = replace_far(
        given.odd(experts),
        given.odd(weights, shape=False),
        given.odd(alike, numbers=False),
        given.odd(seconds, numbers=False),
        least,
        factor,
        given.one(0.0, 0.5, 1.0),
    )
    assert changed.shape == experts.shape, changed.shape
    moved = changed != experts
    assert (experts[moved] >= 0).all(), changed
    assert (alike[experts[moved], changed[moved]] >= least).all(), "not similar enough"
    assert (seconds[changed[moved]] < seconds[experts[moved]]).all(), "not faster"
