"""How often fading takes a link below what it needs."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.wireless.checks import broadcast, not_negative, positive, within

MOST_K = 1e4


def rayleigh_outage(threshold: npt.ArrayLike, mean_snr: npt.ArrayLike) -> FloatArray:
    """Probability that a Rayleigh link's SNR is below a threshold: `1 - exp(-threshold / mean)`.

    Args:
        threshold: (...,) plain ratio, >= 0.
        mean_snr: (...,) plain ratio, > 0.
    Returns:
        (...,) 0 to 1, with full precision where it is small.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: Tse and Viswanath, Fundamentals of Wireless Communication, section 5.4.1.
    """
    level, mean = not_negative("threshold", threshold), positive("mean_snr", mean_snr)
    broadcast(threshold=level, mean_snr=mean)
    return np.asarray(-np.expm1(-level / mean))


def rician_outage(threshold: npt.ArrayLike, mean_snr: npt.ArrayLike, k_factor: npt.ArrayLike) -> FloatArray:
    """The same for a Rician link: `1 - Q1(sqrt(2K), sqrt(2(1+K) threshold / mean))`, Q1 Marcum's function.

    As a sum of positive terms, so that small probabilities keep their digits: a Poisson count of mean
    `(1+K) threshold / mean` exceeds an independent one of mean K.

    Args:
        threshold: (...,) plain ratio, >= 0.
        mean_snr: (...,) plain ratio, > 0.
        k_factor: (...,) plain ratio, 0 (Rayleigh) to 1e4.
    Returns:
        (...,) 0 to 1.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: Proakis, Digital Communications, 4th ed., section 2.1.4; the sum is derived here [D].
    """
    level, mean = not_negative("threshold", threshold), positive("mean_snr", mean_snr)
    k = within("k_factor", k_factor, 0, MOST_K)
    shape = broadcast(threshold=level, mean_snr=mean, k_factor=k)
    surely = k + 40 * np.sqrt(k) + 1000  # a mean count from which on the outage is 1 to the last digit
    needed = np.broadcast_to(np.minimum((1 + k) * (level / mean), surely), shape)
    steady = np.broadcast_to(k, shape)
    chances = np.asarray(-np.expm1(-needed))  # right where K is 0, and there much faster
    for place in np.argwhere(steady > 0):
        chances[tuple(place)] = _exceeds(needed[tuple(place)], steady[tuple(place)])
    return chances


def _exceeds(mean: float, other_mean: float) -> float:
    """Probability that a Poisson count is larger than another, independent one."""
    largest = float(max(mean, other_mean))
    counts = int(largest + 12 * math.sqrt(largest) + 40)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, counts)))])
    chance, other = (_poisson(each, log_factorial) for each in (mean, other_mean))
    above = np.concatenate([np.cumsum(chance[::-1])[::-1][1:], [0.0]])
    return min(float(above @ other), 1.0)


def _poisson(mean: float, log_factorial: FloatArray) -> FloatArray:
    count = np.arange(log_factorial.size)
    if mean == 0:
        return np.where(count == 0, 1.0, 0.0)
    return np.asarray(np.exp(count * np.log(mean) - mean - log_factorial))
