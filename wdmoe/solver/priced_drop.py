"""Which experts of a single token are worth their time, at a price: seconds for worth [D].

Of one token's few experts none is light, so a bound on the share that each layer may drop lets nothing go. A price that
all layers and tokens share finds the few places where much time stands against little worth.
"""

from __future__ import annotations

import numpy as np

from wdmoe.arrays import BoolArray, FloatArray, IntArray
from wdmoe.solver.bandwidth import Links, allocate_bandwidth


def drop_at_price(
    device: IntArray,
    worth: FloatArray,
    links: Links,
    total_hz: float,
    price_s: float,
    may_drop: float,
) -> BoolArray:
    """Drop assignments one by one, the one that gains most first, while that gains time above its price.

    Args:
        device: (k,) that serves each assignment of the token, -1: none does, it is kept and costs nothing.
        worth: (k,) >= 0, in any unit.
        links: (devices,) what a token costs.
        total_hz: the band that they share, > 0.
        price_s: seconds that a unit of worth must save.
        may_drop: worth that may be dropped in all.
    Returns:
        (k,) which are kept, at least one.
    """
    devices = links.table.shape[1]
    kept = np.ones(len(device), np.bool_)
    left = may_drop
    latency_s = _latency_s(device, kept, links, total_hz, devices)
    while True:
        best, gain_s, without_s = -1, 0.0, latency_s
        for place in np.flatnonzero(kept & (device >= 0) & (worth <= left)).tolist():
            kept[place] = False
            other_s = _latency_s(device, kept, links, total_hz, devices)
            kept[place] = True
            if latency_s - other_s - price_s * worth[place] > gain_s:
                best, gain_s, without_s = place, latency_s - other_s - price_s * worth[place], other_s
        if best < 0 or kept.sum() == 1:
            return kept
        kept[best] = False
        latency_s, left = without_s, left - float(worth[best])


def _latency_s(device: IntArray, kept: BoolArray, links: Links, total_hz: float, devices: int) -> float:
    load = np.bincount(device[kept & (device >= 0)], minlength=devices).astype(np.float64)
    return float(allocate_bandwidth(load, links, total_hz).latency_s) if load.any() else 0.0
