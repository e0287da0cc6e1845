"""Path loss that needs no scenario: free space, and the log-distance law. Losses are positive decibels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.wireless.checks import broadcast, not_negative, positive

LIGHT_M_S = 299_792_458.0  # exact, by the definition of the metre


def free_space_db(distance_m: npt.ArrayLike, carrier_hz: npt.ArrayLike) -> FloatArray:
    """Loss between isotropic antennas in free space: `20 log10(4 pi d f / c)`.

    Below a wavelength / (4 pi) from the antenna the law would give a gain; it is the far field that it describes.

    Args:
        distance_m: (...,) metres, > 0.
        carrier_hz: (...,) hertz, > 0.
    Returns:
        (...,) decibels.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: H. T. Friis, A Note on a Simple Transmission Formula, Proc. IRE 34(5), 1946; ITU-R P.525.
    """
    distance, carrier = positive("distance_m", distance_m), positive("carrier_hz", carrier_hz)
    broadcast(distance_m=distance, carrier_hz=carrier)
    return np.asarray(20 * (np.log10(distance) + np.log10(carrier) + np.log10(4 * np.pi / LIGHT_M_S)))


def log_distance_db(
    distance_m: npt.ArrayLike, carrier_hz: npt.ArrayLike, exponent: npt.ArrayLike, reference_m: float = 1.0
) -> FloatArray:
    """Free space up to a reference distance, then `10 n log10(d / d0)` more.

    Nearer than the reference the law is free space too, so the loss is continuous and never falls with distance.

    Args:
        distance_m: (...,) metres, > 0.
        carrier_hz: (...,) hertz, > 0.
        exponent: (...,) path loss exponent n, >= 0; 2 is free space, 3 to 4 is usual behind walls.
        reference_m: close-in distance d0, metres, > 0.
    Returns:
        (...,) decibels.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: T. S. Rappaport, Wireless Communications, 2nd ed., section 4.9.1.
    """
    distance, slope = positive("distance_m", distance_m), not_negative("exponent", exponent)
    reference = positive("reference_m", reference_m)
    broadcast(distance_m=distance, carrier_hz=carrier_hz, exponent=slope, reference_m=reference)
    near = free_space_db(np.minimum(distance, reference), carrier_hz)
    return np.asarray(near + 10 * slope * np.log10(np.maximum(distance / reference, 1.0)))
