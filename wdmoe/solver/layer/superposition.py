"""Multicast by superposition coding: the least time in which one transmitter tells all devices what each needs.

Everything that a weak device decodes, a stronger one decodes too (a degraded Gaussian broadcast channel). So bits for
several devices are a message of the weakest of them, and the channel carries one message for each strength. With
devices from the weakest (1) to the strongest (K), SNRs g_k at full power over the whole band, and n_k bits in the
messages of level k, device k cancels the levels below its own and hears those above as noise:

    n_k / (T B) = log2(1 + g_k p_k / (1 + g_k (p_(k+1) + .. + p_K)))

Eliminating the powers p from the strongest level down, and with N_k = n_1 + .. + n_k, they sum to the whole power when

    sum_k w_k exp(N_k u) = 1 + g_1,   w_k = g_1 / g_k - g_1 / g_(k+1),   w_K = g_1 / g_K,   u = ln 2 / (T B)

w is at least 0 and sums to 1: the logarithm of the left side is convex and rises in u, so Newton's method from above
comes down to the only root and never overshoots [D].

These are corner points of the capacity region (Cover and Thomas, 2nd ed., section 15.1.3, for two; Bergmans 1973 and
Gallager 1974 for more), so no code is faster, neither time nor frequency division of the same band and power.
Assumed: Gaussian codes, ideal cancellation, the station's power spread evenly over the whole band.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wdmoe.arrays import BoolArray, FloatArray, IntArray

_STEPS = 100  # of Newton's method, at most
_CLOSE = 1e-13  # relative change of u at which it has come to rest


@dataclass(frozen=True, slots=True, eq=False)
class Superposition:
    """Messages by level, and what each level is sent with. Levels go from the weakest device to the strongest."""

    bits: FloatArray  # (levels,) in its messages
    power: FloatArray  # (levels,) shares of the station's power, sum 1; 0 where there are no bits
    wanted: BoolArray  # (levels, devices) whether a device wants bits of this level
    seconds: float  # until all are decoded; infinite where a device that wants bits hears nothing

    def seconds_at(self, snr: FloatArray, total_hz: float) -> float:
        """How long it takes where the devices hear better or worse than it was made for.

        Powers stay. Every level goes on (ideal rateless codes) until all that want something of it, or of a level
        above it, have decoded it.

        Args:
            snr: (devices,) that there is, plain ratio at full power over the whole band.
            total_hz: hertz.
        """
        if not self.wanted.any():
            return 0.0
        above = np.append(np.cumsum(self.power[::-1])[::-1][1:], 0.0)  # heard as noise
        heard = np.log1p(snr * self.power[:, None] / (1 + snr * above[:, None])) / np.log(2)  # (levels, devices)
        must = np.logical_or.accumulate(self.wanted[::-1], axis=0)[::-1] & (self.bits > 0)[:, None]
        with np.errstate(divide="ignore"):
            waits = np.where(must, self.bits[:, None], 0.0) / np.where(must, total_hz * heard, 1.0)
        return float(waits.max())


def superpose(token_bits: FloatArray, device: IntArray, snr: FloatArray, total_hz: float) -> Superposition:
    """Messages, powers and time.

    Args:
        token_bits: (tokens,) what is sent of each token, >= 0.
        device: (tokens, top_k) who wants it, -1 for nobody.
        snr: (devices,) plain ratio at full power over the whole band, >= 0.
        total_hz: hertz, > 0.
    """
    order = np.argsort(snr, kind="stable")
    level_of = np.empty(len(snr), np.intp)
    level_of[order] = np.arange(len(snr))
    served = (device >= 0).any(axis=1)
    at, sent = device[served], np.asarray(token_bits, np.float64)[served]
    level = np.where(at >= 0, level_of[at], len(snr)).min(axis=1, initial=len(snr))
    bits = np.bincount(level, sent, minlength=len(snr)).astype(np.float64)
    wanted = np.zeros((len(snr), len(snr)), bool)
    row, column = np.nonzero(at >= 0)
    wanted[level[row], at[row, column]] = True
    seconds = broadcast_s(bits, snr[order], total_hz)
    return Superposition(bits, _powers(bits, snr[order], seconds, total_hz), wanted, seconds)


def broadcast_s(bits: FloatArray, snr: FloatArray, total_hz: float) -> float:
    """Least seconds for messages of `bits` (levels,), to be decoded at `snr` (levels,), which rises, and above it."""
    used = bits > 0
    if not used.any():
        return 0.0
    strength, load = snr[used], np.cumsum(bits[used])
    if not strength[0] > 0:
        return float("inf")
    inverse = strength[0] / strength
    weight = inverse - np.append(inverse[1:], 0.0)
    load = load / load[-1]  # so that u is near 1
    goal = np.log1p(strength[0])
    u = goal / float(weight @ load)  # by Jensen the left side is at least the goal here
    for _ in range(_STEPS):
        step = (_log_mean_exp(weight, load * u) - goal) / _slope(weight, load, load * u)
        u -= step
        if step <= _CLOSE * u:
            break
    return float(bits.sum() * np.log(2) / (total_hz * u))


def _log_mean_exp(weight: FloatArray, height: FloatArray) -> float:
    """log(sum of weight exp(height)) for weights that sum to 1: without overflow, and with all digits near 0."""
    if height[-1] < 1:
        return float(np.log1p(weight @ np.expm1(height)))
    return float(np.log(weight @ np.exp(height - height[-1])) + height[-1])


def _slope(weight: FloatArray, load: FloatArray, height: FloatArray) -> float:
    parts = weight * np.exp(height - height[-1])
    return float(parts @ load / parts.sum())


def _powers(bits: FloatArray, snr: FloatArray, seconds: float, total_hz: float) -> FloatArray:
    """(levels,) shares of the power. From the strongest level down, which adds positive numbers only."""
    power, above = np.zeros(len(bits)), 0.0
    if not 0 < seconds < np.inf:
        return power
    for level in np.flatnonzero(bits)[::-1]:
        nats = bits[level] * np.log(2) / (seconds * total_hz)
        power[level] = np.expm1(nats) * (1 / snr[level] + above)
        above += power[level]
    return power
