"""One layer decided and timed: the latency model against its formula, and what each lever may and may not do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.solver.layer.latency import Levers
from wdmoe.solver.layer.plan import Policy, plan_layer
from wdmoe.solver.layer.radio_state import RadioState
from wdmoe.solver.selection import POLICIES

DEVICES, EXPERTS, TOP_K = 4, 8, 3
TWO_EACH = np.repeat(np.eye(DEVICES, dtype=bool), 2, axis=0)
EXACT = 1 + 1e-6


def an_air(rng: np.random.Generator) -> RadioState:
    snr_hz = 1e6 * 10 ** rng.uniform(0, 3, (2, DEVICES))
    return RadioState(
        downlink_snr_hz=snr_hz[0],
        uplink_snr_hz=snr_hz[1],
        total_hz=20e6,
        hidden=64,
        token_s=rng.uniform(1e-6, 1e-4, DEVICES),
        expert_s=rng.uniform(0, 1e-4, DEVICES),
    )


def a_demand(rng: np.random.Generator, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    experts = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    return experts, np.sort(rng.dirichlet(np.ones(TOP_K), tokens), axis=1)[:, ::-1].copy()


def latency(seed: int, tokens: int = 12, holders: np.ndarray = TWO_EACH, **levers: object) -> float:
    rng = np.random.default_rng(seed)
    air = an_air(rng)
    policy = Policy(levers=Levers(**levers))  # type: ignore[arg-type]
    return plan_layer(*a_demand(rng, tokens), holders, air, policy).time.latency_s


def test_the_formula_by_hand() -> None:
    """Two devices, equal bands: what stands in the module's text, written out."""
    air = RadioState(
        downlink_snr_hz=np.array([3e6, 1e6]),
        uplink_snr_hz=np.array([1e6, 1e6]),
        total_hz=2e6,
        hidden=10,
        token_s=np.array([1e-3, 2e-3]),
        expert_s=np.array([0.0, 5e-3]),
    )
    experts = np.array([[0, 1], [0, 2]], np.int32)  # expert 0 on device 0, the others on device 1
    holders = np.array([[True, False], [False, True], [False, True]])
    weights = np.array([[0.6, 0.4], [0.7, 0.3]])
    plan = plan_layer(experts, weights, holders, air, Policy(levers=Levers(equal_bandwidth=True)))
    assert plan.time.device_s == pytest.approx([2 * (160 / 2e6 + 160 / 1e6 + 1e-3), 2 * (160 / 1e6 * 2) + 2 * 5e-3])
    cast = plan_layer(experts, weights, holders, air, Policy(levers=Levers(equal_bandwidth=True, multicast=True))).time
    if cast.multicast_s:
        assert cast.multicast_s == pytest.approx(2 * 160 / (2e6 * np.log2(1.5)))
    part = replace(air, expert_s=np.zeros(2))
    halves = plan_layer(experts, weights, holders, part, Policy(levers=Levers(equal_bandwidth=True, micro_batches=2)))
    air_s, compute_s = 2 * (160 / 2e6 + 160 / 1e6), 2e-3
    assert halves.time.device_s[0] == pytest.approx(max(air_s + compute_s / 2, air_s / 2 + compute_s))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_levers_never_make_a_layer_slower(seed: int) -> None:
    plain = latency(seed)
    assert latency(seed, equal_bandwidth=True) >= plain / EXACT
    for better in ({"multicast": True}, {"partial_sums": True}, {"micro_batches": 3}, {"coarse_bits": 4}, {"bits": 8}):
        assert latency(seed, **better) <= plain * EXACT, better
    assert latency(seed, bits=4) <= latency(seed, bits=8) * EXACT
    more_copies = TWO_EACH.copy()
    more_copies[0] = True
    rng = np.random.default_rng(seed)
    air = an_air(rng)
    levers = Levers(equal_bandwidth=True)
    one, two = (
        plan_layer(*a_demand(np.random.default_rng(seed), 12), holders, air, Policy(levers=levers)).time.device_s.max()
        for holders in (TWO_EACH, more_copies)
    )
    assert two <= one * EXACT or air.expert_s.any(), "reading a copy's weights may cost more than it saves"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7]))
def test_micro_batches_get_the_best_band_there_is(seed: int, parts: int) -> None:
    """No random band of the same total is better than the one that was found."""
    rng = np.random.default_rng(seed)
    air = an_air(rng)
    experts, weights = a_demand(rng, 12)
    found = plan_layer(experts, weights, TWO_EACH, air, Policy(levers=Levers(micro_batches=parts))).time
    for _ in range(20):
        band = rng.dirichlet(np.ones(DEVICES)) * air.total_hz
        rate = [band * np.log2(1 + snr / band) for snr in (air.downlink_snr_hz, air.uplink_snr_hz)]
        on_air = found.vectors * (64 * 16 / rate[0] + 64 * 16 / rate[1])
        compute = np.zeros(DEVICES)
        for expert, count in zip(*np.unique(experts, return_counts=True), strict=True):
            at = expert // 2
            compute[at] += max(count * air.token_s[at], air.expert_s[at])
        m = np.clip(np.minimum(parts, found.vectors), 1, None)
        assert found.latency_s <= np.maximum(on_air + compute / m, on_air / m + compute).max() * EXACT


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.5))
def test_policies_drop_only_what_they_may(seed: int, most: float) -> None:
    rng = np.random.default_rng(seed)
    air = an_air(rng)
    experts, weights = a_demand(rng, 20)
    whole = plan_layer(experts, weights, TWO_EACH, air, Policy())
    assert whole.dropped_weight == 0
    for name in POLICIES:
        plan = plan_layer(experts, weights, TWO_EACH, air, Policy(name=name, max_dropped=most))
        assert (plan.experts >= 0).any(axis=1).all(), "a token keeps an expert"
        assert ((plan.experts == experts) | (plan.experts < 0)).all()
        assert ((plan.device >= 0) == (plan.experts >= 0)).all()
        assert plan.time.latency_s <= whole.time.latency_s * EXACT
        assert name != "budget" or plan.dropped_weight <= most + 1e-6
    within = plan_layer(experts, weights, TWO_EACH, air, Policy(name="budget", budget_s=whole.time.latency_s * 2))
    assert within.dropped_weight == 0


def test_near_experts_stand_in_only_where_they_are_alike() -> None:
    rng = np.random.default_rng(1)
    air = replace(an_air(rng), downlink_snr_hz=np.array([1e9, 1e3, 1e9, 1e9]), uplink_snr_hz=np.full(4, 1e9))
    experts, weights = a_demand(rng, 20)
    alike = np.full((EXPERTS, EXPERTS), 0.9)
    far = Policy(least_similarity=0.95)
    near = Policy(least_similarity=0.5)
    assert plan_layer(experts, weights, TWO_EACH, air, far, alike).replaced_weight == 0
    plan = plan_layer(experts, weights, TWO_EACH, air, near, alike)
    assert plan.replaced_weight > 0
    assert not np.isin(plan.experts[plan.experts != experts], [2, 3]).any(), "device 1 is the far one"
    assert plan.dropped_weight == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "best"},
        {"max_dropped": 1.5},
        {"max_dropped": float("nan")},
        {"budget_s": -1.0},
    ],
)
def test_a_policy_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "name" not in wrong else "policy"):
        Policy(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 5}, {"coarse_bits": 3}, {"bits": 4, "coarse_bits": 8}, {"coarse_share": 2.0}, {"micro_batches": 0}],
)
def test_levers_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1] if "coarse_bits" not in wrong else "coarse_bits"):
        Levers(**wrong)  # type: ignore[arg-type]


def test_a_device_that_nothing_reaches_makes_the_layer_endless() -> None:
    rng = np.random.default_rng(3)
    air = replace(an_air(rng), downlink_snr_hz=np.array([0.0, 1e6, 1e6, 1e6]))
    experts, weights = a_demand(rng, 6)
    for levers in (Levers(), Levers(equal_bandwidth=True), Levers(multicast=True)):
        assert plan_layer(experts, weights, TWO_EACH, air, Policy(levers=levers)).time.latency_s == np.inf
