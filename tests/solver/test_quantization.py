"""Fewer bits for light assignments: the bound on each token, what goes first, and what it does to a layer's time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.backbone.evaluation.simulated_experts import Order, travelled
from wdmoe.solver.layer.latency import Levers
from wdmoe.solver.layer.plan import LayerPlan, Policy, plan_layer
from wdmoe.solver.layer.quantization import BITS, as_widest_of_device, distortion, round_within, vector_bits
from wdmoe.solver.layer.radio_state import RadioState

DEVICES, TOP_K = 4, 3
HOLDERS = np.repeat(np.eye(DEVICES, dtype=bool), 2, axis=0)
EXACT = 1 + 1e-9
seeds = st.integers(0, 2**32 - 1)


def a_case(seed: int, tokens: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """weights, device, price: some weights 0, some assignments dropped, one device that nothing reaches."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(TOP_K), tokens) * rng.uniform(0.1, 10, (tokens, 1))
    weights[rng.random(weights.shape) < 0.1] = 0
    price = 10 ** rng.uniform(-6, 0, DEVICES)
    price[0] = np.inf if rng.random() < 0.2 else price[0]
    return weights, rng.integers(-1, DEVICES, (tokens, TOP_K)), price


def distorted(weights: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """(tokens,) sum of w d(b)."""
    each = np.select([bits == b for b in BITS], [distortion(b) for b in BITS], 0.0)
    return (weights * each).sum(axis=1)


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from([8, 16]), st.floats(0, 0.1))
def test_no_token_is_distorted_more_and_nothing_that_fits_is_left(seed: int, most: int, bound: float) -> None:
    weights, device, price = a_case(seed)
    bits = round_within(weights, device, price, most, bound)
    served = device >= 0
    assert (bits[~served] == 0).all()
    assert np.isin(bits[served], [each for each in BITS if each <= most]).all()
    total = np.where(served, weights, 0).sum(axis=1)
    spent = distorted(weights, bits)
    if bound >= distortion(most):
        assert (spent <= bound * total + 1e-9).all()
    lower = {16.0: 8, 8.0: 4}
    for token, slot in np.argwhere(served & (bits > 4)):
        high, low = int(bits[token, slot]), lower[bits[token, slot]]
        more = weights[token, slot] * (distortion(low) - distortion(high))
        assert spent[token] + more > bound * total[token] or not more


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0.001, 0.1))
def test_the_lighter_of_equally_dear_assignments_has_no_more_bits(seed: int, bound: float) -> None:
    weights, device, _ = a_case(seed)
    device = np.maximum(device, 0)
    bits = round_within(weights, device, np.ones(DEVICES), 16, bound)
    light_first = np.take_along_axis(bits, np.argsort(weights, axis=1, kind="stable"), axis=1)
    assert (np.diff(light_first, axis=1) >= 0).all()


def test_the_dearer_of_equally_heavy_assignments_goes_first() -> None:
    weights, device = np.array([[0.5, 0.5]]), np.array([[0, 1]])
    bound = distortion(8) + 0.5 * (distortion(4) - distortion(8))
    assert round_within(weights, device, np.array([1.0, 2.0]), 16, bound).tolist() == [[8, 4]]
    assert round_within(weights, device, np.array([2.0, 1.0]), 16, bound).tolist() == [[4, 8]]
    assert round_within(weights, device, np.array([2.0, 1.0]), 4, 1.0).tolist() == [[4, 4]]


@pytest.mark.parametrize("bits", BITS)
def test_what_really_arrives_is_within_the_bound(bits: int) -> None:
    rng = torch.Generator().manual_seed(1)
    vectors = torch.randn(500, 64, generator=rng) * 10 ** torch.linspace(-2, 3, 500)[:, None]
    wrong = (travelled(vectors, bits) - vectors).abs().amax(dim=1) / vectors.abs().amax(dim=1)
    assert float(wrong.max()) <= distortion(bits) * (1 + 1e-5)
    assert float(wrong.max()) > 0.7 * distortion(bits), "the bound is not loose"


def an_air(rng: np.random.Generator) -> RadioState:
    snr_hz = 1e6 * 10 ** rng.uniform(0, 3, (2, DEVICES))
    compute = rng.uniform(1e-6, 1e-4, (2, DEVICES))
    return RadioState(
        downlink_snr_hz=snr_hz[0],
        uplink_snr_hz=snr_hz[1],
        total_hz=20e6,
        hidden=64,
        token_s=compute[0],
        expert_s=compute[1],
    )


def planned(seed: int, **levers: object) -> LayerPlan:
    rng = np.random.default_rng(seed)
    air = an_air(rng)
    experts = np.argsort(rng.random((12, 2 * DEVICES)), axis=1)[:, :TOP_K].astype(np.int32)
    policy = Policy(levers=Levers(**levers))  # type: ignore[arg-type]
    return plan_layer(experts, rng.dirichlet(np.ones(TOP_K), 12), HOLDERS, air, policy)


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(["none", "weakest", "superposition"]), st.booleans(), st.sampled_from([8, 16]))
def test_a_layer_is_never_slower_for_it(seed: int, cast: str, sums: bool, bits: int) -> None:
    usual = {"multicast": cast, "partial_sums": sums, "bits": bits}
    plain, light = planned(seed, **usual), planned(seed, max_distortion=0.03, **usual)
    assert light.time.latency_s <= plain.time.latency_s * EXACT
    assert light.time.up_bits < plain.time.up_bits
    assert (light.device == plain.device).all()
    order = Order.of(light, sums)
    np.testing.assert_array_equal(order.up_bits, light.time.bits)
    if light.time.multicast_s:
        assert (order.down_bits == light.time.bits.max(axis=1, keepdims=True)).all()
    else:
        np.testing.assert_array_equal(order.down_bits, light.time.bits)
    if sums:
        np.testing.assert_array_equal(as_widest_of_device(light.time.bits, light.device), light.time.bits)


def test_the_formula_by_hand() -> None:
    """Equal bands and rates of 1 and 2 Mbit/s both ways: a device's vectors add up, whatever bits each has."""
    air = replace(
        an_air(np.random.default_rng(0)),
        total_hz=4e6,
        token_s=np.full(DEVICES, 1e-3),
        expert_s=np.zeros(DEVICES),
        downlink_efficiency=np.array([1.0, 2.0, 2.0, 2.0]),
        uplink_efficiency=np.array([1.0, 2.0, 2.0, 2.0]),
    )
    experts = np.array([[0, 2], [2, 0]], np.int32)
    weights = np.array([[0.9, 0.1], [0.8, 0.2]])
    bound = distortion(8) + 0.1 * (distortion(4) - distortion(8))
    levers = Levers(equal_bandwidth=True, max_distortion=bound)
    plan = plan_layer(experts, weights, HOLDERS, air, Policy(levers=levers))
    np.testing.assert_array_equal(plan.time.bits, [[8, 4], [8, 8]])
    eight, four = (float(vector_bits(64, np.array(each))) for each in (8.0, 4.0))
    assert plan.time.device_s[:2] == pytest.approx([2 * 2 * eight / 1e6 + 2e-3, 2 * (eight + four) / 2e6 + 2e-3])
    assert (plan.time.up_bits, plan.time.down_bits) == (28, 28)


def test_a_bound_that_cannot_be_is_refused() -> None:
    assert Levers(bits=8, max_distortion=0.004).max_distortion == 0.004
    for wrong in ({"bits": 8, "max_distortion": 0.001}, {"max_distortion": 2.0}, {"max_distortion": float("nan")}):
        with pytest.raises(ValueError, match="max_distortion must be 0"):
            Levers(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coarse_bits and max_distortion"):
        Levers(coarse_bits=4, max_distortion=0.1)
