"""Bit rate of a band. Two ways of spending power, which differ as soon as bands differ.

Fixed power: the link has P whatever its band, so a narrow band is a strong one. `B log2(1 + P g / (N0 B))` is concave
and rising in B with the limit `P g / (N0 ln 2)`. By recollection, unchecked, it is the WDMoE paper's rate [U].
Fixed density: power is spread evenly over the whole band of the system and a link has its band's part of it, as a base
station does that may not exceed its power however the band is cut. The rate is proportional to B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.wireless.checks import broadcast, not_negative, within

MOST = 1e100  # of bands and of SNRs over a density, as in the solver: no quotient overflows
_LEAST_BAND_HZ = 1e-200  # divides in place of 0


class RateLaw(Protocol):
    """How many bits per second and hertz an SNR carries. `Shannon`, or `wdmoe.wireless.mcs.McsTable`."""

    def efficiency_bps_hz(self, snr: npt.ArrayLike) -> FloatArray:
        """(...,) bits per second and hertz, never falling, for (...,) plain ratios >= 0, else ConfigError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shannon:
    """`log2(1 + SNR / gap)`: no errors, codes without end. The gap is what real codes stay behind.

    Raises:
        ConfigError: the gap is negative or not finite.
    Source: Shannon, Bell System Technical Journal 27, 1948; Forney and Ungerboeck, IEEE Trans. Inf. Theory 44(6), 1998,
        for the gap.
    """

    gap_db: float = 0.0

    def __post_init__(self) -> None:
        not_negative("gap_db", self.gap_db)

    def efficiency_bps_hz(self, snr: npt.ArrayLike) -> FloatArray:
        """As `RateLaw`; strictly rising and concave."""
        return np.asarray(np.log1p(not_negative("snr", snr) * 10 ** (-self.gap_db / 10)) / math.log(2))


SHANNON = Shannon()


def fixed_power_bps(band_hz: npt.ArrayLike, snr_hz: npt.ArrayLike, law: RateLaw = SHANNON) -> FloatArray:
    """Bit rate of a link whose power does not depend on its band; with Shannon's law `B log2(1 + S / B)`.

    With an MCS table it jumps, and a wider band can be slower: the SNR falls with the band.

    Args:
        band_hz: (...,) B, hertz, 0 to 1e100.
        snr_hz: (...,) S, received power over noise density, hertz, 0 to 1e100.
        law: from SNR to bits per second and hertz.
    Returns:
        (...,) bits per second; 0 where band or power is 0.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: Cover and Thomas, Elements of Information Theory, 2nd ed., section 9.3.
    """
    band, strength = within("band_hz", band_hz, 0, MOST), within("snr_hz", snr_hz, 0, MOST)
    broadcast(band_hz=band, snr_hz=strength)
    return np.asarray(band * law.efficiency_bps_hz(strength / np.maximum(band, _LEAST_BAND_HZ)))


def fixed_density_bps(
    band_hz: npt.ArrayLike, snr_hz: npt.ArrayLike, total_hz: npt.ArrayLike, law: RateLaw = SHANNON
) -> FloatArray:
    """Bit rate of a link whose power grows with its band; with Shannon's law `B log2(1 + S / B_total)`.

    Args:
        band_hz: (...,) B, hertz, 0 to 1e100.
        snr_hz: (...,) S, received power over noise density if the link had the whole band, hertz, 0 to 1e100.
        total_hz: (...,) the whole band, over which the power is spread, hertz, 1e-100 to 1e100.
        law: from SNR to bits per second and hertz.
    Returns:
        (...,) bits per second.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    """
    band, strength = within("band_hz", band_hz, 0, MOST), within("snr_hz", snr_hz, 0, MOST)
    total = within("total_hz", total_hz, 1 / MOST, MOST)
    broadcast(band_hz=band, snr_hz=strength, total_hz=total)
    return np.asarray(band * law.efficiency_bps_hz(strength / total))


def wideband_limit_bps(snr_hz: npt.ArrayLike) -> FloatArray:
    """Rate of fixed power that no band exceeds, `S / ln 2`: (...,) bit/s for (...,) hertz >= 0, else ConfigError."""
    return np.asarray(not_negative("snr_hz", snr_hz) / math.log(2))
