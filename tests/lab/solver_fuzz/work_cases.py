"""Random calls of grouping, combining and placing, and what holds for every answer."""

from __future__ import annotations

import numpy as np

from tests.lab.solver_fuzz.bandwidth_cases import some_links
from tests.lab.solver_fuzz.numbers import Given
from wdmoe.solver import (
    PlacementProblem,
    combine,
    combine_partials,
    group_by_device,
    is_finite,
    place_experts,
    place_greedily,
)
from wdmoe.solver.priced_drop import drop_at_price
from wdmoe.solver.ranking import rank_weights
from wdmoe.solver.reference import native as twin

SINGLES = np.array([0.0, 1e-45, 1e-30, 0.5, 1.0, -1.0, 3e38], np.float32)


def group(given: Given) -> None:
    tokens, top_k, count = given.one(0, 1, 4, 9), given.one(0, 1, 2, 3), given.one(0, 1, 5)
    experts = given.rng.integers(-1, max(count, 1), (tokens, top_k)).astype(np.int32)
    weights = SINGLES[given.rng.integers(len(SINGLES), size=(tokens, top_k))]
    home = given.rng.integers(-1, 4, count).astype(np.int32)
    if given.chance(0.2):
        broken = (experts, home)[given.one(0, 1)]
        broken.flat[: 1 if broken.size else 0] = given.one(-2, 2**31 - 1, 70_000, -(2**31))
    if given.chance(0.1):
        experts, weights = np.ma.masked_array(experts), weights
        given.wrong = True
    groups = group_by_device(experts, weights, home)
    other = twin.group_by_device(experts, weights, home)
    assert (len(groups), groups.unserved) == (len(other), other.unserved), groups
    for mine, plain in zip(groups, other, strict=True):
        assert (mine.device, mine.experts, mine.counts) == (plain.device, plain.experts, plain.counts), mine
        for name in ("token_rows", "rows", "weights"):
            assert np.array_equal(getattr(mine, name), getattr(plain, name)), (name, mine)


def add_up(given: Given) -> None:
    tokens, hidden, n = given.one(0, 1, 5), given.one(0, 1, 7), given.one(0, 1, 6)
    partial = SINGLES[given.rng.integers(len(SINGLES), size=(n, hidden))]
    rows = given.rng.integers(0, max(tokens, 1), n).astype(given.one(np.int32, np.int64))
    if tokens == 0 and n and hidden:
        given.wrong = True
    if given.chance(0.1) and n and hidden and tokens:
        rows[0] = given.one(-1, tokens, 2**31 - 1, 2**31 if rows.dtype == np.int64 else -7)
        given.wrong = True
    shown, at = given.odd(partial, numbers=False), given.odd(rows, numbers=False)
    if n == 0 or hidden == 0:
        given.wrong = False  # nothing to add: shapes of nothing are not looked at closely
    with np.errstate(all="ignore"):
        if given.chance(0.5):
            found = combine(tokens, hidden, [(shown, at)] * given.one(1, 2), given.one(None, np.ones(tokens)))
            assert found.shape == (tokens, hidden), found.shape
            assert is_finite(found) == bool(np.isfinite(found).all()), found
            return
        out = np.zeros((tokens, hidden), np.float32)
        combine_partials(out, shown, at, given.one(None, np.full(n, 0.5)))
        assert out.shape == (tokens, hidden), out


def place(given: Given) -> None:
    devices, layers, experts = int(given.rng.integers(1, 4)), given.one(1, 2), given.one(1, 3)
    frequency = np.minimum(given.values((layers, experts)), 1e30)
    memory = given.one(np.full(devices, 1e3), given.values((devices,)))
    speed = np.clip(given.values((devices,)), 1e-30, 1e30)
    if given.chance(0.5):
        rows = given.odd(frequency, shape=False), given.odd(speed), given.odd(memory, shape=False)
        plan = place_greedily(PlacementProblem(*rows, np.ones(layers), given.one(1, 2)))
        assert (plan.status == "optimal") <= (plan.latency_s <= plan.lower_bound_s * (1 + 1e-8)), plan
        assert 0 <= plan.lower_bound_s <= plan.latency_s, plan
        assert (plan.share[~plan.held] == 0).all(), plan
        assert not np.isnan(plan.share).any(), plan
        return
    layer = np.repeat(np.arange(layers), experts)
    load, room, pace = given.odd(frequency.ravel()), given.odd(memory, shape=False), given.odd(speed)
    found = place_experts(np.ones(layers * experts), load, room, pace, layer)
    assert ((found >= -1) & (found < devices)).all(), found
    assert (np.bincount(found[found >= 0], minlength=devices) <= memory * (1 + 1e-9)).all(), found


def price(given: Given) -> None:
    links = some_links(given, (3,))
    device = given.rng.integers(-1, links.table.shape[-1], given.one(1, 2, 4))
    worth = given.rng.uniform(0, 1, len(device))
    kept = drop_at_price(device, worth, links, 1e6, given.one(0.0, 1e-3, 1e9), given.one(0.0, 0.5, 10.0))
    assert kept.any(), kept
    assert worth[~kept].sum() <= 10.0, kept


def rank(given: Given) -> None:
    scores = given.rng.normal(0, 10.0 ** given.rng.uniform(-3, 3), (3, 4))
    experts = given.rng.integers(-1, 4, (3, 2))
    weights = rank_weights(scores, experts, given.one(1e-3, 1.0, 1e3), given.one("probability", "energy"))
    assert np.isfinite(weights).all(), weights
    assert (weights >= 0).all(), weights
