"""The policy `budget`: within a latency budget keep the most gate weight, jointly with the bandwidth [D]. And its dual:
for a bound on the weight that is dropped, the least latency.

One layer, one shared band. If device k computes n_k tokens it is done in time exactly when its share of the band is
at least h_k(n_k), the hertz at which one token takes budget / n_k. So all devices are in time exactly when

    sum_k h_k(n_k) <= total

h_k is convex in n_k, and the weight W_k(n_k) that a device's n_k heaviest tokens bring is concave. Taking assignments
by weight per extra hertz therefore solves the linear relaxation exactly, which gives `upper_bound`: no choice, however
clever, keeps more. docs/solver.md has the proof.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray, Int32Array, UInt8Array
from wdmoe.solver import _native
from wdmoe.solver.assignments import Assignments, check_assignments, check_positive
from wdmoe.solver.bandwidth import LARGEST, Links, allocate_bandwidth, one_draw

_ROUNDING = 1e-9  # of the weight that must be kept, and of the budget
_TINY = 1e-30  # seconds: less than any link takes


@dataclass(frozen=True, slots=True, eq=False)
class BudgetChoice:
    """Experts per token and bandwidth per device, chosen together."""

    experts: Int32Array  # (tokens, top_k), -1 where dropped
    weights: FloatArray  # (tokens, top_k), 0 where dropped
    dropped_weight: FloatArray  # (tokens,) share, 0 to 1, of the token's weight that is not computed
    bandwidth_hz: FloatArray  # (devices,) least-latency allocation for what is kept
    latency_s: float  # of the layer with it
    kept: float  # sum of the gate weight that is kept, before any renormalising
    upper_bound: float  # no choice within the budget keeps more
    lower_bound_s: float  # `select_at_most_dropped`: no choice that drops as little is faster; else 0
    status: str  # "within": latency and kept weight are as asked, to a relative 1e-9. "over": no such choice was found


def select_within_budget(
    experts: npt.ArrayLike,
    weights: npt.ArrayLike,
    device_of: npt.ArrayLike,
    links: Links,
    total_hz: float,
    budget_s: float,
    renormalise: bool = True,
) -> BudgetChoice:
    """Drop the assignments that cost the most hertz for their weight, until the layer fits the budget.

    Every token keeps at least one of its experts, the heaviest where the band allows; where no such choice is found,
    `status` is "over" and each token keeps one expert, so that together they take few hertz.

    Args:
        experts: (tokens, top_k) int, the gate's choice, -1 where there is none.
        weights: (tokens, top_k) finite, >= 0.
        device_of: (experts,) int, the device that serves each expert; or (tokens, top_k) int, the device that serves
            each assignment, where experts have replicas. -1: none does.
        links: (devices,); an assignment is what they call a token, also where a device has two of one token's experts.
        total_hz: the band that all devices share, Hz.
        budget_s: latency that the layer may take, seconds, at least 1e-30; above 1e30 counts as 1e30.
        renormalise: what a token keeps grows to the sum it had.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    given = check_assignments(experts, weights, device_of, one_draw(links).shape[1])
    check_positive(total_hz=total_hz, budget_s=budget_s)
    budget_s = min(budget_s, LARGEST)
    kept, bound, fits = _native.choose_within_budget(
        given.device, given.weights, links.table, links.flat, total_hz, budget_s
    )
    if not fits:  # that the heaviest of each token fit was not found: no bound was looked for
        bound = float(given.weights[given.device >= 0].sum())
    return _answer(given, kept, links, total_hz, renormalise, upper_bound=bound, budget_s=budget_s)


def select_at_most_dropped(
    experts: npt.ArrayLike,
    weights: npt.ArrayLike,
    device_of: npt.ArrayLike,
    links: Links,
    total_hz: float,
    max_dropped: float,
    renormalise: bool = True,
) -> BudgetChoice:
    """The least latency at which at most a share of the layer's gate weight is dropped: the dual of the above.

    Searches the least budget at which the choice of `select_within_budget` keeps enough. `lower_bound_s` is the least
    budget at which its `upper_bound` is enough, to a relative 1e-7 on the safe side: the optimum is not below it. The
    search ends at a hundredth of the distance between the two. Every token keeps at least one of its experts. Where
    experts that nobody serves, or whose link lets nothing through, are by themselves more than may be dropped,
    `status` is "over" and all others are kept.

    Args:
        experts, weights, device_of, links, total_hz, renormalise: as `select_within_budget`.
        max_dropped: 0 to 1, share of the sum of all `weights`.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    given = check_assignments(experts, weights, device_of, one_draw(links).shape[1])
    check_positive(total_hz=total_hz)
    if not 0 <= max_dropped <= 1:  # also refuses NaN
        raise ValueError(f"max_dropped must be 0 to 1, got {max_dropped}")
    device = np.where((given.device >= 0) & _reachable(links)[given.device], given.device, np.int32(-1))
    served = device >= 0
    goal = (1 - max_dropped) * float(given.weights.sum()) * (1 - _ROUNDING)
    everything = _answer(given, served.view(np.uint8), links, total_hz, renormalise, goal=goal)
    if everything.status == "over":
        return everything
    most_s = max(everything.latency_s, _TINY) * (1 + 1e-6)  # rounding must not make it too little
    kept, bound, bound_s = _native.choose_least_budget(
        device, given.weights, links.table, links.flat, total_hz, goal, most_s
    )
    found = _answer(given, kept, links, total_hz, renormalise, upper_bound=bound, lower_bound_s=bound_s, goal=goal)
    return found if found.status == "within" else everything


def _reachable(links: Links) -> npt.NDArray[np.bool_]:
    """(devices,) whether some band serves a token."""
    bits, strength = links.table[:2], links.table[2:4]
    reachable: npt.NDArray[np.bool_] = ((bits == 0) | (strength > 0)).all(axis=0)
    return reachable


def _load(device: npt.NDArray[np.integer], links: Links) -> FloatArray:
    """(devices,) assignments of each."""
    return np.bincount(device, minlength=links.table.shape[1]).astype(np.float64)


def _answer(
    given: Assignments,
    kept: UInt8Array,
    links: Links,
    total_hz: float,
    renormalise: bool,
    *,
    upper_bound: float = 0.0,
    lower_bound_s: float = 0.0,
    budget_s: float = np.inf,
    goal: float = 0.0,
) -> BudgetChoice:
    """What is kept, and whether that is what was asked for: by its own numbers, not by how it was found."""
    allocation = allocate_bandwidth(_load(given.device[kept != 0], links), links, total_hz)
    experts, weights = given.experts.copy(), given.weights.copy()
    dropped, total = _native.keep_marked(experts, weights, kept, renormalise)
    in_time = np.isfinite(allocation.latency_s) and allocation.latency_s <= budget_s * (1 + _ROUNDING)
    return BudgetChoice(
        experts=experts,
        weights=weights,
        dropped_weight=dropped,
        bandwidth_hz=allocation.bandwidth_hz,
        latency_s=allocation.latency_s,
        kept=total,
        upper_bound=max(upper_bound, total),
        lower_bound_s=min(lower_bound_s, allocation.latency_s),
        status="within" if in_time and total >= goal else "over",
    )
