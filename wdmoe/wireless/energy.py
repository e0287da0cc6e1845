"""What a token costs in joules, from how long the radio and the device work for it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.wireless.checks import broadcast, not_negative, within


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerUse:
    """Electrical behaviour of base station and devices. Watts are scalars or (device,), all >= 0.

    Raises:
        ConfigError: a value is negative or not finite, or an efficiency is outside 0 to 1.
    """

    station_transmit_w: npt.ArrayLike  # radiated while sending to a device
    device_transmit_w: npt.ArrayLike  # radiated while sending to the base station
    device_receive_w: npt.ArrayLike = 0.0  # drawn by the device's radio while receiving
    device_compute_w: npt.ArrayLike = 0.0  # drawn by the device while computing, above idle
    amplifier_efficiency: npt.ArrayLike = 1.0  # radiated over drawn power; 1 counts radiated power alone

    def __post_init__(self) -> None:
        for name in ("station_transmit_w", "device_transmit_w", "device_receive_w", "device_compute_w"):
            not_negative(name, getattr(self, name))
        within("amplifier_efficiency", self.amplifier_efficiency, 1e-6, 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenEnergy:
    """Joules by who spends them, arrays of one shape."""

    station_radio_j: FloatArray
    device_radio_j: FloatArray
    device_compute_j: FloatArray

    @property
    def device_j(self) -> FloatArray:
        """What the device's battery gives."""
        return self.device_radio_j + self.device_compute_j

    @property
    def total_j(self) -> FloatArray:
        """All of it."""
        return self.station_radio_j + self.device_j


def token_energy(
    use: PowerUse, downlink_s: npt.ArrayLike, uplink_s: npt.ArrayLike, compute_s: npt.ArrayLike
) -> TokenEnergy:
    """Energy of work that takes these times: power by time, for each radio and for the device's arithmetic.

    Args:
        use: powers, scalars or (device,).
        downlink_s, uplink_s, compute_s: (..., device) seconds, >= 0.
    Returns:
        (..., device) joules.
    Raises:
        ConfigError: a time is negative or not finite, or shapes do not fit.
    Source: Mao et al., A Survey on Mobile Edge Computing, IEEE Commun. Surveys Tuts. 19(4), 2017, section II.
    """
    down, up = not_negative("downlink_s", downlink_s), not_negative("uplink_s", uplink_s)
    busy = not_negative("compute_s", compute_s)
    powers = {each.name: np.asarray(getattr(use, each.name), np.float64) for each in fields(use)}
    shape = broadcast(downlink_s=down, uplink_s=up, compute_s=busy, **powers)
    amplifier = powers["amplifier_efficiency"]
    radio = powers["device_transmit_w"] / amplifier * up + powers["device_receive_w"] * down
    return TokenEnergy(
        station_radio_j=np.broadcast_to(powers["station_transmit_w"] / amplifier * down, shape),
        device_radio_j=np.broadcast_to(radio, shape),
        device_compute_j=np.broadcast_to(powers["device_compute_w"] * busy, shape),
    )
