"""How many hertz a device needs to be in time: the inverse of the link's latency model, for many at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.solver.bandwidth import Links

FloatArray = npt.NDArray[np.float64]

_STEPS = 60
_CLOSE = 1e-12
_EDGE = 1e-9  # nearer than this to what infinite bandwidth takes counts as out of reach
_HIGHEST_EFFICIENCY = 64.0  # bit/s/Hz, beyond any link
_TINY = 1e-300


def needed_hz(links: Links, token_s: FloatArray) -> FloatArray:
    """Bandwidth at which one token takes `token_s` seconds.

    Newton's method on 1 / (time on the air), which is concave in the bandwidth: from the left it never overshoots.

    Args:
        links: (devices,).
        token_s: (n,) seconds, > 0.
    Returns:
        (devices, n) Hz; inf where no bandwidth is enough, 0 where none is needed.
    """
    bits, strength, compute_s = links.table[:2, :, None], links.table[2:4, :, None], links.table[4][:, None]
    air_s = token_s[None, :] - compute_s
    free = np.broadcast_to((bits == 0).all(axis=0), air_s.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        alone_s = np.where(bits > 0, bits / strength, 0.0).sum(axis=0)  # flat: seconds at one hertz
        if links.flat:
            needed: FloatArray = np.where(air_s > 0, alone_s / air_s, np.inf)
            return np.where(free & (air_s >= 0), 0.0, needed)
    possible = (air_s > np.log(2) * alone_s * (1 + _EDGE)) & ~free  # that much it takes with all the bandwidth there is
    out: FloatArray = np.where(free & (air_s >= 0), 0.0, np.inf)
    if possible.any():
        pairs = [
            (np.broadcast_to(b, air_s.shape)[possible], np.broadcast_to(s, air_s.shape)[possible])
            for b, s in zip(bits, strength, strict=True)
        ]
        out[possible] = _solve(pairs, air_s[possible])
    return out


def _solve(pairs: list[tuple[FloatArray, FloatArray]], wanted_s: FloatArray) -> FloatArray:
    """(n,) bandwidth at which bits / rate of all (bits, SNR) pairs together take `wanted_s`."""
    total_bits: FloatArray = np.sum([bits for bits, _ in pairs], axis=0)
    band = total_bits / (_HIGHEST_EFFICIENCY * wanted_s)  # from the left
    for _ in range(_STEPS):
        time, fall = np.zeros_like(band), np.zeros_like(band)
        for bits, snr in pairs:
            ratio = np.where(bits > 0, snr, 1.0) / band
            log = np.log1p(ratio)
            rate = band * log / np.log(2)
            time += bits / rate
            fall += bits * np.maximum(log - ratio / (1 + ratio), 0.0) / np.log(2) / rate**2
        move = (time / wanted_s - 1.0) * time / np.maximum(fall, _TINY)
        band = np.maximum(band + move, 0.1 * band)
        if (np.abs(move) <= _CLOSE * band).all():
            break
    return band
