"""`budget` against trying everything, its bound, and the inverse of the link model that it stands on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab.budget_cases import SLACK, TOTAL_HZ, small_case, some_links
from wdmoe.solver import _native
from wdmoe.solver.bandwidth import Links
from wdmoe.solver.budget import BudgetChoice, select_at_most_dropped, select_within_budget
from wdmoe.solver.reference import budget as budget_reference
from wdmoe.solver.reference.exhaustive import best_within_budget
from wdmoe.solver.required_bandwidth import needed_hz


def seconds(links: Links, bandwidth_hz: np.ndarray) -> Any:
    """(devices,) per token."""
    bits, snr, compute_s = links.table[:2], links.table[2:4], links.table[4]
    return (bits / (bandwidth_hz * np.log2(1 + snr / bandwidth_hz))).sum(axis=0) + compute_s


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 10.0))
def test_needed_hertz_takes_just_that_long(seed: int, wanted_s: float) -> None:
    links = some_links(np.random.default_rng(seed), 5)
    need = needed_hz(links, np.array([wanted_s]))[:, 0]
    can = np.isfinite(need)
    assert np.allclose(seconds(links, np.where(can, need, 1.0))[can], wanted_s, rtol=1e-9)
    shortest = links.table[4] + (links.table[:2] * np.log(2) / links.table[2:4]).sum(axis=0)
    assert (can == (shortest < wanted_s)).all() or np.isclose(shortest, wanted_s, rtol=1e-6).any()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_choice_beats_the_bound_and_ours_is_within_the_budget(seed: int) -> None:
    experts, weights, device_of, links, budget_s = small_case(seed)
    choice = select_within_budget(experts, weights, device_of, links, TOTAL_HZ, budget_s)
    best = best_within_budget(experts, weights, device_of, links, TOTAL_HZ, budget_s)
    if choice.status == "over":
        return  # the cheapest device for each token alone does not fit; test_over says what comes back
    assert choice.kept <= best + SLACK
    assert best <= choice.upper_bound + SLACK
    assert choice.latency_s <= budget_s * (1 + 1e-6)
    assert choice.bandwidth_hz.sum() <= TOTAL_HZ * (1 + 1e-9)
    assert ((choice.experts >= 0).any(axis=1)).all()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_native_chooses_as_its_plain_twin(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    tokens, top_k, devices = int(rng.integers(1, 25)), int(rng.integers(1, 5)), int(rng.integers(1, 6))
    links, device = some_links(rng, devices), rng.integers(-1, devices, (tokens, top_k), np.int32)
    weights = rng.dirichlet(np.ones(top_k), tokens)
    if ties:
        weights = np.round(weights, 1)
    budget_s = 10 ** rng.uniform(-2, 0)
    kept, bound, fits = _native.choose_within_budget(device, weights, links.table, links.flat, TOTAL_HZ, budget_s)
    twin_kept, twin_bound, twin_fits = budget_reference.choose_within_budget(device, weights, links, TOTAL_HZ, budget_s)
    assert fits == twin_fits
    assert bound == pytest.approx(twin_bound)
    assert (kept == twin_kept).all() or weights[kept != 0].sum() == pytest.approx(weights[twin_kept].sum())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1.0, 10.0))
def test_more_time_and_more_band_never_lower_the_bound(seed: int, more: float) -> None:
    experts, weights, device_of, links, budget_s = small_case(seed)

    def run(total_hz: float, seconds: float) -> BudgetChoice:
        return select_within_budget(experts, weights, device_of, links, total_hz, seconds)

    base = run(TOTAL_HZ, budget_s)
    for easier in (run(TOTAL_HZ * more, budget_s), run(TOTAL_HZ, budget_s * more)):
        if base.status == "within":
            assert easier.status == "within"
            assert easier.upper_bound >= base.upper_bound - SLACK


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_device_of_each_assignment_may_be_told_instead_of_that_of_each_expert(seed: int) -> None:
    experts, weights, device_of, links, budget_s = small_case(seed)
    by_expert, by_assignment = (
        select_within_budget(experts, weights, home, links, TOTAL_HZ, budget_s)
        for home in (device_of, device_of[experts])
    )
    assert (by_expert.experts == by_assignment.experts).all()
    assert by_expert.latency_s == by_assignment.latency_s


def test_replicas_may_serve_one_expert_on_two_devices() -> None:
    links = Links(downlink_efficiency=[1.0, 1.0], uplink_efficiency=[1.0, 1.0], downlink_bits=1e6, uplink_bits=0)
    experts, weights = [[0], [0]], [[1.0], [1.0]]
    one = select_within_budget(experts, weights, [0, 1], links, 1e6, 10.0)
    both = select_within_budget(experts, weights, [[0], [1]], links, 1e6, 10.0)
    assert one.bandwidth_hz[1] == 0
    np.testing.assert_allclose(both.bandwidth_hz, 5e5)


def test_with_time_to_spare_nothing_is_dropped() -> None:
    experts, weights, device_of, links, _ = small_case(3)
    choice = select_within_budget(experts, weights, device_of, links, TOTAL_HZ, 1e3)
    assert (choice.experts == experts).all()
    np.testing.assert_allclose(choice.weights, weights)
    assert choice.dropped_weight.max() <= 1e-12
    assert choice.kept == pytest.approx(choice.upper_bound)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]))
def test_the_dual_drops_no_more_and_no_faster_choice_does(seed: int, max_dropped: float) -> None:
    experts, weights, device_of, links, _ = small_case(seed)
    choice = select_at_most_dropped(experts, weights, device_of, links, TOTAL_HZ, max_dropped)
    goal = (1 - max_dropped) * weights.sum()
    assert choice.status == "within"
    assert choice.kept >= goal * (1 - SLACK)
    assert ((choice.experts >= 0).any(axis=1)).all()
    assert choice.lower_bound_s <= choice.latency_s
    load = np.bincount(device_of[experts[choice.experts >= 0]], minlength=len(choice.bandwidth_hz))
    took = load * seconds(links, np.maximum(choice.bandwidth_hz, 1.0))
    assert took.max() == pytest.approx(choice.latency_s)
    just_below = choice.lower_bound_s * (1 - 1e-6)
    assert best_within_budget(experts, weights, device_of, links, TOTAL_HZ, just_below) < goal


def test_what_nothing_gets_through_to_counts_as_dropped() -> None:
    links = Links(downlink_snr_hz=[1e7, 0.0], uplink_snr_hz=[1e7, 1e7], downlink_bits=1e4, uplink_bits=1e4)
    experts, weights = [[0, 1], [1, 0]], [[0.7, 0.3], [0.6, 0.4]]
    over = select_at_most_dropped(experts, weights, [0, 1], links, TOTAL_HZ, 0.2)
    within = select_at_most_dropped(experts, weights, [0, 1], links, TOTAL_HZ, 0.5, renormalise=False)
    assert (over.status, within.status) == ("over", "within")
    assert over.kept == within.kept == pytest.approx(1.1)
    assert np.isfinite(over.latency_s)
    np.testing.assert_allclose(within.weights, [[0.7, 0], [0, 0.4]])


@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
def test_a_share_is_0_to_1(bad: float) -> None:
    with pytest.raises(ValueError, match="max_dropped must be 0 to 1"):
        select_at_most_dropped([[0]], [[1.0]], [0], some_links(np.random.default_rng(0), 1), TOTAL_HZ, bad)


def test_over_keeps_one_expert_for_each_token_and_says_so() -> None:
    experts, weights, device_of, links, _ = small_case(3)
    choice = select_within_budget(experts, weights, device_of, links, TOTAL_HZ, 1e-9)
    assert choice.status == "over"
    assert ((choice.experts >= 0).sum(axis=1) == 1).all()
    np.testing.assert_allclose(choice.weights.sum(axis=1), weights.sum(axis=1))
    assert choice.latency_s > 1e-9


def test_experts_that_nobody_serves_are_dropped() -> None:
    experts, weights, device_of, links, _ = small_case(3)
    device_of = np.where(np.arange(6) == experts[0, 0], -1, device_of)
    choice = select_within_budget(experts, weights, device_of, links, TOTAL_HZ, 1e3, renormalise=False)
    assert (choice.experts[experts == experts[0, 0]] == -1).all()
    assert choice.dropped_weight[0] == pytest.approx(weights[0, 0])


def test_no_tokens_no_work() -> None:
    links = some_links(np.random.default_rng(0), 2)
    choice = select_within_budget(np.zeros((0, 2), int), np.zeros((0, 2)), [0, 1], links, TOTAL_HZ, 1.0)
    assert (choice.status, choice.kept, choice.latency_s) == ("within", 0.0, 0.0)
    choice = select_at_most_dropped(np.zeros((0, 2), int), np.zeros((0, 2)), [0, 1], links, TOTAL_HZ, 0.1)
    assert (choice.status, choice.kept, choice.latency_s) == ("within", 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": [[0.5]]}, "weights must have the shape"),
        ({"weights": [[0.5, np.nan]]}, "weights must be finite"),
        ({"experts": [[0.0, 1.0]]}, "experts must be integers"),
        ({"experts": [[0, 2]]}, "experts must be from -1 to 1"),
        ({"device_of": [0, 2]}, "device_of must be from -1 to 1"),
        ({"device_of": [[0], [1]]}, "device_of must be .experts,. or"),
        ({"device_of": [0.0, 1.0]}, "device_of must be integers"),
        ({"total_hz": 0.0}, "total_hz must be positive"),
        ({"budget_s": np.inf}, "budget_s must be positive"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], said: str) -> None:
    fields: dict[str, object] = {
        "experts": [[0, 1]],
        "weights": [[0.5, 0.5]],
        "device_of": [0, 1],
        "links": some_links(np.random.default_rng(0), 2),
        "total_hz": TOTAL_HZ,
        "budget_s": 1.0,
    }
    with pytest.raises(ValueError, match=said):
        select_within_budget(**{**fields, **changes})  # type: ignore[arg-type]
