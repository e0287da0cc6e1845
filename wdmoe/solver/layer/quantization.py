"""Bits of a value of an activation on the air: what rounding to them costs, and which assignments get how many.

Below 16 bits a vector travels as signed integers and one float16, the step between them, which is its greatest value
over the greatest integer. So a value is wrong by half a step at most: with b bits by this share of the greatest value,

    d(b) = (1 + 2^-11) / (2 (2^(b-1) - 1)),    d(16) = 2^-11 for float16 itself

(as long as float16 can hold the step). An expert's answer enters a token's output with its gate weight w, so the
output is wrong by at most  sum of w d(b)  times the greatest value in its experts' answers [D]. `round_within` bounds
that sum for each token. What rounding on the way down does passes through the expert, which has no such bound: measure.
"""

from __future__ import annotations

import itertools

import numpy as np

from wdmoe.arrays import FloatArray, IntArray

BITS = (4, 8, 16)
SCALE_BITS = 16  # of each activation vector that has fewer than 16 bits a value: the step
_HALF = 2.0**-11  # relative error of rounding to float16
_ROUNDING = 1e-12  # of a token's weight: what sums of weights may differ by


def vector_bits(hidden: int, bits: FloatArray) -> FloatArray:
    """(...,) bits of a whole vector of `hidden` values with (...,) bits each; 0 where these are 0."""
    return np.asarray(hidden * bits + np.where((bits > 0) & (bits < 16), SCALE_BITS, 0))


def distortion(bits: int) -> float:
    """d(b): greatest error of a value that travels with 4, 8 or 16 bits, as a share of its vector's greatest value."""
    return _HALF if bits == 16 else (1 + _HALF) / (2 * (2 ** (bits - 1) - 1))


def round_within(
    weights: FloatArray, device: IntArray, price: FloatArray, most_bits: int, max_distortion: float
) -> FloatArray:
    """Fewer bits where they save the most time for what they distort.

    Each token may be distorted by `sum of w d(b) <= max_distortion x sum of w`. Steps from 16 to 8 and from 8 to 4 bits
    are taken by seconds saved over distortion added, as long as they fit: so the lightest assignments on the dearest
    links come first. Of one assignment the first step always has the better ratio.

    Args:
        weights, device: (tokens, top_k) of what is computed; device -1 where nothing is.
        price: (devices,) seconds that a bit takes, in any unit, >= 0, perhaps infinite.
        most_bits: of an assignment: where the steps begin.
        max_distortion: 0 to 1; below `distortion(most_bits)` nothing is rounded further.
    Returns:
        (tokens, top_k) bits of a value, 0 where nothing is computed.
    """
    served = device >= 0
    weight, dear = np.where(served, weights, 0.0), np.where(served, price[device], 0.0)
    bits = np.where(served, float(most_bits), 0.0)
    total = weight.sum(axis=1)
    left = (max_distortion + _ROUNDING - distortion(most_bits)) * total
    ladder = [each for each in sorted(BITS, reverse=True) if each <= most_bits]
    steps = list(itertools.pairwise(ladder))
    cost = np.concatenate([weight * (distortion(low) - distortion(high)) for high, low in steps] or [weight], axis=1)
    gain = np.concatenate([dear * (high - low) for high, low in steps] or [dear], axis=1)
    ratio = np.divide(gain, cost, out=np.full(gain.shape, np.inf), where=cost > 0)
    order = np.argsort(-ratio, axis=1, kind="stable")
    rows, top_k = np.arange(len(bits)), device.shape[1]
    for column in order.T if steps else ():
        step, at = column // top_k, column % top_k
        high, low = np.array(steps, float)[step].T
        paid = cost[rows, column]
        takes = (bits[rows, at] == high) & (paid <= left)
        bits[rows[takes], at[takes]] = low[takes]
        left = left - np.where(takes, paid, 0.0)
    return bits


def as_widest_of_device(bits: FloatArray, device: IntArray) -> FloatArray:
    """(tokens, top_k): what a device has of one token travels once, with the bits of the most exacting of it."""
    same = (device[:, :, None] == device[:, None, :]) & (device >= 0)[:, :, None]
    return np.asarray(np.where(same, bits[:, None, :], 0.0).max(axis=2, initial=0.0))
