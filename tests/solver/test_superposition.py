"""Multicast by superposition coding: the closed forms, the region's border, and that nothing orthogonal is faster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.simulation.scenario_file import load_scenario
from wdmoe.simulation.study import run_study
from wdmoe.solver.layer.latency import Levers
from wdmoe.solver.layer.plan import Policy, plan_layer
from wdmoe.solver.layer.radio_state import RadioState
from wdmoe.solver.layer.superposition import broadcast_s, superpose
from wdmoe.wireless.broadcast import superposition_bits

BAND_HZ = 20e6
EXACT = 1e-9
seeds = st.integers(0, 2**32 - 1)


def a_case(seed: int, most: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """bits, snr by level: some levels without bits, some devices equally strong, SNRs over 80 dB."""
    rng = np.random.default_rng(seed)
    levels = int(rng.integers(1, most + 1))
    snr = np.sort(10 ** rng.uniform(-4, 4, levels))
    snr[1:] = np.where(rng.random(levels - 1) < 0.2, snr[:-1], snr[1:])
    bits = rng.uniform(1, 1e6, levels) * (rng.random(levels) < 0.8)
    bits[rng.integers(levels)] = 1e5
    return bits, np.sort(snr)


def needed_power(bits: np.ndarray, snr: np.ndarray, seconds: float) -> float:
    """The plain recursion: what the levels from the strongest down need in all, as a share of the power there is."""
    total = 0.0
    for load, strength in zip(bits[bits > 0][::-1], snr[bits > 0][::-1], strict=True):
        total += np.expm1(load * np.log(2) / (seconds * BAND_HZ)) * (1 / strength + total)
    return total


def by_bisection(bits: np.ndarray, snr: np.ndarray) -> float:
    """The least time by the recursion above, which falls in the time: no idea shared with the closed form."""
    least, most = 1e-12, 1e12
    with np.errstate(over="ignore"):
        for _ in range(200):
            middle = np.sqrt(least * most)
            least, most = (least, middle) if needed_power(bits, snr, middle) <= 1 else (middle, most)
    return float(most)


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_the_least_time_is_that_of_the_recursion(seed: int) -> None:
    bits, snr = a_case(seed)
    seconds = broadcast_s(bits, snr, BAND_HZ)
    assert seconds == pytest.approx(by_bisection(bits, snr), rel=EXACT)
    assert needed_power(bits, snr, seconds) == pytest.approx(1, rel=1e-7)


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_no_orthogonal_split_is_faster(seed: int) -> None:
    """Time division of the band, and frequency division of band and power, for the same messages."""
    bits, snr = a_case(seed)
    seconds = broadcast_s(bits, snr, BAND_HZ)
    in_turn = float((bits / (BAND_HZ * np.log2(1 + snr))).sum())
    assert seconds <= in_turn * (1 + EXACT)
    if (bits > 0).sum() > 1 and np.ptp(snr[bits > 0]) > 0.1:
        assert seconds < in_turn
    rng = np.random.default_rng(seed)
    for _ in range(20):
        band, power = rng.dirichlet(np.ones(len(bits)), 2)
        band_hz = band * BAND_HZ
        rate = band_hz * np.log2(1 + power * snr * BAND_HZ / band_hz)
        assert seconds <= (bits / rate).max() * (1 + EXACT)


@settings(max_examples=60, deadline=None)
@given(st.floats(1, 1e9), st.floats(-120, 80), st.floats(1e3, 1e9))
def test_one_device_has_the_plain_rate(bits: float, snr_db: float, band_hz: float) -> None:
    snr = 10 ** (snr_db / 10)
    plain = bits / (band_hz * np.log1p(snr) / np.log(2))
    assert broadcast_s(np.array([bits]), np.array([snr]), band_hz) == pytest.approx(plain, rel=1e-12)
    for same in (2, 5):  # equally strong devices are one
        parts = np.full(same, bits / same)
        assert broadcast_s(parts, np.full(same, snr), band_hz) == pytest.approx(plain, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.floats(-20, 40), st.floats(-20, 40), st.floats(0.01, 0.99))
def test_two_devices_lie_on_the_classical_border(first_db: float, second_db: float, share: float) -> None:
    """R1 = log2(1 + b P / s1), R2 = log2(1 + (1 - b) P / (b P + s2)): loads in that ratio take one second."""
    weak_db, strong_db = sorted((first_db, second_db))
    per_use = superposition_bits(np.array([strong_db, weak_db]), share)
    snr = 10 ** (np.array([strong_db, weak_db]) / 10)
    tokens = per_use * BAND_HZ
    sent = superpose(tokens, np.array([[0], [1]]), snr, BAND_HZ)
    assert sent.seconds == pytest.approx(1, rel=EXACT)
    if strong_db > weak_db + 0.1:
        assert sent.power == pytest.approx([1 - share, share], rel=1e-6)


def test_a_token_of_several_devices_is_the_weakest_ones_message() -> None:
    snr = np.array([100.0, 1.0, 10.0])
    device = np.array([[0, 2], [1, 0], [-1, 0], [-1, -1]])
    sent = superpose(np.array([5.0, 7.0, 11.0, 13.0]), device, snr, BAND_HZ)
    np.testing.assert_array_equal(sent.bits, [7, 5, 11])
    np.testing.assert_array_equal(sent.wanted, [[True, True, False], [True, False, True], [True, False, False]])
    assert sent.seconds == broadcast_s(sent.bits, np.sort(snr), BAND_HZ)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_on_another_channel_it_takes_what_that_channel_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    snr = 10 ** rng.uniform(-2, 3, 5)
    device = rng.integers(-1, 5, (12, 2))
    sent = superpose(rng.uniform(1, 1e5, 12), device, snr, BAND_HZ)
    assert sent.power.sum() == pytest.approx(float(bool(sent.bits.any())), rel=1e-9)
    assert sent.seconds_at(snr, BAND_HZ) == pytest.approx(sent.seconds, rel=1e-9)
    assert sent.seconds_at(snr * 2, BAND_HZ) <= sent.seconds * (1 + EXACT)
    worse = snr * rng.uniform(0.1, 1, 5)
    own = superpose(np.zeros(0), np.zeros((0, 2), int), worse, BAND_HZ)
    assert own.seconds == own.seconds_at(worse, BAND_HZ) == 0
    assert sent.seconds_at(worse, BAND_HZ) >= sent.seconds * (1 - EXACT)


def test_a_device_that_hears_nothing_waits_for_ever_unless_it_wants_nothing() -> None:
    snr = np.array([0.0, 1.0])
    assert superpose(np.ones(2), np.array([[0], [1]]), snr, BAND_HZ).seconds == np.inf
    alone = superpose(np.ones(1), np.array([[1]]), snr, BAND_HZ)
    assert alone.seconds == alone.seconds_at(snr, BAND_HZ) == pytest.approx(1 / BAND_HZ)
    assert alone.seconds_at(np.zeros(2), BAND_HZ) == np.inf


@settings(max_examples=60, deadline=None)
@given(seeds, st.booleans(), st.sampled_from([4, 16]))
def test_a_layer_is_never_slower_for_it(seed: int, flat: bool, bits: int) -> None:
    rng = np.random.default_rng(seed)
    snr = 10 ** rng.uniform(-1, 3, (2, 4))
    rates = np.log2(1 + snr) if flat else (None, None)
    compute = rng.uniform(1e-6, 1e-4, (2, 4))
    air = RadioState(
        downlink_snr_hz=snr[0] * BAND_HZ,
        uplink_snr_hz=snr[1] * BAND_HZ,
        total_hz=BAND_HZ,
        hidden=64,
        token_s=compute[0],
        expert_s=compute[1],
        downlink_efficiency=rates[0],
        uplink_efficiency=rates[1],
    )
    experts = np.argsort(rng.random((12, 8)), axis=1)[:, :3].astype(np.int32)
    weights = np.full((12, 3), 1 / 3)
    holders = np.repeat(np.eye(4, dtype=bool), 2, axis=0)
    plain, weakest, superposed = (
        plan_layer(experts, weights, holders, air, Policy(levers=Levers(multicast=kind, bits=bits))).time
        for kind in ("none", "weakest", "superposition")
    )
    assert superposed.latency_s <= min(plain.latency_s, weakest.latency_s) * (1 + EXACT)
    if weakest.multicast_s:
        assert 0 < superposed.multicast_s <= weakest.multicast_s * (1 + EXACT)


def test_true_is_the_weakest_rate_as_before() -> None:
    assert Levers(multicast=True) == Levers(multicast="weakest")
    assert Levers(multicast=False) == Levers()
    with pytest.raises(ValueError, match="multicast must be one of none, weakest, superposition"):
        Levers(multicast="loud")


def test_the_simulator_is_faster_with_it() -> None:
    scenario = load_scenario("journal")
    cast = scenario.variants[-2]
    levers = replace(cast.policy.levers, multicast="superposition")
    variants = (cast, replace(cast, name="superposed", policy=replace(cast.policy, levers=levers)))
    model = replace(scenario.model, tokens=16)
    latency = run_study(replace(scenario, draws=2, model=model, variants=variants), 1).of("latency_s")
    assert (latency[:, 1] < latency[:, 0]).all()
