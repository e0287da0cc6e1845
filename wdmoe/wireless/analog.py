"""Values sent as they are, as amplitudes: what arrives at each user of one broadcast, in closed form.

A vector of n values, brought to power 1, becomes `ratio x n / 2` complex symbols: with ratio 1 each symbol carries two
values. There is no rate, so nobody waits for the weakest user: all hear the same symbols, each with the distortion of
its own SNR. Distortion is the mean square error over the mean square of the values, 0 to 1.

For white Gaussian values and ratio 1, `1 / (1 + snr)` is what the best code of any kind reaches, and here it is
reached at every user at once (Goblick, IEEE Trans. Inf. Theory 11(4), 1965; Gastpar, Rimoldi and Vetterli, 49(5),
2003). With other ratios a linear code falls behind `separate_distortion`, the bound for one user.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.errors import ConfigError
from wdmoe.wireless.checks import broadcast, decibels, not_negative, positive, within


def analog_distortion(snr_db: npt.ArrayLike, ratio: npt.ArrayLike = 1.0) -> FloatArray:
    """Of white values, each sent `ratio` times in the mean, estimated with least mean square error [D].

    A value that is sent r times has `1 / (1 + r snr)`; with `ratio` between two integers, some values are sent once
    more than others, and below 1 some directions of the vector are not sent at all.

    Args:
        snr_db: (...,) dB within -1000 to 1000.
        ratio: (...,) symbols for each pair of values, > 0.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    """
    snr, times = 10 ** (decibels("snr_db", snr_db) / 10), positive("ratio", ratio)
    broadcast(snr_db=snr, ratio=times)
    whole = np.floor(times)
    more = times - whole
    return np.asarray((1 - more) / (1 + whole * snr) + more / (1 + (whole + 1) * snr))


def unbiased_distortion(snr_db: npt.ArrayLike) -> FloatArray:
    """As `analog_distortion` with ratio 1, where the receiver only undoes the scale: `1 / snr`, above 1 at low SNR."""
    return np.asarray(10 ** (-decibels("snr_db", snr_db) / 10))


def separate_distortion(snr_db: npt.ArrayLike, ratio: npt.ArrayLike = 1.0) -> FloatArray:
    """Least distortion of white Gaussian values at one user by any code of any length: `(1 + snr)^-ratio`.

    Raises:
        ConfigError: as `analog_distortion`.
    Source: Shannon 1948, 1959: the rate of the channel in the distortion rate function of the source.
    """
    snr, times = 10 ** (decibels("snr_db", snr_db) / 10), positive("ratio", ratio)
    broadcast(snr_db=snr, ratio=times)
    return np.asarray((1 + snr) ** -times)


def superposed_distortion(snr_db: npt.ArrayLike, share: npt.ArrayLike, correlation: npt.ArrayLike = 0.0) -> FloatArray:
    """Of two vectors in the same symbols, `sqrt(b) x + sqrt(1 - b) y` brought to power 1, each by least square error.

    The other vector is noise, but for what it has in common with the wanted one [D]:
    `1 - snr / (1 + snr) (sqrt(b) + r sqrt(1 - b))^2 / (1 + 2 r sqrt(b (1 - b)))` for the first. With correlation 1 it
    is the multicast of one vector; with 0 and equal shares it is at least 1/2, whatever the SNR.

    Args:
        snr_db: (...,) dB within -1000 to 1000.
        share: (...,) b, of the power that the first has, 0 to 1.
        correlation: (...,) r, of the two vectors' values, -1 to 1; not -1 where the shares are equal.
    Returns:
        (..., 2) of the first and the second, for a user of that SNR.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    """
    snr = 10 ** (decibels("snr_db", snr_db) / 10)
    part, common = within("share", share, 0, 1), within("correlation", correlation, -1, 1)
    broadcast(snr_db=snr, share=part, correlation=common)
    first, second = np.sqrt(part), np.sqrt(1 - part)
    power = 1 + 2 * common * first * second
    if np.any(power <= 0):
        raise ConfigError("share and correlation must leave some power: equal shares of opposite vectors are nothing")
    agreement = np.stack(np.broadcast_arrays(first + common * second, second + common * first), axis=-1)
    explained = np.asarray(agreement**2 / np.broadcast_to(power, agreement.shape[:-1])[..., None])
    return np.asarray(1 - (snr / (1 + snr))[..., None] * explained)


def allocate_energy(variances: npt.ArrayLike, energy: float, snr: float) -> FloatArray:
    """How much energy each uncorrelated component gets, so that the sum of square errors is least.

    The error of component j is `v_j / (1 + p_j snr)`. Where the sum of p is fixed, `p_j = max(0, t sqrt(v_j) - 1/snr)`
    with one t for all [D]: at high SNR the amplitude goes as `v^(-1/4)`, and at low SNR weak components are silent.

    Args:
        variances: (components,) v, finite, >= 0, one above 0.
        energy: sum of p, > 0.
        snr: at which the errors are least, plain ratio, > 0.
    Returns:
        (components,) p.
    Raises:
        ConfigError: an argument is not as above.
    Source: K.-H. Lee and D. P. Petersen, IEEE Trans. Commun. 24(12), 1976, for optimal linear codes.
    """
    roots = np.sqrt(not_negative("variances", variances))
    total, noise = float(positive("energy", energy)), 1 / float(positive("snr", snr))
    if roots.ndim != 1 or not roots.any():
        raise ConfigError(f"variances must be (components,), one above 0, got shape {roots.shape}")
    falling = np.sort(roots)[::-1]
    with np.errstate(divide="ignore"):
        level = (total + noise * np.arange(1, len(roots) + 1)) / np.cumsum(falling)
    speaking = np.flatnonzero(falling * level > noise)[-1]  # the most that all get some of it
    return np.asarray(np.maximum(0.0, level[speaking] * roots - noise))


def component_distortion(variances: npt.ArrayLike, energy: npt.ArrayLike, snr: npt.ArrayLike) -> FloatArray:
    """Sum of square errors over the sum of variances, at each SNR.

    Args:
        variances: (components,) >= 0, one above 0.
        energy: (components,) >= 0; 0 where it is not sent.
        snr: (...,) plain ratio, >= 0; it need not be the one that the energy was allocated for.
    Returns:
        (...,) 0 to 1.
    Raises:
        ConfigError: an argument is not as above.
    """
    spread, sent = not_negative("variances", variances), not_negative("energy", energy)
    heard = not_negative("snr", snr)
    if spread.ndim != 1 or sent.shape != spread.shape or not spread.any():
        raise ConfigError(f"need variances and energy (components,), got shapes {spread.shape} and {sent.shape}")
    return np.asarray((spread / (1 + heard[..., None] * sent)).sum(axis=-1) / spread.sum())
