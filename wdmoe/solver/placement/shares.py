"""How experts that stand on several devices split their tokens, for the least time of a layer."""

from __future__ import annotations

import numpy as np

from wdmoe.arrays import BoolArray, FloatArray

MOST_SWEEPS = 200
SETTLED = 1e-9  # relative


def best_shares(frequency: FloatArray, token_s: FloatArray, held: BoolArray) -> FloatArray:
    """Split one layer's load so that its slowest device is done soonest.

    One expert after the other is spread over its devices until those finish together. Each step lowers
    sum of s[d] * load[d]^2, strictly convex, over a product of simplices, so the steps converge to its least value;
    the loads there are the lexicographically least base of a polymatroid (Fujishige 1980), whose largest time is
    the least possible. No step raises the largest time, so stopping early costs accuracy only.

    Args:
        frequency: (experts,). token_s: (devices,). held: (experts, devices), a device at least for each expert.
    Returns:
        (experts, devices), sums to 1 over devices.
    """
    share = _first_shares(token_s, held)
    load = frequency @ share
    movable = np.flatnonzero((held.sum(axis=1) > 1) & (frequency > 0))
    for _ in range(MOST_SWEEPS):
        before = float((token_s * load * load).sum())
        for expert in movable:
            where = np.flatnonzero(held[expert])
            rest = load[where] - frequency[expert] * share[expert, where]
            part = _level(frequency[expert], token_s[where], rest)
            load[where] = rest + part
            share[expert, where] = part / frequency[expert]
        if float((token_s * load * load).sum()) >= before * (1 - SETTLED):
            break
    return share


def _first_shares(token_s: FloatArray, held: BoolArray) -> FloatArray:
    pace = held / token_s
    return np.asarray(pace / pace.sum(axis=1, keepdims=True))


def _level(load: float, token_s: FloatArray, rest: FloatArray) -> FloatArray:
    """Pour `load` on top of `rest` so that every device that gets some finishes at the same time, none later."""
    order = np.argsort(token_s * rest, kind="stable")
    pace, below = 1 / token_s[order], rest[order]
    level = (load + np.cumsum(below)) / np.cumsum(pace)  # if the first 1, 2, ... devices take part
    count = int(np.flatnonzero(level > token_s[order] * below)[-1]) + 1
    part = np.zeros(len(rest))
    part[order[:count]] = np.maximum(level[count - 1] * pace[:count] - below[:count], 0)
    return np.asarray(part * (load / part.sum()))
