"""The plain twin of native/wdmoe/budget.hpp, the oracle of the tests: one assignment after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from wdmoe.arrays import BoolArray, FloatArray, Int32Array, Int64Array
from wdmoe.solver.bandwidth import Links
from wdmoe.solver.required_bandwidth import needed_hz

SLACK = 1e-9  # of the band: what rounding may take


def choose_within_budget(
    device: Int32Array, weights: FloatArray, links: Links, total_hz: float, budget_s: float
) -> tuple[BoolArray, float, bool]:
    """As `_native.choose_within_budget`, but for `links`."""
    layer = _Layer(device, weights, links, total_hz * (1 + SLACK), budget_s)
    kept = layer.heaviest()
    none = np.zeros(device.shape, bool)
    whole, bound, price = layer.fill(none, layer.total_hz, relaxed=True)
    easy = layer.fits(kept)
    if not easy:
        kept, fits = layer.squeeze(whole, price)
        if not fits:
            return kept, 0.0, False
    more, _, _ = layer.fill(kept, layer.total_hz - layer.hertz(kept))
    return kept | more if easy else layer.exchange(kept | more), bound, True


@dataclass(slots=True)
class _Layer:
    device: Int32Array  # (tokens, top_k)
    weight: FloatArray
    links: Links
    total_hz: float
    budget_s: float

    table: FloatArray = field(init=False)  # (devices, n) hertz for so many tokens; inf where no band is enough

    def __post_init__(self) -> None:
        hertz = np.zeros((self.links.table.shape[1], self.device.size + 1))
        hertz[:, 1:] = needed_hz(self.links, self.budget_s / np.arange(1, self.device.size + 1))
        self.table = np.where(hertz <= self.total_hz, hertz, np.inf)

    def loads(self, kept: BoolArray) -> Int64Array:
        return np.bincount(self.device[kept], minlength=self.links.table.shape[1]).astype(np.int64)

    def hertz(self, kept: BoolArray) -> float:
        load = self.loads(kept)
        return float(self.table[np.arange(len(load)), load].sum())

    def fits(self, kept: BoolArray) -> bool:
        return self.hertz(kept) <= self.total_hz

    def fill(self, kept: BoolArray, left_hz: float, relaxed: bool = False) -> tuple[BoolArray, float, float]:
        """Takes on top of `kept` the heaviest per extra hertz; what, its weight, and weight per hertz at the end.

        A device whose next one does not fit is passed over; or, if `relaxed`, a part of that is taken, and no more.
        """
        table, load = self.table, self.loads(kept)
        left = [(int(token), int(slot)) for token, slot in np.argwhere((self.device >= 0) & ~kept)]
        queues = [
            sorted((p for p in left if self.device[p] == k), key=lambda p: (-self.weight[p], p))
            for k in range(len(table))
        ]
        taken, value = np.zeros(kept.shape, bool), 0.0
        while True:
            able = [k for k, queue in enumerate(queues) if queue and np.isfinite(table[k, load[k] + 1])]
            if not able:
                return taken, value, 0.0
            extra = {k: float(table[k, load[k] + 1] - table[k, load[k]]) for k in able}
            best = max(able, key=lambda k: self.weight[queues[k][0]] / extra[k] if extra[k] > 0 else np.inf)
            heaviest = float(self.weight[queues[best][0]])
            if extra[best] <= left_hz:
                left_hz -= extra[best]
                value += heaviest
                taken[queues[best].pop(0)] = True
                load[best] += 1
            elif relaxed:
                return taken, value + heaviest * max(left_hz, 0.0) / extra[best], heaviest / extra[best]
            else:
                queues[best] = []

    def heaviest(self) -> BoolArray:
        """Of each token, the first of equals."""
        kept = np.zeros(self.device.shape, bool)
        value = np.where(self.device >= 0, self.weight, -1.0)
        kept[np.arange(len(kept)), value.argmax(axis=1)] = True
        return kept & (self.device >= 0)

    def squeeze(self, kept: BoolArray, price: float) -> tuple[BoolArray, bool]:
        """From the relaxation, the price of a hertz at which what pays fits; what that is, whether anything fits."""
        found, low, high, rise = kept, 0.0, np.inf, 1.03
        for _ in range(12):
            if not (price > 0 and high > low * 1.001):
                break
            kept = self.settle(kept, 1.0, price, 1)
            if self.fits(kept):
                high, found = price, kept
                if self.hertz(kept) >= 0.98 * self.total_hz:
                    break
            else:
                low = price
            price = 0.5 * price if low == 0 else rise * price if np.isinf(high) else float(np.sqrt(low * high))
            rise *= rise
        if np.isfinite(high):
            return found, True
        kept = self.settle(kept, 0.0, 1.0, 8)
        return kept, self.fits(kept)

    def settle(self, kept: BoolArray, factor: float, price: float, passes: int) -> BoolArray:
        """Token after token keeps what gains `factor` weight - price x hertz as things stand, or what loses least."""
        kept, load = kept.copy(), self.loads(kept)
        count = np.arange(self.table.shape[1])
        soft = np.where(np.isfinite(self.table), self.table, self.total_hz * (count + 1))
        for _ in range(passes):
            before = kept.copy()
            for token, homes in enumerate(self.device):
                value = np.full(len(homes), -np.inf)
                for slot in np.flatnonzero(homes >= 0):
                    k = homes[slot]
                    load[k] -= kept[token, slot]
                    value[slot] = factor * self.weight[token, slot] - price * (soft[k, load[k] + 1] - soft[k, load[k]])
                    kept[token, slot] = value[slot] > 0
                    load[k] += kept[token, slot]
                if (homes >= 0).any() and not kept[token].any():
                    kept[token, value.argmax()] = True
                    load[homes[value.argmax()]] += 1
            if (kept == before).all():
                break
        return kept

    def exchange(self, kept: BoolArray) -> BoolArray:
        """Token after token exchanges what it keeps for something heavier, where the hertz that are left allow it."""
        kept = kept.copy()
        for token, homes in enumerate(self.device):
            for a in range(len(homes)):
                for b in np.flatnonzero((homes >= 0) & (self.weight[token] > self.weight[token, a])):
                    if not kept[token, a] or kept[token, b]:
                        continue
                    tried = kept.copy()
                    tried[token, a], tried[token, b] = False, True
                    if self.fits(tried):
                        kept = tried
        return kept
