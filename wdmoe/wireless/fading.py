"""Small-scale fading of one block: complex amplitudes of mean power 1, Rayleigh or Rician."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import ComplexArray, FloatArray
from wdmoe.errors import ConfigError
from wdmoe.wireless.checks import broadcast, numbers_of, unmasked


def draw_rayleigh(rng: np.random.Generator, shape: tuple[int, ...]) -> ComplexArray:
    """Many paths and none that stands out: circular Gaussian amplitudes whose power is exponential with mean 1.

    Args:
        rng: the only source of randomness.
        shape: of the draws.
    Returns:
        Amplitudes; `power_gain` of them is what an SNR is multiplied by.
    Source: Tse and Viswanath, Fundamentals of Wireless Communication, section 2.4.2.
    """
    parts = rng.standard_normal((*shape, 2))
    return np.asarray((parts[..., 0] + 1j * parts[..., 1]) * np.sqrt(0.5))


def draw_rician(rng: np.random.Generator, k_factor: npt.ArrayLike, shape: tuple[int, ...] = ()) -> ComplexArray:
    """One steady path of random phase, K times as strong as all others together.

    Args:
        rng: the only source of randomness.
        k_factor: (...,) K as a plain ratio, >= 0; 0 is Rayleigh, infinity does not fade.
        shape: of the draws; it must fit that of `k_factor`.
    Returns:
        Amplitudes of mean power 1, shape of `k_factor` and `shape` together.
    Raises:
        ConfigError: K is negative or NaN, or shapes do not fit.
    Source: Tse and Viswanath, section 2.4.2.
    """
    ratio = k_ratio(k_factor)
    common = broadcast(k_factor=ratio, draws=np.empty(shape))
    return with_steady_path(draw_rayleigh(rng, common), 2 * np.pi * rng.random(common), ratio)


def with_steady_path(scattered: ComplexArray, phase_rad: npt.ArrayLike, k_factor: npt.ArrayLike) -> ComplexArray:
    """Rician amplitudes from Rayleigh ones.

    Args:
        scattered: (...,) amplitudes of mean power 1.
        phase_rad: (...,) of the steady path.
        k_factor: (...,) as in `draw_rician`.
    Returns:
        (...,) amplitudes of mean power 1.
    Raises:
        ConfigError: K is negative or NaN, or shapes do not fit.
    """
    ratio = k_ratio(k_factor)
    broadcast(scattered=scattered, phase_rad=phase_rad, k_factor=ratio)
    others = 1 / (1 + ratio)  # their share of the power; right at infinity too
    steady = np.exp(1j * numbers_of("phase_rad", phase_rad))
    return np.asarray(np.sqrt(1 - others) * steady + np.sqrt(others) * scattered)


def power_gain(amplitude: npt.ArrayLike) -> FloatArray:
    """Power of amplitudes, |h|^2, same shape."""
    values = np.asarray(unmasked("amplitude", amplitude), dtype=np.complex128)
    return np.asarray(values.real**2 + values.imag**2)


def k_ratio(k_factor: npt.ArrayLike) -> FloatArray:
    """K as float64, at least 0 and perhaps infinite, else ConfigError."""
    ratio = numbers_of("k_factor", k_factor)
    if not np.all(ratio >= 0):  # also refuses NaN
        raise ConfigError(f"k_factor must be zero or positive, a plain ratio, got {k_factor!r:.60}")
    return ratio
