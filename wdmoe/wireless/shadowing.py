"""Shadowing: log-normal in power, so Gaussian in decibels, and the same for neighbouring places."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.wireless.checks import broadcast, finite, not_negative, positive


def draw_shadowing_db(rng: np.random.Generator, sigma_db: npt.ArrayLike, shape: tuple[int, ...] = ()) -> FloatArray:
    """Extra loss of links that know nothing of each other: zero mean in dB.

    Args:
        rng: the only source of randomness.
        sigma_db: (...,) standard deviation, dB, >= 0.
        shape: of the draws; it must fit that of `sigma_db`.
    Returns:
        Decibels, shape of `sigma_db` and `shape` together.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: 3GPP TR 38.901 section 7.4.1.
    """
    sigma = not_negative("sigma_db", sigma_db)
    common = broadcast(sigma_db=sigma, draws=np.empty(shape))
    return np.asarray(sigma * rng.standard_normal(common))


def move_shadowing_db(
    rng: np.random.Generator,
    last_db: npt.ArrayLike,
    sigma_db: npt.ArrayLike,
    moved_m: npt.ArrayLike,
    decorrelation_m: npt.ArrayLike,
) -> FloatArray:
    """Shadowing after devices moved: Gauss-Markov with correlation `exp(-moved / decorrelation)`.

    Args:
        rng: the only source of randomness.
        last_db: (...,) shadowing before, dB.
        sigma_db: (...,) standard deviation, dB, >= 0.
        moved_m: (...,) way since, metres, >= 0.
        decorrelation_m: (...,) metres, > 0.
    Returns:
        (...,) decibels, with the standard deviation of before.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: M. Gudmundson, Electronics Letters 27(23), 1991; 3GPP TR 38.901 section 7.4.4.
    """
    last, sigma = finite("last_db", last_db), not_negative("sigma_db", sigma_db)
    moved, way = not_negative("moved_m", moved_m), positive("decorrelation_m", decorrelation_m)
    shape = broadcast(last_db=last, sigma_db=sigma, moved_m=moved, decorrelation_m=way)
    kept = np.exp(-moved / way)
    fresh = np.sqrt(-np.expm1(-2 * moved / way)) * sigma * rng.standard_normal(shape)
    return np.asarray(kept * last + fresh)
