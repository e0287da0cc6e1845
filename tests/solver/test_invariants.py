"""What must hold for every input, whatever the numbers: properties of the problem, not of the method.

1 more bandwidth never hurts, 2 a better link never hurts, 3 more load never helps, 4 units do not matter, 5 the order
of devices does not matter, 6 a block twice counts twice, 7 one block's devices finish together, 8 the bound is a bound,
9 what a drop does to the weight-to-latency ratio, 10 the cosine is scale free, 11 a larger budget could keep no less.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.lab.bandwidth_judges import TOTAL_HZ, draw_case
from wdmoe.solver import Links, allocate_bandwidth, prune_experts, select_experts, select_within_budget
from wdmoe.solver.reference import bandwidth as reference

GAP = 1e-8  # of many blocks: answers are this close to the least latency
ROUNDING = 1e-9
NAMES = ("downlink_bits", "uplink_bits", "downlink_", "uplink_", "compute_s")

seeds = st.integers(0, 2**32)
sizes = st.integers(1, 8)
factors = st.floats(1.0, 100.0)
every = settings(max_examples=60)


def links_of(table, flat):
    kind = "efficiency" if flat else "snr_hz"
    return Links(**{name + kind if name[-1] == "_" else name: row for name, row in zip(NAMES, table, strict=True)})


def changed(links, bits=1.0, quality=1.0, compute=1.0, order=slice(None)):
    scale = np.broadcast_arrays(bits, bits, quality, quality, compute, np.ones(links.table.shape[1]))[:5]
    return links_of((links.table * scale)[:, order], links.flat)


def latency(load, links, total_hz=TOTAL_HZ, **options):
    answer = allocate_bandwidth(load, links, total_hz, **options)
    assert answer.status == "optimal"
    return answer.latency_s


@every
@given(seeds, sizes, sizes, factors)
def test_more_bandwidth_never_hurts(seed, blocks, devices, factor):
    load, links = draw_case(np.random.default_rng(seed), blocks, devices)
    less, more = (allocate_bandwidth(load, links, hertz) for hertz in (TOTAL_HZ, TOTAL_HZ * factor))
    assert more.lower_bound_s <= less.latency_s
    if more.status == "optimal":  # with band in plenty the search may stop at its limit, and says so
        assert more.latency_s <= less.latency_s * (1 + GAP)


@every
@given(seeds, sizes, sizes)
def test_a_better_link_never_hurts(seed, blocks, devices):
    rng = np.random.default_rng(seed)
    load, links = draw_case(rng, blocks, devices)
    better = changed(links, quality=rng.uniform(1, 10, devices), compute=rng.uniform(0.1, 1, devices))
    assert latency(load, better) <= latency(load, links) * (1 + GAP)


@every
@given(seeds, sizes, sizes)
def test_more_load_never_helps(seed, blocks, devices):
    rng = np.random.default_rng(seed)
    load, links = draw_case(rng, blocks, devices)
    more = load + rng.poisson(0.5, load.shape) * (links.table[2] > 0)
    assert latency(load, links) <= latency(more, links) * (1 + GAP)


@every
@given(seeds, sizes, sizes, st.floats(1e-6, 1e6))
def test_hertz_and_bits_in_other_units_change_no_time(seed, blocks, devices, unit):
    load, links = draw_case(np.random.default_rng(seed), blocks, devices)
    one = allocate_bandwidth(load, links, TOTAL_HZ)
    other = allocate_bandwidth(load, changed(links, bits=unit, quality=1 if links.flat else unit), TOTAL_HZ * unit)
    assert other.latency_s == pytest.approx(one.latency_s, rel=ROUNDING)
    np.testing.assert_allclose(other.bandwidth_hz, one.bandwidth_hz * unit, rtol=1e-4, atol=1e-6 * TOTAL_HZ * unit)


@every
@given(seeds, sizes, sizes, st.floats(1e-6, 1e6))
def test_seconds_in_other_units_change_no_band(seed, blocks, devices, unit):
    load, links = draw_case(np.random.default_rng(seed), blocks, devices)
    one = allocate_bandwidth(load, links, TOTAL_HZ)
    other = allocate_bandwidth(load, changed(links, bits=unit, compute=unit), TOTAL_HZ)
    assert other.latency_s == pytest.approx(one.latency_s * unit, rel=ROUNDING)
    np.testing.assert_allclose(other.bandwidth_hz, one.bandwidth_hz, rtol=1e-4, atol=1e-6 * TOTAL_HZ)


@every
@given(seeds, sizes, sizes)
def test_permuting_devices_permutes_the_answer(seed, blocks, devices):
    rng = np.random.default_rng(seed)
    load, links = draw_case(rng, blocks, devices)
    order = rng.permutation(devices)
    one = allocate_bandwidth(load, links, TOTAL_HZ)
    other = allocate_bandwidth(load[:, order], changed(links, order=order), TOTAL_HZ)
    assert other.latency_s == pytest.approx(one.latency_s, rel=ROUNDING)
    np.testing.assert_allclose(other.bandwidth_hz, one.bandwidth_hz[order], rtol=1e-4, atol=1e-6 * TOTAL_HZ)


@every
@given(seeds, sizes, sizes)
def test_a_block_twice_counts_twice(seed, blocks, devices):
    load, links = draw_case(np.random.default_rng(seed), blocks, devices)
    assert latency(np.concatenate([load, load]), links) == pytest.approx(2 * latency(load, links), rel=2 * GAP)


@every
@given(seeds, sizes, st.booleans())
def test_devices_of_one_block_finish_together_where_no_limit_holds_them(seed, devices, limited):
    rng = np.random.default_rng(seed)
    load, links = draw_case(rng, 1, devices)
    floor = rng.uniform(0, 1, devices) * TOTAL_HZ / devices if limited else np.zeros(devices)
    cap = floor + rng.uniform(0.1, 3, devices) * TOTAL_HZ / devices if limited else np.full(devices, np.inf)
    options = {"floor_hz": floor, "cap_hz": cap} if limited else {}
    answer = allocate_bandwidth(load, links, TOTAL_HZ, **options)
    busy = load[0] > 0
    assume(busy.any())
    band = answer.bandwidth_hz[busy]
    each = reference.seconds_per_token(links.table[:, busy], links.flat, band) + links.table[4, busy]
    finish = load[0, busy] * each
    inside = (band > floor[busy] * (1 + 1e-9)) & (band < cap[busy] * (1 - 1e-9))
    np.testing.assert_allclose(finish[inside], answer.latency_s, rtol=ROUNDING)
    assert (finish <= answer.latency_s * (1 + ROUNDING)).all()


@every
@given(seeds, sizes, sizes, st.integers(1, 10))
def test_no_allocation_is_below_the_bound(seed, blocks, devices, iterations):
    rng = np.random.default_rng(seed)
    load, links = draw_case(rng, blocks, devices)
    answer = allocate_bandwidth(load, links, TOTAL_HZ, iterations=iterations)
    assert answer.lower_bound_s <= answer.latency_s
    for share in rng.dirichlet(np.ones(devices), 20):
        band = 0.5 * (share + answer.bandwidth_hz / TOTAL_HZ + 1e-12) * TOTAL_HZ
        assert answer.lower_bound_s <= reference.latency(load, links.table, links.flat, band) * (1 + 1e-11)


@every
@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(1e-3, 1), st.floats(1e-3, 1), st.booleans(), st.booleans())
def test_what_dropping_the_second_expert_does_to_the_ratio(w1, w2, t1, t2, mean, renormalise):
    w1, w2 = (max(w1, w2) / (w1 + w2), min(w1, w2) / (w1 + w2))
    both, one = (
        prune_experts(
            [[0, 1]],
            [[w1, w2]],
            [t1, t2],
            wlr="mean" if mean else "sum",
            renormalise=renormalise,
            available=[True, kept],
        )
        for kept in (True, False)
    )
    rises = {
        (True, False): w1 / t1 - w2 / t2,
        (False, False): -1.0,
        (False, True): t2 - t1,
        (True, True): (1 + w2) / w2 - t1 / t2,
    }[mean, renormalise]
    assume(abs(rises) > 1e-9)
    assume(abs(both.wlr - one.wlr) > 1e-12 * both.wlr)
    assert (one.wlr > both.wlr) == (rises > 0)


@every
@given(seeds, st.floats(1e-6, 1e6))
def test_the_cosine_cannot_see_that_all_are_slow(seed, factor):
    rng = np.random.default_rng(seed)
    gate, latency_s = rng.dirichlet(np.ones(8), 16), rng.uniform(1e-3, 5e-2, 8)
    fast, slow = (select_experts(gate, latency_s * by, policy="cosine", top_k=2) for by in (1.0, factor))
    np.testing.assert_array_equal(slow.experts, fast.experts)
    assert slow.wlr == pytest.approx(fast.wlr / factor)


@every
@given(seeds, factors, factors)
def test_a_larger_budget_or_band_could_keep_no_less(seed, time, band):
    """Of `upper_bound`: what is kept is chosen greedily, and greed can do worse with more."""
    rng = np.random.default_rng(seed)
    _, links = draw_case(rng, 1, 4, False)
    gate = rng.dirichlet(np.ones(8), 12)
    experts = np.argsort(-gate, axis=1)[:, :2].astype(np.int32)
    weights, home = np.take_along_axis(gate, experts, axis=1), np.arange(8, dtype=np.int32) % 4
    budget_s = rng.uniform(0.1, 1) * latency(
        np.bincount(home[experts].ravel(), minlength=4) * (links.table[2] > 0), links
    )
    less = select_within_budget(experts, weights, home, links, TOTAL_HZ, budget_s)
    more = select_within_budget(experts, weights, home, links, TOTAL_HZ * band, budget_s * time)
    assume(less.status == "within")
    assert more.status == "within"
    assert more.upper_bound >= less.upper_bound * (1 - 1e-9)
    assert more.upper_bound >= less.kept
