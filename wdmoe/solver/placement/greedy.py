"""Placement for any size: longest load first, then moves and swaps, then replicas. NumPy only.

What is guaranteed [D]. With one copy an expert and memory that turns no device away, each layer is scheduling on
uniform machines, and "most used expert first, to the device that would finish it first" is LPT: every layer takes at
most 2 - 2/(devices + 1) times its least time (Gonzalez, Ibarra and Sahni, SIAM J. Computing 6, 1977), or
4/3 - 1/(3 devices) times where all devices are equally fast (Graham, SIAM J. Appl. Math. 17, 1969). Moves and swaps
only lower the sum, so it is within that factor too. Where memory did turn a device away, or with replicas, nothing is
promised in advance; `lower_bound_s` then still says how far from the best the plan can be at most.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.solver.placement.problem import (
    PlacementProblem,
    Plan,
    Progress,
    device_loads,
    judged_plan,
    layer_bounds_s,
    no_plan,
)
from wdmoe.solver.placement.shares import best_shares

LEAST_GAIN = 1e-8  # of the latency, for a move or swap to be made
WORTH = 1e-3  # a copy must take this part off the load that its layer carries too much
Spots = npt.NDArray[np.int64]


def place_greedily(problem: PlacementProblem, progress: Progress | None = None) -> Plan:
    """A good plan, fast; deterministic.

    Returns:
        status "optimal" (its own bound proves it), "feasible", "infeasible" (experts of one size, too little memory) or
        "not_found" (experts of several sizes that did not fit in the order tried).
    """
    tell = progress or (lambda stage, done: None)
    start = _longest_first(problem)
    if start is None:
        one_size = len(np.unique(problem.expert_bytes)) == 1
        too_much = problem.frequency.shape[1] * problem.expert_bytes.sum() > problem.memory_bytes.sum()
        return no_plan(problem, "infeasible" if one_size or too_much else "not_found")
    at, turned_away = start
    bounds = layer_bounds_s(problem)
    if not turned_away and problem.replicas == 1:
        bounds = np.maximum(bounds, _times(problem, at).max(axis=1) / _factor(problem.token_s))
    at = _Board(problem, at).polish(tell)
    share = _shares(problem, at)
    if problem.replicas > 1:
        share = _Copies(problem, share).spread(tell)
    return judged_plan(problem, share, float(bounds.sum()))


def _factor(token_s: FloatArray) -> float:
    devices = len(token_s)
    return 4 / 3 - 1 / (3 * devices) if np.ptp(token_s) == 0 else 2 - 2 / (devices + 1)


def _longest_first(problem: PlacementProblem) -> tuple[Spots, bool] | None:
    """(layers, experts) device of each expert, and whether a full device was passed over; None if one fits nowhere."""
    layers, experts, devices = problem.shape
    at: Spots = np.zeros((layers, experts), np.int64)
    free = problem.memory_bytes.copy()
    load = np.zeros((layers, devices))
    size = np.repeat(problem.expert_bytes, experts)
    turned_away = False
    for item in np.lexsort((-problem.frequency.ravel(), -size)).tolist():
        layer, expert = divmod(item, experts)
        finish = (load[layer] + problem.frequency[layer, expert]) * problem.token_s
        fits = free >= size[item]
        if not fits.any():
            return None
        device = int(np.lexsort((-free, np.where(fits, finish, np.inf)))[0])
        turned_away |= bool(finish[device] > finish.min())
        at[layer, expert] = device
        load[layer, device] += problem.frequency[layer, expert]
        free[device] -= size[item]
    return at, turned_away


def _shares(problem: PlacementProblem, at: Spots) -> FloatArray:
    return np.asarray(at[..., None] == np.arange(problem.shape[2]), np.float64)


def _times(problem: PlacementProblem, at: Spots) -> FloatArray:
    return device_loads(problem, _shares(problem, at)) * problem.token_s


class _Board:
    """Improves a plan of single copies by the best move or swap, one at a time. Each lowers the latency: it ends."""

    def __init__(self, problem: PlacementProblem, at: Spots) -> None:
        self._problem = problem
        self._at = at
        self._free = problem.memory_bytes - np.einsum("led,l->d", _shares(problem, at), problem.expert_bytes)
        self._load = device_loads(problem, _shares(problem, at))
        layers, experts, devices = problem.shape
        self._gain = np.zeros((layers, experts, devices))  # of moving an expert to a device, memory aside
        self._swap = np.zeros((layers, 3))  # gain, expert, expert: the best exchange within a layer
        for layer in range(layers):
            self._weigh(layer)

    def polish(self, progress: Progress) -> Spots:
        """(layers, experts) device of each expert, after all that helps."""
        most = 20 * self._at.size
        for step in range(most):
            progress("improve", step / most)
            if not self._step():
                break
        progress("improve", 1.0)
        return self._at

    def _step(self) -> bool:
        least = LEAST_GAIN * float((self._load * self._problem.token_s).max(axis=1).sum())
        best, moves = max(self._best_move(), self._best_swap(), key=lambda found: found[0])
        if not best > least:
            best, moves = self._best_trade()  # the dear one to find
        if not best > least:
            return False
        for layer, expert, device in moves:
            size = self._problem.expert_bytes[layer]
            self._free[self._at[layer, expert]] += size
            self._free[device] -= size
            self._at[layer, expert] = device
        for layer in {move[0] for move in moves}:
            self._load[layer] = np.bincount(self._at[layer], self._problem.frequency[layer], minlength=len(self._free))
            self._weigh(layer)
        return True

    def _best_move(self) -> tuple[float, list[tuple[int, int, int]]]:
        room = self._free >= self._problem.expert_bytes[:, None]
        gain = np.where(room[:, None, :], self._gain, -np.inf)
        layer, expert, device = (int(i) for i in np.unravel_index(np.argmax(gain), gain.shape))
        return float(gain[layer, expert, device]), [(layer, expert, device)]

    def _best_swap(self) -> tuple[float, list[tuple[int, int, int]]]:
        """Within a layer, where all experts need the same memory."""
        layer = int(np.argmax(self._swap[:, 0]))
        gain, one, other = self._swap[layer]
        one, other = int(one), int(other)
        return float(gain), [
            (layer, one, int(self._at[layer, other])),
            (layer, other, int(self._at[layer, one])),
        ]

    def _best_trade(self) -> tuple[float, list[tuple[int, int, int]]]:
        """Experts of two layers change places: the way on when memory is full."""
        found: tuple[float, list[tuple[int, int, int]]] = (-np.inf, [])
        size = self._problem.expert_bytes
        for one in range(len(self._free)):
            for other in range(one):
                go = np.where(self._at == one, self._gain[:, :, other], -np.inf)
                come = np.where(self._at == other, self._gain[:, :, one], -np.inf)
                total = go.max(axis=1)[:, None] + come.max(axis=1)
                more = size[:, None] - size  # bytes that `other` then holds more, and `one` less
                fits = (self._free[other] >= more) & (self._free[one] >= -more)
                total = np.where(fits & ~np.eye(len(size), dtype=bool), total, -np.inf)
                first, second = divmod(int(np.argmax(total)), len(size))
                if total[first, second] > found[0]:
                    moves = [(first, int(go[first].argmax()), other), (second, int(come[second].argmax()), one)]
                    found = float(total[first, second]), moves
        return found

    def _weigh(self, layer: int) -> None:
        """What every move and every swap of a layer's experts would gain."""
        pace, use, at = self._problem.token_s, self._problem.frequency[layer], self._at[layer]
        experts, devices = len(use), len(pace)
        now = float((self._load[layer] * pace).max())
        unit = np.eye(devices)
        # (experts, devices, devices): the loads once an expert has gone from its device to another one
        after = self._load[layer] + use[:, None, None] * (unit[None] - unit[at][:, None, :])
        self._gain[layer] = now - (after * pace).max(axis=2)
        self._gain[layer, np.arange(experts), at] = -np.inf
        busiest = int(np.argmax(self._load[layer] * pace))
        mine = np.flatnonzero(at == busiest)
        if not len(mine):  # no expert of this layer is used at all
            self._swap[layer] = -np.inf, 0, 0
            return
        shift = (use[mine, None] - use)[..., None] * (unit[at][None] - unit[busiest])
        gain = now - ((self._load[layer] + shift) * pace).max(axis=2)
        gain[:, at == busiest] = -np.inf
        row, other = divmod(int(np.argmax(gain)), experts)
        self._swap[layer] = gain[row, other], mine[row], other


class _Copies:
    """Adds copies where they take most from overloaded devices, as long as memory lasts."""

    def __init__(self, problem: PlacementProblem, share: FloatArray) -> None:
        self._problem = problem
        self._share = share
        self._held = share > 0
        self._free = problem.memory_bytes - np.einsum("led,l->d", self._held, problem.expert_bytes)
        self._gain = np.stack([self._weigh(layer) for layer in range(problem.shape[0])])

    def spread(self, progress: Progress) -> FloatArray:
        """(layers, experts, devices) shares, after all that helps. No copy raises any layer's time."""
        layers, experts, devices = self._problem.shape
        most = layers * experts * (min(self._problem.replicas, devices) - 1)
        for step in range(most):
            progress("copies", step / most)
            room = self._free >= self._problem.expert_bytes[:, None]
            gain = np.where(room[:, None, :], self._gain / self._problem.expert_bytes[:, None, None], 0.0)
            layer, expert, device = (int(i) for i in np.unravel_index(np.argmax(gain), gain.shape))
            if not gain[layer, expert, device] > 0:
                break
            self._add(layer, expert, device)
        progress("copies", 1.0)
        return self._share

    def _add(self, layer: int, expert: int, device: int) -> None:
        problem = self._problem
        self._held[layer, expert, device] = True
        self._share[layer] = best_shares(problem.frequency[layer], problem.token_s, self._held[layer])
        used = self._share[layer] > 0
        unused = self._held[layer] & ~used & (used.sum(axis=1, keepdims=True) > 0)
        self._held[layer] &= ~unused
        self._free[device] -= problem.expert_bytes[layer]
        self._free += unused.sum(axis=0) * problem.expert_bytes[layer]
        self._gain[layer] = self._weigh(layer)
        if unused[expert, device]:
            self._gain[layer, expert, device] = 0.0  # it does not help as things are: not again at once

    def _weigh(self, layer: int) -> FloatArray:
        """(experts, devices) what a copy takes off sum s * load^2, by moving load from the expert's slowest device.

        0 where that is not worth a copy, where one stands already, or where the expert has all it may have.
        """
        pace, use = self._problem.token_s, self._problem.frequency[layer]
        load = use @ self._share[layer]
        time = load * pace
        parts = use[:, None] * self._share[layer]
        source = np.where(parts > 0, time, -np.inf).argmax(axis=1)
        ahead = time[source][:, None] - time
        both = pace[source][:, None] + pace
        moved = np.clip(ahead / both, 0, np.take_along_axis(parts, source[:, None], axis=1))
        gain = moved * (2 * ahead - moved * both)
        even = load.sum() ** 2 / (1 / pace).sum()  # what remains when all finish together
        worth = gain > WORTH * max(float((load * time).sum()) - even, 0.0)
        worth &= gain > 1e-9 * even
        closed = self._held[layer] | (self._held[layer].sum(axis=1) >= self._problem.replicas)[:, None]
        return np.asarray(np.where(worth & ~closed, gain, 0.0))
