"""Bit rates of real radios: a ladder of modulation and coding schemes (MCS), each usable from some SNR on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray, Int64Array
from wdmoe.errors import ConfigError
from wdmoe.wireless.checks import broadcast, not_negative, positive
from wdmoe.wireless.outage import rician_outage


class Mcs(NamedTuple):
    """One rung."""

    number: int  # the standard's MCS index
    efficiency_bps_hz: float
    threshold_db: float  # SNR from which on it works


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlindChoice:
    """What a transmitter that knows only the mean SNR should send, arrays of one shape."""

    number: Int64Array  # of the scheme
    efficiency_bps_hz: FloatArray  # of what arrives: the scheme's, less outage
    outage: FloatArray  # 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class McsTable:
    """A ladder whose higher rungs are faster and need more SNR, and the share of time and band that carries no data.

    Raises:
        ConfigError: no rungs, not rising, or an overhead outside 0 to 1.
    """

    name: str
    rungs: tuple[Mcs, ...]
    overhead: float = 0.0  # control, pilots, guard bands, where the efficiencies do not count them already

    def __post_init__(self) -> None:
        if not self.rungs:
            raise ConfigError("rungs must not be empty")
        for low, high in zip(self.rungs, self.rungs[1:], strict=False):
            if high.efficiency_bps_hz <= low.efficiency_bps_hz or high.threshold_db <= low.threshold_db:
                raise ConfigError(f"rungs must rise in efficiency and threshold, but {high} comes after {low}")
        if not 0 <= self.overhead < 1:
            raise ConfigError(f"overhead must be at least 0 and below 1, got {self.overhead}")

    def thresholds(self) -> FloatArray:
        """(rung,) SNR from which on each works, plain ratio."""
        return np.asarray(10 ** (np.array([rung.threshold_db for rung in self.rungs]) / 10))

    def efficiencies_bps_hz(self) -> FloatArray:
        """(rung,) bits per second and hertz, overhead taken off."""
        return np.array([rung.efficiency_bps_hz for rung in self.rungs]) * (1 - self.overhead)

    def number(self, snr: npt.ArrayLike) -> Int64Array:
        """Number of the fastest scheme that works, -1 in outage: (...,) for (...,) plain ratios >= 0."""
        numbers = np.array([-1, *(rung.number for rung in self.rungs)])
        return np.asarray(numbers[self._steps(snr)])

    def efficiency_bps_hz(self, snr: npt.ArrayLike) -> FloatArray:
        """Of the fastest scheme that works, for a transmitter that knows the SNR.

        Args:
            snr: (...,) plain ratio, >= 0.
        Returns:
            (...,) bits per second and hertz; 0 in outage, where nothing arrives.
        Raises:
            ConfigError: the SNR is negative or not finite.
        """
        return np.asarray(np.concatenate([[0.0], self.efficiencies_bps_hz()])[self._steps(snr)])

    def blind_choice(self, mean_snr: npt.ArrayLike, k_factor: npt.ArrayLike = 0.0) -> BlindChoice:
        """The scheme that brings most when each block fades anew and only the mean SNR is known.

        Args:
            mean_snr: (...,) plain ratio, > 0.
            k_factor: (...,) Rician K, plain ratio, 0 to 1e4; 0 is Rayleigh.
        Returns:
            Arrays of shape (...,).
        Raises:
            ConfigError: a value is not as above, or shapes do not fit.
        """
        broadcast(mean_snr=mean_snr, k_factor=k_factor)
        mean, k = positive("mean_snr", mean_snr)[..., None], not_negative("k_factor", k_factor)[..., None]
        outage = rician_outage(self.thresholds(), mean, k)
        arriving = self.efficiencies_bps_hz() * (1 - outage)
        best = arriving.argmax(-1)
        return BlindChoice(
            number=np.array([rung.number for rung in self.rungs])[best],
            efficiency_bps_hz=arriving.max(-1),
            outage=np.take_along_axis(outage, best[..., None], -1)[..., 0],
        )

    def _steps(self, snr: npt.ArrayLike) -> Int64Array:
        """How many rungs work."""
        return np.asarray(np.searchsorted(self.thresholds(), not_negative("snr", snr), side="right"))


def nr_table(gap_db: float = 3.0, overhead: float = 0.0) -> McsTable:
    """5G NR up to 64-QAM. Its MCS 17 is slower than 16, so it has no rung.

    The standard has modulations and code rates, but no SNRs. What they need is taken as Shannon's plus a gap [D],
    `gap (2^efficiency - 1)`; the 3 dB are our choice.

    Args:
        gap_db: >= 0.
        overhead: share of resource elements without data: 0.14 down, 0.08 up in FR1 (TS 38.306, section 4.1.2).
    Raises:
        ConfigError: a value is not as above.
    Source: 3GPP TS 38.214 V17.4.0, table 5.1.3.1-1.
    """
    gap = float(not_negative("gap_db", gap_db))
    rungs = [
        Mcs(index, bits * rate / 1024, gap + 10 * math.log10(2 ** (bits * rate / 1024) - 1))
        for index, (bits, rate) in enumerate(_NR_BITS_AND_RATES)
        if index != 17
    ]
    return McsTable(name="nr-64qam", rungs=tuple(rungs), overhead=overhead)


def wifi_table(noise_figure_db: float = 10.0, margin_db: float = 5.0, overhead: float = 0.0) -> McsTable:
    """Wi-Fi 6 (802.11ax HE), one spatial stream, 20 MHz, guard interval 0.8 us.

    The standard has the received power at which one frame in ten may be lost. It becomes an SNR by taking off noise
    of 20 MHz at -174 dBm/Hz and what 802.11 grants to receivers: a noise figure of 10 dB and 5 dB of margin [U].

    Args:
        noise_figure_db, margin_db: >= 0; smaller ones give stricter thresholds.
        overhead: share of air time without data: contention, preambles, acknowledgements.
    Raises:
        ConfigError: a value is not as above.
    Source: IEEE Std 802.11ax-2021, table 27-51 (sensitivity [S]) and section 27.5 (modulations).
    """
    allowed = float(not_negative("noise_figure_db", noise_figure_db)) + float(not_negative("margin_db", margin_db))
    noise_dbm = -174 + 10 * math.log10(_WIFI_BAND_HZ) + allowed
    symbol_rate = _WIFI_TONES / _WIFI_SYMBOL_S / _WIFI_BAND_HZ
    rungs = [
        Mcs(index, bits * rate * symbol_rate, float(level) - noise_dbm)
        for index, (bits, rate, level) in enumerate(_WIFI_BITS_RATES_LEVELS)
    ]
    return McsTable(name="wifi-he", rungs=tuple(rungs), overhead=overhead)


_NR_BITS_AND_RATES: Sequence[tuple[int, int]] = (
    *((2, rate) for rate in (120, 157, 193, 251, 308, 379, 449, 526, 602, 679)),
    *((4, rate) for rate in (340, 378, 434, 490, 553, 616, 658)),
    *((6, rate) for rate in (438, 466, 517, 567, 616, 666, 719, 772, 822, 873, 910, 948)),
)
_WIFI_BAND_HZ = 20e6
_WIFI_TONES = 234  # data tones of 242
_WIFI_SYMBOL_S = 13.6e-6
_WIFI_BITS_RATES_LEVELS: Sequence[tuple[int, float, int]] = (  # bits per tone, code rate, dBm
    (1, 1 / 2, -82),
    (2, 1 / 2, -79),
    (2, 3 / 4, -77),
    (4, 1 / 2, -74),
    (4, 3 / 4, -70),
    (6, 2 / 3, -66),
    (6, 3 / 4, -65),
    (6, 5 / 6, -64),
    (8, 3 / 4, -59),
    (8, 5 / 6, -57),
    (10, 3 / 4, -54),
    (10, 5 / 6, -52),
)
