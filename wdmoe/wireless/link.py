"""Radio, channel and rate law together: how many bits per second a device gets for its hertz, up and down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.wireless.channel import Channel
from wdmoe.wireless.checks import broadcast, decibels, not_negative, one_of, positive
from wdmoe.wireless.noise import snr_hz
from wdmoe.wireless.rates import SHANNON, RateLaw, fixed_density_bps, fixed_power_bps

DENSITY_174_W_HZ = 10 ** (-174 / 10) * 1e-3  # -174 dBm/Hz
SPENDINGS = {"power": True, "density": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Radio:
    """Both ends of all links. Defaults are the WDMoE paper's by recollection, unchecked [U].

    Powers, noise densities and antenna gains are scalars or (device,).

    Raises:
        ConfigError: a value is not as its name asks.
    """

    carrier_hz: float = 3.5e9
    bandwidth_hz: float = 100e6  # shared among the devices
    station_power_w: npt.ArrayLike = 10.0  # toward one device, or over the whole band: see `Link.spending`
    device_power_w: npt.ArrayLike = 0.2
    station_noise_w_hz: npt.ArrayLike = DENSITY_174_W_HZ  # at the base station's receiver, noise figure included
    device_noise_w_hz: npt.ArrayLike = DENSITY_174_W_HZ  # at the device's
    antenna_gain_db: npt.ArrayLike = 0.0  # of both ends together

    def __post_init__(self) -> None:
        for name in ("carrier_hz", "bandwidth_hz", "station_noise_w_hz", "device_noise_w_hz"):
            positive(name, getattr(self, name))
        for name in ("station_power_w", "device_power_w"):
            not_negative(name, getattr(self, name))
        decibels("antenna_gain_db", self.antenna_gain_db)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Link:
    """Rates of links as functions of the band B_k that each device gets. The last axis is the device.

    `spending` is "power" (a link has its sender's power whatever its band, the paper's way [U]) or "density" (power is
    spread over `total_hz` and a link has its band's part). In both, one B_k serves up and down, one after the other.

    Raises:
        ConfigError: a strength is negative or not finite, shapes do not fit, or the spending is unknown.
    """

    downlink_snr_hz: FloatArray  # (..., device) received power over noise density; what the solver calls so, too
    uplink_snr_hz: FloatArray  # (..., device)
    total_hz: float  # the band shared among the devices
    spending: str = "power"
    law: RateLaw = SHANNON

    def __post_init__(self) -> None:
        down = not_negative("downlink_snr_hz", self.downlink_snr_hz)
        up = not_negative("uplink_snr_hz", self.uplink_snr_hz)
        broadcast(downlink_snr_hz=down, uplink_snr_hz=up)
        positive("total_hz", self.total_hz)
        one_of("spending", self.spending, SPENDINGS)

    def downlink_bps(self, band_hz: npt.ArrayLike) -> FloatArray:
        """Bit rate from base station to device: (..., device) bit/s for (..., device) hertz >= 0, else ConfigError."""
        return self._rate(band_hz, self.downlink_snr_hz)

    def uplink_bps(self, band_hz: npt.ArrayLike) -> FloatArray:
        """Bit rate from device to base station: (..., device) bit/s for (..., device) hertz >= 0, else ConfigError."""
        return self._rate(band_hz, self.uplink_snr_hz)

    def downlink_efficiency(self, band_hz: npt.ArrayLike) -> FloatArray:
        """Spectral efficiency down: (..., device) bit/s/Hz for (..., device) hertz > 0, else ConfigError."""
        return np.asarray(self.downlink_bps(band_hz) / positive("band_hz", band_hz))

    def uplink_efficiency(self, band_hz: npt.ArrayLike) -> FloatArray:
        """Spectral efficiency up: (..., device) bit/s/Hz for (..., device) hertz > 0, else ConfigError."""
        return np.asarray(self.uplink_bps(band_hz) / positive("band_hz", band_hz))

    def token_s(
        self,
        band_hz: npt.ArrayLike,
        downlink_bits: npt.ArrayLike,
        uplink_bits: npt.ArrayLike,
        compute_s: npt.ArrayLike = 0.0,
    ) -> FloatArray:
        """Time of one token on each device: `L_down / R_down + L_up / R_up + t_compute`.

        Args:
            band_hz: (..., device) hertz, >= 0.
            downlink_bits, uplink_bits: (..., device) of a token, >= 0.
            compute_s: (..., device) seconds, >= 0.
        Returns:
            (..., device) seconds; infinite where bits wait for a link that carries nothing.
        Raises:
            ConfigError: a value is not as above, or shapes do not fit.
        Source: WDMoE, arXiv 2411.06681 [U: recollection, unchecked].
        """
        busy = not_negative("compute_s", compute_s)
        down = _wait_s("downlink_bits", downlink_bits, self.downlink_bps(band_hz))
        up = _wait_s("uplink_bits", uplink_bits, self.uplink_bps(band_hz))
        broadcast(downlink=down, uplink=up, compute_s=busy)
        return np.asarray(down + up + busy)

    def _rate(self, band_hz: npt.ArrayLike, strength_hz: FloatArray) -> FloatArray:
        if SPENDINGS[self.spending]:
            return fixed_power_bps(band_hz, strength_hz, self.law)
        return fixed_density_bps(band_hz, strength_hz, self.total_hz, self.law)


def links_of(radio: Radio, channel: Channel, *, spending: str = "power", law: RateLaw = SHANNON) -> Link:
    """The links that a radio has over a channel.

    Args:
        radio: scalars or (device,).
        channel: (..., device).
        spending, law: as in `Link`.
    Returns:
        (..., device).
    Raises:
        ConfigError: shapes do not fit, or the spending is unknown.
    """
    antennas = 10 ** (np.asarray(radio.antenna_gain_db, np.float64) / 10)
    broadcast(antenna_gain_db=antennas, channel=channel.downlink_gain, uplink=channel.uplink_gain)
    return Link(
        downlink_snr_hz=snr_hz(radio.station_power_w, channel.downlink_gain * antennas, radio.device_noise_w_hz),
        uplink_snr_hz=snr_hz(radio.device_power_w, channel.uplink_gain * antennas, radio.station_noise_w_hz),
        total_hz=radio.bandwidth_hz,
        spending=spending,
        law=law,
    )


def _wait_s(name: str, bits: npt.ArrayLike, rate_bps: FloatArray) -> FloatArray:
    load = not_negative(name, bits)
    shape = broadcast(bits=load, rate=rate_bps)
    stuck = np.where(np.broadcast_to(load, shape) > 0, np.inf, 0.0)
    return np.divide(load, rate_bps, out=stuck, where=np.broadcast_to(rate_bps > 0, shape))
