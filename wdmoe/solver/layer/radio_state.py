"""The radio and the devices as one layer of a model meets them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wdmoe.arrays import FloatArray
from wdmoe.solver.bandwidth import Links, seconds_per_token
from wdmoe.solver.layer.quantization import vector_bits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RadioState:
    """The radio and the devices as one layer meets them; arrays are (devices,) float64.

    With `downlink_efficiency` and `uplink_efficiency` (bit/s/Hz over the whole band) the rate is proportional to the
    band, as in `Links`; the SNRs are not used then.
    """

    downlink_snr_hz: FloatArray  # received power over noise density, Hz
    uplink_snr_hz: FloatArray
    total_hz: float  # shared by all devices
    hidden: int  # values of an activation
    token_s: FloatArray  # an expert's compute for one token, seconds
    expert_s: FloatArray  # an expert takes no less, however few its tokens: it reads its weights
    downlink_efficiency: FloatArray | None = None
    uplink_efficiency: FloatArray | None = None

    @property
    def devices(self) -> int:
        """How many there are."""
        return len(self.token_s)

    @property
    def downlink_snr(self) -> FloatArray:
        """(devices,) plain ratio down, with the station's power over the whole band.

        With efficiencies, what a Gaussian code would need for the same.
        """
        if self.downlink_efficiency is not None:
            return np.asarray(np.exp2(self.downlink_efficiency) - 1)
        return self.downlink_snr_hz / self.total_hz

    def links(self, vector: FloatArray, downlink: bool = True, compute_s: FloatArray | float = 0.0) -> Links:
        """What one activation costs each device, for `vector` (devices,) bits of all its values."""
        down = vector if downlink else np.zeros(self.devices)
        rates: dict[str, FloatArray | None] = (
            {"downlink_snr_hz": self.downlink_snr_hz, "uplink_snr_hz": self.uplink_snr_hz}
            if self.downlink_efficiency is None
            else {"downlink_efficiency": self.downlink_efficiency, "uplink_efficiency": self.uplink_efficiency}
        )
        return Links(downlink_bits=down, uplink_bits=vector, compute_s=compute_s, **rates)

    def assignment_s(self, bits: FloatArray) -> FloatArray:
        """(devices,) seconds of one assignment where all devices have the same band: what a device is known by."""
        each = np.full(self.devices, self.total_hz / self.devices)
        return air_s(self.links(vector_bits(self.hidden, bits)), each) + self.token_s


def air_s(links: Links, band_hz: FloatArray) -> FloatArray:
    """(devices,) seconds of one activation down and up; infinite where nothing gets through."""
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = seconds_per_token(links.table, links.flat, band_hz)
    return np.where(np.isnan(seconds), np.inf, seconds)
