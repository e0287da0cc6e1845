"""Placement by expected latency: greedy and exact against every plan of tiny cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from wdmoe.records import ExpertId
from wdmoe.solver.placement.exact import place_exactly
from wdmoe.solver.placement.file import placement_of
from wdmoe.solver.placement.greedy import place_greedily
from wdmoe.solver.placement.problem import PlacementProblem, device_loads, latency_s, layer_bounds_s
from wdmoe.solver.placement.shares import best_shares

PLENTY = 1e12


def least_time(use, token_s, held):
    """Of a layer, by Hall's condition: load that only a set of devices can take, over what the set does in a second."""
    devices = range(len(token_s))
    subsets = itertools.chain.from_iterable(itertools.combinations(devices, n) for n in range(1, len(token_s) + 1))
    return max(
        sum(use[e] for e in range(len(use)) if set(np.flatnonzero(held[e])) <= set(s)) / sum(1 / token_s[d] for d in s)
        for s in subsets
    )


def least_latency(problem):
    """The best of every plan there is; infinite if none fits."""
    layers, experts, devices = problem.shape
    homes = [
        np.isin(np.arange(devices), some)
        for n in range(1, min(problem.replicas, devices) + 1)
        for some in itertools.combinations(range(devices), n)
    ]
    best = np.inf
    for picks in itertools.product(homes, repeat=layers * experts):
        held = np.array(picks).reshape(problem.shape)
        if (np.einsum("led,l->d", held, problem.expert_bytes) <= problem.memory_bytes).all():
            rows = zip(problem.frequency, held, strict=True)
            best = min(best, sum(least_time(use, problem.token_s, mine) for use, mine in rows))
    return best


def a_problem(seed, shape, replicas, tightness):
    rng = np.random.default_rng(seed)
    layers, experts, devices = shape
    size = rng.integers(1, 3, layers).astype(float)
    need = experts * size.sum()
    memory = rng.dirichlet(np.full(devices, 5.0)) * need * tightness
    frequency = rng.exponential(1.0, (layers, experts)) * (rng.random((layers, experts)) > 0.15)
    return PlacementProblem(frequency, rng.uniform(1, 5, devices) * 1e-3, memory, size, replicas)


def check_plan(problem, plan):
    assert (plan.held >= (plan.share > 0)).all()
    assert plan.held.any(axis=2).all()
    assert (plan.held.sum(axis=2) <= problem.replicas).all()
    np.testing.assert_allclose(plan.share.sum(axis=2), 1)
    assert (np.einsum("led,l->d", plan.held, problem.expert_bytes) <= problem.memory_bytes).all()
    assert plan.latency_s == pytest.approx(latency_s(problem, plan.share))
    assert plan.lower_bound_s <= plan.latency_s


CASES = [
    *((seed, (2, 3, 3), 1, tightness) for seed, tightness in enumerate([1.05, 1.2, 1.5, 3.0, 0.9, 1.1])),
    *((seed, (2, 2, 3), 2, tightness) for seed, tightness in enumerate([1.3, 1.8, 2.5, 4.0, 1.5, 1.1])),
    (7, (1, 4, 2), 2, 1.5),
    (8, (3, 2, 2), 1, 1.3),
]


@pytest.mark.parametrize(("seed", "shape", "replicas", "tightness"), CASES)
def test_against_every_plan(seed, shape, replicas, tightness):
    problem = a_problem(seed, shape, replicas, tightness)
    best = least_latency(problem)
    exact, greedy = place_exactly(problem, 20), place_greedily(problem)
    if not np.isfinite(best):
        assert exact.status == "infeasible"
        assert greedy.status in ("infeasible", "not_found")
        assert exact.gap == greedy.gap == 1.0
        return
    check_plan(problem, exact)
    assert exact.status == "optimal"
    assert exact.latency_s == pytest.approx(best, rel=1e-5)
    assert exact.lower_bound_s <= best * (1 + 1e-9)
    if greedy.status == "not_found":
        return
    check_plan(problem, greedy)
    assert greedy.lower_bound_s <= best * (1 + 1e-9) <= greedy.latency_s * (1 + 1e-6)
    assert layer_bounds_s(problem).sum() <= best * (1 + 1e-9)


@pytest.mark.parametrize("even", [False, True])
def test_the_guarantee_holds_where_memory_turns_nothing_away(even):
    for seed in range(8):
        problem = a_problem(seed, (1, 5, 3), 1, PLENTY)
        if even:
            problem = PlacementProblem(problem.frequency, np.ones(3), problem.memory_bytes, problem.expert_bytes)
        best, plan = least_latency(problem), place_greedily(problem)
        factor = 4 / 3 - 1 / 9 if even else 2 - 2 / 4
        assert best * (1 - 1e-9) <= plan.latency_s <= factor * best * (1 + 1e-9)
        assert plan.gap <= 1 - 1 / factor + 1e-9


def test_copies_help_and_never_hurt():
    rng = np.random.default_rng(3)
    frequency = rng.dirichlet(np.full(8, 0.4), 6) * 2
    token_s, memory = np.array([1, 2, 3, 5]) * 1e-3, np.array([20.0, 20, 20, 20])
    plans = [place_greedily(PlacementProblem(frequency, token_s, memory, 1.0, most)) for most in (1, 2, 4)]
    for plan, most in zip(plans, (1, 2, 4), strict=True):
        check_plan(PlacementProblem(frequency, token_s, memory, 1.0, most), plan)
    assert plans[2].latency_s <= plans[1].latency_s * 1.01
    assert plans[1].latency_s < 0.85 * plans[0].latency_s
    assert plans[2].gap < 0.02


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_the_best_there_are(seed):
    rng = np.random.default_rng(seed)
    experts, devices = rng.integers(1, 7), rng.integers(1, 6)
    use, token_s = rng.exponential(1.0, experts), rng.uniform(0.5, 5, devices)
    held = rng.random((experts, devices)) < 0.5
    held[np.arange(experts), rng.integers(0, devices, experts)] = True
    share = best_shares(use, token_s, held)
    np.testing.assert_allclose(share.sum(axis=1), 1)
    assert (share[~held] == 0).all()
    assert (share >= 0).all()
    assert ((use @ share) * token_s).max() == pytest.approx(least_time(use, token_s, held), rel=1e-3)


def test_a_size_that_needs_the_greedy_is_done_at_once():
    rng = np.random.default_rng(0)
    frequency = rng.dirichlet(np.full(64, 0.3), 8) * 6
    token_s = rng.uniform(1, 4, 12) * 1e-3
    problem = PlacementProblem(frequency, token_s, np.full(12, 60.0), 1.0, 2)
    plan = place_greedily(problem)
    check_plan(problem, plan)
    assert plan.gap < 0.1


def test_out_of_time_still_gives_a_plan():
    rng = np.random.default_rng(0)
    problem = PlacementProblem(rng.random((12, 8)), np.arange(1, 6) * 1e-3, np.full(5, 20.0), 1.0, 2)
    stages = set()
    plan = place_exactly(problem, 0.2, progress=lambda stage, _: stages.add(stage))
    check_plan(problem, plan)
    assert plan.status in ("feasible", "optimal")
    assert plan.latency_s <= place_greedily(problem).latency_s
    assert "layers" in stages


def test_what_cannot_be_placed_is_said():
    problem = PlacementProblem(np.ones((2, 3)), np.ones(2), np.array([2.0, 3.0]), 1.0)
    for plan in (place_greedily(problem), place_exactly(problem)):
        assert (plan.status, plan.latency_s, plan.gap) == ("infeasible", np.inf, 1.0)
        assert not plan.held.any()


def test_no_load_at_all():
    problem = PlacementProblem(np.zeros((2, 3)), np.ones(2), np.array([4.0, 4.0]), 1.0)
    for plan in (place_greedily(problem), place_exactly(problem)):
        check_plan(problem, plan)
        assert plan.status == "optimal"


def test_the_plan_as_a_placement():
    frequency = np.array([[3.0, 1, 1, 1]])
    plan = place_greedily(PlacementProblem(frequency, np.ones(2), np.full(2, PLENTY), 1.0))
    assert placement_of(plan.held, ["a", "b"], [7]) == {
        "a": (ExpertId(7, 0),),
        "b": (ExpertId(7, 1), ExpertId(7, 2), ExpertId(7, 3)),
    }
    assert device_loads(PlacementProblem(frequency, np.ones(2), np.ones(2), 1.0), plan.share).tolist() == [[3, 3]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"frequency": [1.0]}, "frequency must have 2 dimensions"),
        ({"frequency": [[np.nan]]}, "frequency must be finite"),
        ({"frequency": [[]]}, "need experts and devices"),
        ({"token_s": [0.0]}, "must be positive"),
        ({"memory_bytes": [1.0, 2.0]}, r"must be \(1,\) and \(1,\)"),
        ({"expert_bytes": [1.0, 2.0]}, r"must be \(1,\) and \(1,\)"),
        ({"expert_bytes": 0.0}, "must be positive"),
        ({"replicas": 0}, "replicas must be a whole number"),
        ({"replicas": True}, "replicas must be a whole number"),
    ],
)
def test_bad_problems_are_named(change, named):
    good = {"frequency": [[1.0]], "token_s": [1.0], "memory_bytes": [1.0], "expert_bytes": 1.0}
    with pytest.raises(ValueError, match=named):
        PlacementProblem(**{**good, **change})


def test_bad_limits_are_named():
    problem = PlacementProblem(np.ones((1, 1)), np.ones(1), np.ones(1), 1.0)
    with pytest.raises(ValueError, match="time_limit_s"):
        place_exactly(problem, 0)
