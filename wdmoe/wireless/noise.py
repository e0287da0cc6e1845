"""Thermal noise, and what is left of a signal above it. SNRs are plain ratios; over a density they are in hertz."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.wireless.checks import broadcast, decibels, not_negative, positive

BOLTZMANN_J_K = 1.380649e-23  # exact, by the definition of the kelvin
ROOM_K = 290.0  # the temperature that noise figures are defined at


def noise_density_w_hz(noise_figure_db: npt.ArrayLike = 0.0, temperature_k: npt.ArrayLike = ROOM_K) -> FloatArray:
    """Complex baseband noise power per hertz at a receiver, `k T F`: -173.98 dBm/Hz at 290 K and 0 dB.

    It is the one-sided density N0: noise in a band of B hertz has the power N0 B, half of it in each of the real and
    imaginary parts.

    Args:
        noise_figure_db: (...,) 0 to 1000 dB; 3GPP evaluations use 5 dB at base stations, 9 dB at devices.
        temperature_k: (...,) kelvin, > 0.
    Returns:
        (...,) watts per hertz.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: ITU-R P.372; Tse and Viswanath, section 2.2.4, for real and imaginary parts.
    """
    figure, temperature = decibels("noise_figure_db", noise_figure_db, 0), positive("temperature_k", temperature_k)
    broadcast(noise_figure_db=figure, temperature_k=temperature)
    return np.asarray(BOLTZMANN_J_K * temperature * 10 ** (figure / 10))


def noise_power_w(band_hz: npt.ArrayLike, density_w_hz: npt.ArrayLike) -> FloatArray:
    """Noise power in a band, `N0 B`: (...,) watts for (...,) hertz >= 0 and (...,) watts per hertz > 0.

    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    """
    band, density = not_negative("band_hz", band_hz), positive("density_w_hz", density_w_hz)
    broadcast(band_hz=band, density_w_hz=density)
    return np.asarray(band * density)


def snr_hz(power_w: npt.ArrayLike, gain: npt.ArrayLike, density_w_hz: npt.ArrayLike) -> FloatArray:
    """Received power over noise density, `P g / N0`: the one number a flat link of fixed power has.

    Divided by the band it is the SNR; divided by `ln 2` it is the rate in bit/s that no band, however wide, exceeds.

    Args:
        power_w: (...,) transmit power, watts, >= 0.
        gain: (...,) power gain of the channel, plain ratio, >= 0.
        density_w_hz: (...,) noise density, watts per hertz, > 0.
    Returns:
        (...,) hertz.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    """
    power, ratio = not_negative("power_w", power_w), not_negative("gain", gain)
    density = positive("density_w_hz", density_w_hz)
    broadcast(power_w=power, gain=ratio, density_w_hz=density)
    return np.asarray(power * ratio / density)
