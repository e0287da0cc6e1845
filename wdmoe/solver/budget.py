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

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.solver.assignments import check_assignments, check_positive
from wdmoe.solver.bandwidth import Links, allocate_bandwidth
from wdmoe.solver.hertz import needed_hz

Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_PRICE_STEPS = 24  # halvings of the price that moves a token's last expert to a cheaper device
_SLACK = 1e-9  # of the band: what rounding may take
_CLOSE = 1e-9  # where a search for a budget ends
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
    status: str  # "within", or "over": what was asked for cannot be had


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

    Every token keeps at least one of its experts, the heaviest where the band allows; where even that does not fit,
    `status` is "over" and each token keeps one expert, the one that is cheapest on the air.

    Args:
        experts: (tokens, top_k) int, the gate's choice, -1 where there is none.
        weights: (tokens, top_k) finite, >= 0.
        device_of: (experts,) int, the device that serves each expert; or (tokens, top_k) int, the device that serves
            each assignment, where experts have replicas. -1: none does.
        links: (devices,); an assignment is what they call a token, also where a device has two of one token's experts.
        total_hz: the band that all devices share, Hz.
        budget_s: latency that the layer may take, seconds.
        renormalise: what a token keeps grows to the sum it had.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    chosen, weight, device = check_assignments(experts, weights, device_of, links.table.shape[1])
    check_positive(total_hz=total_hz, budget_s=budget_s)
    work = _Work(weight, device, links, budget_s, total_hz)
    kept, fits = work.choose()
    bound = work.upper_bound() if fits else 0.0
    return _answer(chosen, weight, work, kept, links, bound, 0.0, "within" if fits else "over", renormalise)


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
    budget at which its `upper_bound` is enough: the optimum is not below it. Both searches end at a relative 1e-9.
    Every token keeps at least one of its experts. Where experts that nobody serves, or whose link lets nothing through,
    are by themselves more than may be dropped, `status` is "over" and all others are kept.

    Args:
        experts, weights, device_of, links, total_hz, renormalise: as `select_within_budget`.
        max_dropped: 0 to 1, share of the sum of all `weights`.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    chosen, weight, device = check_assignments(experts, weights, device_of, links.table.shape[1])
    check_positive(total_hz=total_hz)
    if not 0 <= max_dropped <= 1:  # also refuses NaN
        raise ValueError(f"max_dropped must be 0 to 1, got {max_dropped}")
    device = np.where((device >= 0) & _reachable(links)[device], device, np.int32(-1))
    served = device >= 0
    goal = (1 - max_dropped) * float(weight.sum()) * (1 - _SLACK)
    everything_s = float(allocate_bandwidth(_load(device[served], links), links, total_hz).latency_s)
    work = _Work(weight, device, links, max(everything_s, _TINY) * (1 + 1e-6), total_hz)
    kept = work.choose()[0]
    if float(weight[served].sum()) < goal:
        return _answer(chosen, weight, work, kept, links, 0.0, 0.0, "over", renormalise)

    def enough(budget_s: float) -> bool:
        tried = _Work(weight, device, links, budget_s, total_hz)
        items, fits = tried.choose()
        return fits and float(tried.weight[items].sum()) >= goal

    def conceivable(budget_s: float) -> bool:
        return _Work(weight, device, links, budget_s, total_hz).upper_bound() >= goal

    bound_s = _least(conceivable, 0.0, everything_s)[0]
    best_s = _least(enough, bound_s, everything_s)[1]
    if best_s < everything_s:
        work = _Work(weight, device, links, best_s, total_hz)
        kept = work.choose()[0]
    return _answer(chosen, weight, work, kept, links, work.upper_bound(), bound_s, "within", renormalise)


def _least(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Where `holds` begins, between a `low` at which it need not and a `high` at which it does: from both sides."""
    while high - low > _CLOSE * high:
        middle = (low + high) / 2 if low > 0 else high / 2
        if middle < _TINY:
            break
        if holds(middle):
            high = middle
        else:
            low = middle
    return low, high


def _reachable(links: Links) -> npt.NDArray[np.bool_]:
    """(devices,) whether some band serves a token."""
    bits, strength = links.table[:2], links.table[2:4]
    reachable: npt.NDArray[np.bool_] = ((bits == 0) | (strength > 0)).all(axis=0)
    return reachable


def _load(device: npt.NDArray[np.integer], links: Links) -> FloatArray:
    """(devices,) assignments of each."""
    return np.bincount(device, minlength=links.table.shape[1]).astype(np.float64)


class _HertzTable:
    """h_k(n) for all devices and token counts."""

    def __init__(self, links: Links, budget_s: float, most: int) -> None:
        """`most`: tokens of the busiest device."""
        count = np.arange(1, most + 1, dtype=np.float64)
        self.hz = np.zeros((links.table.shape[1], most + 1))
        self.hz[:, 1:] = needed_hz(links, budget_s / count)

    def of(self, load: IntArray) -> FloatArray:
        """(devices,) hertz each device needs for so many tokens; inf where no band is enough."""
        return self.hz[np.arange(len(load)), load]


class _Work:
    """All assignments, flat and sorted by device, heaviest first: (n,) arrays."""

    def __init__(
        self,
        weights: FloatArray,
        home: Int32Array,
        links: Links,
        budget_s: float,
        total_hz: float,
    ) -> None:
        served = home >= 0
        token, slot = np.nonzero(served)
        device, weight = home[served].astype(np.int64), weights[served]
        order = np.lexsort((-weight, device))
        self.token, self.slot = token[order], slot[order]
        self.device, self.weight = device[order], weight[order]
        self.devices, self.total_hz = links.table.shape[1], total_hz
        self.table = _HertzTable(links, budget_s, int(np.bincount(device, minlength=1).max()))

    def choose(self) -> tuple[IntArray, bool]:
        """Indices of the assignments to keep, and whether they fit."""
        last, fits = self._last_experts()
        if not fits:
            return last, False
        rest = np.setdiff1d(np.arange(len(self.token)), last, assume_unique=True)
        return np.concatenate([last, self._greedy(rest, np.bincount(self.device[last], minlength=self.devices))]), True

    def upper_bound(self) -> float:
        """Weight that the linear relaxation keeps, without the rule that each token keeps an expert."""
        everything = np.arange(len(self.token))
        cost = self._extra_hz(everything, np.zeros(self.devices, np.int64))
        order = np.argsort(-_density(self.weight, cost), kind="stable")
        spent = np.cumsum(cost[order])
        whole = int(np.searchsorted(spent, self.total_hz * (1 + _SLACK), side="right"))
        bound = float(self.weight[order[:whole]].sum())
        if whole < len(order) and np.isfinite(cost[order[whole]]) and cost[order[whole]] > 0:
            left = self.total_hz * (1 + _SLACK) - (spent[whole - 1] if whole else 0.0)
            bound += float(self.weight[order[whole]] * left / cost[order[whole]])
        return bound

    def _last_experts(self) -> tuple[IntArray, bool]:
        """One assignment of each token: its heaviest, or where the band is short a cheaper one."""
        heaviest = self._best(self.weight)
        if self._fit(heaviest):
            return heaviest, True
        per_hz = self.table.hz[self.device, 1]
        reachable = np.isfinite(per_hz)
        cheapest = self._best(np.where(reachable, -per_hz, -np.inf))
        if not self._fit(cheapest):
            return cheapest, False
        low, high, found = 0.0, self._dearest_price(per_hz), cheapest
        for _ in range(_PRICE_STEPS):
            price = (low + high) / 2
            tried = self._best(np.where(reachable, self.weight - price * np.where(reachable, per_hz, 0.0), -np.inf))
            if self._fit(tried):
                high, found = price, tried
            else:
                low = price
        return found, True

    def _dearest_price(self, per_hz: FloatArray) -> float:
        """A price of hertz at which every token prefers the cheapest device."""
        costs = np.unique(per_hz[np.isfinite(per_hz)])
        gap = np.diff(costs).min() if len(costs) > 1 else 1.0
        return float(self.weight.max() / max(gap, 1e-12 * costs[-1]))

    def _best(self, value: FloatArray) -> IntArray:
        """The assignment of greatest value of each token; the first in order of the tie."""
        order = np.lexsort((-value, self.token))
        first = np.ones(len(order), bool)
        first[1:] = self.token[order[1:]] != self.token[order[:-1]]
        return order[first]

    def _fit(self, kept: IntArray) -> bool:
        load = np.bincount(self.device[kept], minlength=self.devices)
        return float(self.table.of(load).sum()) <= self.total_hz * (1 + _SLACK)

    def _extra_hz(self, items: IntArray, load: IntArray) -> FloatArray:
        """(n,) what each assignment adds on top of `load` and of those before it on its device; `items` ascend."""
        device = self.device[items]
        begin = np.searchsorted(device, np.arange(self.devices))
        count = load[device] + np.arange(len(items)) - begin[device]
        before, after = self.table.hz[device, count], self.table.hz[device, count + 1]
        return np.where(np.isfinite(after), after - np.where(np.isfinite(after), before, 0.0), np.inf)

    def _greedy(self, items: IntArray, load: IntArray) -> IntArray:
        """Of `items` those to keep besides `load`: the heaviest per hertz, as long as there are hertz."""
        left_hz = self.total_hz * (1 + _SLACK) - float(self.table.of(load).sum())
        taken: list[IntArray] = []
        cost = self._extra_hz(items, load)
        order = np.argsort(-_density(self.weight[items], cost), kind="stable")
        while order.size:
            spent = np.cumsum(cost[order])
            whole = int(np.searchsorted(spent, left_hz, side="right"))
            taken.append(items[order[:whole]])
            if whole == order.size:
                break
            left_hz -= float(spent[whole - 1]) if whole else 0.0
            full = self.device[items[order[whole]]]  # this device's next one does not fit, and no later one of it
            order = order[whole:][self.device[items[order[whole:]]] != full]
        return np.concatenate(taken) if taken else items[:0]


def _density(weight: FloatArray, cost: FloatArray) -> FloatArray:
    """Weight per hertz; free ones first, impossible ones last."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isinf(cost), -1.0, np.where(cost > 0, weight / cost, np.inf))


def _answer(
    experts: Int32Array,
    weights: FloatArray,
    work: _Work,
    kept: IntArray,
    links: Links,
    upper_bound: float,
    lower_bound_s: float,
    status: str,
    renormalise: bool,
) -> BudgetChoice:
    allocation = allocate_bandwidth(_load(work.device[kept], links), links, work.total_hz)
    latency_s = float(allocation.latency_s)
    stays = np.zeros(experts.shape, bool)
    stays[work.token[kept], work.slot[kept]] = True
    left = np.where(stays, weights, 0.0)
    whole, part = weights.sum(axis=1), left.sum(axis=1)
    dropped = np.where(whole > 0, 1.0 - part / np.where(whole > 0, whole, 1.0), 0.0)
    total = float(part.sum())
    if renormalise:
        left *= np.where(part > 0, whole / np.where(part > 0, part, 1.0), 1.0)[:, None]
    return BudgetChoice(
        experts=np.where(stays, experts, np.int32(-1)),
        weights=left,
        dropped_weight=np.maximum(dropped, 0.0),
        bandwidth_hz=allocation.bandwidth_hz,
        latency_s=latency_s,
        kept=total,
        upper_bound=max(upper_bound, total),
        lower_bound_s=min(lower_bound_s, latency_s),
        status=status,
    )
