"""Plain NumPy that judges `_native.allocate`: one block by nested bisection, and the certificate by direct search.

For many blocks the oracles are general solvers (`tests/solver/test_bandwidth.py`), which share no idea with ours.
Digits differ from the native ones in the last places, because logarithms and the order of sums do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wdmoe.arrays import FloatArray

GOLDEN = (5**0.5 - 1) / 2


def seconds_per_token(links: FloatArray, flat: bool, band_hz: FloatArray) -> FloatArray:
    """(devices,) what a token costs on the link, without compute. links: (5, devices), see `bandwidth.Links`.

    A copy of the one that production uses: an oracle shares nothing with what it judges.
    """
    total = np.zeros(links.shape[1])
    for bits, snr in ((links[0], links[2]), (links[1], links[3])):
        used = bits > 0
        rate = band_hz * (snr if flat else np.log1p(snr / band_hz) / np.log(2))
        total[used] += bits[used] / rate[used]
    return total


def one_block(load: FloatArray, links: FloatArray, flat: bool, total_hz: float) -> tuple[FloatArray, float]:
    """Bands and latency of one block, every device loaded, no floors or caps, by bisection on the common finish."""
    fixed = load * links[4]

    def need(finish_s: float) -> FloatArray:
        """Band with which each device finishes in time, at most the total."""
        low, high = np.full(len(load), 1e-18 * total_hz), np.full(len(load), total_hz)
        for _ in range(60):
            middle = np.sqrt(low * high)
            late = load * seconds_per_token(links, flat, middle) + fixed > finish_s
            low, high = np.where(late, middle, low), np.where(late, high, middle)
        return high

    least = float(np.max(load * seconds_per_token(links, flat, np.full(len(load), total_hz)) + fixed))
    most = float(np.max(load * seconds_per_token(links, flat, np.full(len(load), total_hz / len(load))) + fixed))
    for _ in range(60):
        middle = 0.5 * (least + most)
        least, most = (least, middle) if need(middle).sum() <= total_hz else (middle, most)
    return need(most), most


def latency(load: FloatArray, links: FloatArray, flat: bool, band_hz: FloatArray) -> float:
    """Sum over blocks of the slowest device with load."""
    each = np.zeros(load.shape[1])
    used = load.any(axis=0)
    each[used] = seconds_per_token(links[:, used], flat, band_hz[used])
    return float((load * (each + links[4])).max(axis=1).sum())


def lower_bound(
    load: FloatArray, links: FloatArray, flat: bool, total_hz: float, weight: FloatArray, price: float
) -> float:
    """What weights (rows sum to 1 where there is load) and a price per hertz prove, floors and caps left out.

    No device has more than the total.
    """
    mean = (weight * load).sum(axis=0)
    used = mean > 0
    mean, links = mean[used], links[:, used]

    def cost(log_band: FloatArray) -> FloatArray:
        band = np.exp(log_band)
        return np.asarray(mean * seconds_per_token(links, flat, band) + price * band)

    span = np.log(total_hz)
    least = golden(cost, np.full(len(mean), span - 45.0), np.full(len(mean), span))
    return float((mean * links[4]).sum() + least.sum() - price * total_hz)


def status_of(latency_s: float, lower_bound_s: float, tolerance: float) -> str:
    """What an answer is worth, by its two numbers."""
    if lower_bound_s == np.inf:
        return "infeasible"
    closed = np.isfinite(latency_s) and latency_s - lower_bound_s <= tolerance * latency_s
    return "optimal" if closed else "iteration_limit"


def golden(cost: Callable[[FloatArray], FloatArray], low: FloatArray, high: FloatArray) -> FloatArray:
    """Least values of functions that fall, then rise."""
    for _ in range(90):
        step = GOLDEN * (high - low)
        left, right = cost(high - step), cost(low + step)
        low, high = np.where(left > right, high - step, low), np.where(left > right, high, low + step)
    return cost(0.5 * (low + high))
