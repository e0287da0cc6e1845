"""Placement to proven optimality, or to a proven gap: a mixed-integer program for HiGHS, by way of scipy (extra `sim`).

Variables, for each layer l, expert e and device d: a copy stands there or not, x in {0, 1}; the share it serves,
0 <= y <= x; the layer's time T. Least sum of T, subject to  sum_d y = 1,  sum_d x <= replicas,
s[d] sum_e f y <= T[l]  and  sum x * size <= memory[d].

Only memory ties layers together. So each layer is solved alone first: if the answers fit together they are the optimum,
and if not their times are lower bounds that the joint program begins with.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from wdmoe.arrays import BoolArray, FloatArray, Int64Array
from wdmoe.solver.placement.greedy import place_greedily
from wdmoe.solver.placement.problem import (
    PlacementProblem,
    Plan,
    Progress,
    judged_plan,
    latency_s,
    layer_bounds_s,
    no_plan,
)
from wdmoe.solver.placement.shares import best_shares

INFEASIBLE = 2  # scipy's number for it
LAYERS_TIME = 0.5  # of the limit, at most, for the layers one by one


def place_exactly(
    problem: PlacementProblem, time_limit_s: float = 60.0, gap: float = 1e-6, progress: Progress | None = None
) -> Plan:
    """The fastest plan, or the best that was found in time; never worse than `place_greedily`'s.

    Args:
        problem: some hundred experts times devices in all where memory is short; more where it is not.
        time_limit_s: when to stop, > 0; overrun by no more than HiGHS needs to notice.
        gap: relative; a plan within it counts as optimal.
    Returns:
        status "optimal", "feasible" (out of time; `gap` of the plan says what is proved), "infeasible" or "not_found".
    Raises:
        ModuleNotFoundError: scipy is not installed.
        ValueError: `time_limit_s` or `gap` is not as above.
    """
    if not (0 < time_limit_s < np.inf and 0 <= gap < 1):
        raise ValueError(f"need 0 < time_limit_s and 0 <= gap < 1, got {time_limit_s} and {gap}")
    tell = progress or (lambda stage, done: None)
    until = time.monotonic() + time_limit_s
    best = place_greedily(problem, progress)
    if best.status == "infeasible":
        return best
    bounds, alone = _layers_alone(problem, time.monotonic() + LAYERS_TIME * time_limit_s, gap, tell)
    bound = max(float(bounds.sum()), best.lower_bound_s)
    if alone is not None and latency_s(problem, alone) < best.latency_s:
        best = judged_plan(problem, alone, bound, gap)
    if best.latency_s * (1 - gap) > bound and (left := until - time.monotonic()) > 0:
        tell("all layers", 0.0)
        answer = _solve(problem, bounds, left, gap)
        tell("all layers", 1.0)
        if answer.proved_infeasible:
            return no_plan(problem, "infeasible")
        bound = max(bound, answer.bound_s)
        share = _shares(problem, answer.held)
        if share is not None and latency_s(problem, share) < best.latency_s:
            return judged_plan(problem, share, bound, gap)
    return (
        judged_plan(problem, best.share, bound, gap) if np.isfinite(best.latency_s) else no_plan(problem, "not_found")
    )


def _layers_alone(
    problem: PlacementProblem, until: float, gap: float, tell: Progress
) -> tuple[FloatArray, FloatArray | None]:
    """(layers,) lower bounds of their times, and shares if all were solved and fit together."""
    bounds = layer_bounds_s(problem)
    parts: list[FloatArray] = []
    layers = len(bounds)
    for layer in range(layers):
        tell("layers", layer / layers)
        left = until - time.monotonic()
        if left <= 0:
            break
        row = slice(layer, layer + 1)
        one = PlacementProblem(
            problem.frequency[row], problem.token_s, problem.memory_bytes, problem.expert_bytes[row], problem.replicas
        )
        answer = _solve(one, bounds[row], left / (layers - layer), gap / 2)
        bounds[layer] = answer.bound_s
        share = _shares(one, answer.held)
        if share is not None:
            parts.append(share[0])
    tell("layers", 1.0)
    if len(parts) < layers:
        return bounds, None
    together = np.stack(parts)
    needed = np.einsum("led,l->d", together > 0, problem.expert_bytes)
    return bounds, together if (needed <= problem.memory_bytes).all() else None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What HiGHS found."""

    proved_infeasible: bool
    bound_s: float  # no plan is faster
    held: BoolArray | None


def _solve(problem: PlacementProblem, bounds_s: FloatArray, time_limit_s: float, gap: float) -> _Answer:
    """Run the program; variables in the order x (layers, experts, devices), y (the same), T (layers)."""
    from scipy.optimize import Bounds, milp

    layers = len(bounds_s)
    spots = int(np.prod(problem.shape))
    unit_s = float(bounds_s.mean()) or 1.0  # HiGHS's tolerances are absolute: times near 1
    found = milp(
        np.concatenate([np.zeros(2 * spots), np.ones(layers)]),
        integrality=np.concatenate([np.ones(spots), np.zeros(spots + layers)]),
        bounds=Bounds(
            np.concatenate([np.zeros(2 * spots), bounds_s / unit_s * (1 - 1e-9)]),
            np.concatenate([np.ones(2 * spots), np.full(layers, np.inf)]),
        ),
        constraints=_constraints(problem, unit_s),
        options={"time_limit": max(time_limit_s, 0.01), "mip_rel_gap": gap},
    )
    dual = found.mip_dual_bound
    bound_s = float(bounds_s.sum())
    if dual is not None and np.isfinite(dual):
        bound_s = max(bound_s, float(dual) * unit_s)
    held = None if found.x is None else np.asarray(found.x[:spots] > 0.5).reshape(problem.shape)
    return _Answer(found.status == INFEASIBLE, bound_s, held)


def _constraints(problem: PlacementProblem, unit_s: float) -> list[Any]:
    """As in the module's text, in its order; with one copy an expert, y is x."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import coo_array

    layers, experts, devices = problem.shape
    spots = layers * experts * devices
    layer, expert, device = (index.ravel() for index in np.indices(problem.shape))
    x = np.arange(spots)
    item, slot = layer * experts + expert, layer * devices + device
    ones, times = np.ones(spots), np.arange(layers * devices)

    def matrix(rows: int, *entries: tuple[Int64Array, Int64Array, FloatArray]) -> Any:
        row, column, value = (np.concatenate(part) for part in zip(*entries, strict=True))
        return coo_array((value, (row, column)), shape=(rows, 2 * spots + layers)).tocsr()

    use_s = problem.frequency[layer, expert] * problem.token_s[device] / unit_s
    size = problem.expert_bytes.max()
    return [
        LinearConstraint(matrix(layers * experts, (item, spots + x, ones)), 1, 1),
        LinearConstraint(matrix(layers * experts, (item, x, ones)), 1, problem.replicas),
        LinearConstraint(
            matrix(spots, (x, spots + x, ones), (x, x, -ones)), 0 if problem.replicas == 1 else -np.inf, 0
        ),
        LinearConstraint(
            matrix(
                layers * devices,
                (slot, spots + x, use_s),
                (times, 2 * spots + times // devices, -np.ones(layers * devices)),
            ),
            -np.inf,
            0,
        ),
        LinearConstraint(
            matrix(devices, (device, x, problem.expert_bytes[layer] / size)), -np.inf, problem.memory_bytes / size
        ),
    ]


def _shares(problem: PlacementProblem, held: BoolArray | None) -> FloatArray | None:
    """The split of the load over what is held; None where an expert has no home or memory is overrun by rounding."""
    if held is None or not held.any(axis=2).all():
        return None
    needed = np.einsum("led,l->d", held, problem.expert_bytes)
    if (needed > problem.memory_bytes * (1 + 1e-12)).any():
        return None
    rows = zip(problem.frequency, held, strict=True)
    return np.stack([best_shares(use, problem.token_s, mine) for use, mine in rows])
