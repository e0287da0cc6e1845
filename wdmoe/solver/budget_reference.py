"""The plain twin of native/wdmoe/budget.hpp, the oracle of the tests: one assignment after the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.solver.bandwidth import Links
from wdmoe.solver.hertz import needed_hz

Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Pair = tuple[int, int]  # token, slot

SLACK = 1e-9  # of the band: what rounding may take
PRICE_STEPS = 40


def choose_within_budget(
    device: Int32Array, weights: FloatArray, links: Links, total_hz: float, budget_s: float
) -> tuple[BoolArray, float, bool]:
    """As `_native.choose_within_budget`, but for `links`."""
    layer = _Layer(device, weights, links, total_hz * (1 + SLACK), budget_s)
    last, fits = layer.last_experts()
    kept = np.zeros(device.shape, bool)
    for pair in last:
        kept[pair] = True
    if not fits:
        return kept, 0.0, False
    rest = [pair for pair in layer.served if not kept[pair]]
    for pair in layer.fill(rest, layer.loads(last), layer.total_hz - layer.hertz(last))[0]:
        kept[pair] = True
    none = np.zeros(len(layer.table), np.int64)
    return kept, layer.fill(layer.served, none, layer.total_hz, relaxed=True)[1], True


@dataclass(slots=True)
class _Layer:
    device: Int32Array  # (tokens, top_k)
    weight: FloatArray
    links: Links
    total_hz: float
    budget_s: float

    @property
    def table(self) -> FloatArray:
        """(devices, n) hertz for so many tokens; inf where the whole band is not enough."""
        hertz = np.zeros((self.links.table.shape[1], self.device.size + 1))
        hertz[:, 1:] = needed_hz(self.links, self.budget_s / np.arange(1, self.device.size + 1))
        return np.where(hertz <= self.total_hz, hertz, np.inf)

    @property
    def served(self) -> list[Pair]:
        return [(int(token), int(slot)) for token, slot in np.argwhere(self.device >= 0)]

    def loads(self, pairs: list[Pair]) -> npt.NDArray[np.int64]:
        return np.bincount([self.device[pair] for pair in pairs], minlength=self.links.table.shape[1]).astype(np.int64)

    def hertz(self, pairs: list[Pair]) -> float:
        load = self.loads(pairs)
        return float(self.table[np.arange(len(load)), load].sum())

    def fill(
        self, pairs: list[Pair], load: npt.NDArray[np.int64], left_hz: float, relaxed: bool = False
    ) -> tuple[list[Pair], float]:
        """Takes of `pairs`, on top of `load`, the heaviest per extra hertz; what, and its weight.

        A device whose next one does not fit is passed over; or, if `relaxed`, a part of that is taken, and no more.
        """
        table, load = self.table, load.copy()
        queues = [
            sorted((p for p in pairs if self.device[p] == k), key=lambda p: (-self.weight[p], p))
            for k in range(len(table))
        ]
        taken: list[Pair] = []
        value = 0.0
        while True:
            open_ones = [k for k, queue in enumerate(queues) if queue and np.isfinite(table[k, load[k] + 1])]
            if not open_ones:
                return taken, value
            extra = {k: float(table[k, load[k] + 1] - table[k, load[k]]) for k in open_ones}
            best = max(open_ones, key=lambda k: self.weight[queues[k][0]] / extra[k] if extra[k] > 0 else np.inf)
            if extra[best] <= left_hz:
                left_hz -= extra[best]
                value += float(self.weight[queues[best][0]])
                taken.append(queues[best].pop(0))
                load[best] += 1
            elif relaxed:
                return taken, value + float(self.weight[queues[best][0]]) * max(left_hz, 0.0) / extra[best]
            else:
                queues[best] = []

    def last_experts(self) -> tuple[list[Pair], bool]:
        """One assignment of each token: its heaviest, or where the band is short a cheaper one; whether they fit."""
        each = self.table[:, 1]
        heaviest = self.best(1.0, np.zeros(len(each)))
        if self.hertz(heaviest) <= self.total_hz:
            return heaviest, True
        cheapest = self.best(0.0, each)
        if not self.hertz(cheapest) <= self.total_hz:
            return cheapest, False
        high, found = self.dearest(cheapest, each), cheapest
        low = 1e-9 * high
        for _ in range(PRICE_STEPS):
            if not high > low * (1 + 1e-9):
                break
            middle = float(np.sqrt(low * high))
            tried = self.best(1.0, middle * each)
            if self.hertz(tried) <= self.total_hz:
                high, found = middle, tried
            else:
                low = middle
        return found, True

    def dearest(self, cheapest: list[Pair], each: FloatArray) -> float:
        """A price of hertz at which every token prefers the cheapest device."""
        most = 0.0
        for token, slot in cheapest:
            for other in np.flatnonzero(self.device[token] >= 0):
                dearer = each[self.device[token, other]] - each[self.device[token, slot]]
                if dearer > 0:
                    most = max(most, float((self.weight[token, other] - self.weight[token, slot]) / dearer))
        return 2 * most

    def best(self, factor: float, price: FloatArray) -> list[Pair]:
        """Each token's assignment of greatest value; of equals the first, of unreachable ones the heaviest."""
        chosen = []
        for token, homes in enumerate(self.device):
            slots = np.flatnonzero(homes >= 0)
            if not slots.size:
                continue
            value = factor * self.weight[token, slots] - price[homes[slots]]
            if np.isneginf(value).all():
                value = self.weight[token, slots]
            chosen.append((token, int(slots[value.argmax()])))
        return chosen
