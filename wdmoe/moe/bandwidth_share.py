"""What the devices' links cost a token, and the band that they share: hertz for what was chosen.

One band for one layer at a time, given out anew for each. Counted are activations: names and indices that travel with
them are some 150 bytes a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from wdmoe.arrays import FloatArray
from wdmoe.solver.bandwidth import Links, allocate_bandwidth, with_compute
from wdmoe.solver.layer.radio_state import air_s
from wdmoe.transport.routing import DeviceRoute


class SharedBand:
    """The links of the devices of one routing table. Without a band to share, all they cost is measured."""

    def __init__(self, devices: tuple[DeviceRoute, ...], vector_bits: float, total_hz: float, equal: bool) -> None:
        """Made once for a routing table.

        Args:
            devices: at least one; where there is a band, with their SNRs.
            vector_bits: of one token's activation.
            total_hz: the band that they share; 0: each has a link of its own.
            equal: each gets as much of it as the other, whatever it needs.
        """
        self.devices = devices
        self.total_hz = total_hz
        self.equal = equal
        self._equal = np.full(len(devices), total_hz / len(devices)) if equal else None
        bits = vector_bits if total_hz else 0.0
        self._links = Links(
            downlink_snr_hz=[device.downlink_snr_hz if total_hz else 0.0 for device in devices],
            uplink_snr_hz=[device.uplink_snr_hz if total_hz else 0.0 for device in devices],
            downlink_bits=bits,
            uplink_bits=bits,
        )
        self.each_s: FloatArray = np.zeros(len(devices))  # (devices,) seconds of a token where all have the same band
        if total_hz:
            self.each_s = air_s(self._links, np.full(len(devices), total_hz / len(devices)))

    def links(self, other_s: FloatArray) -> Links:
        """For the solver; other_s: (devices,) seconds per token beside the shared band."""
        return with_compute(self._links, other_s)

    def share(self, tokens: Sequence[int], other_s: FloatArray) -> FloatArray:
        """(devices,) hertz of each. What all have together is at most the band.

        Args:
            tokens: how many each gets.
            other_s: as `links`.
        """
        if self._equal is not None:
            return self._equal
        return allocate_bandwidth(np.array(tokens, np.float64), self.links(other_s), self.total_hz).bandwidth_hz

    def token_s(self, hertz: FloatArray) -> FloatArray:
        """(devices,) seconds that a token's activation is on the air with so many; infinite where with none."""
        return air_s(self._links, hertz)


class BandShare:
    """A shared band, with what each device takes beside it known."""

    def __init__(self, air: SharedBand, other_s: Callable[[Sequence[int]], FloatArray]) -> None:
        """other_s: from tokens of each device to (devices,) seconds per token beside the air."""
        self._air, self._other_s = air, other_s
        self.total_hz = air.total_hz

    def hertz(self, counts: list[int]) -> FloatArray:
        """(devices,) for so many tokens of each."""
        return self._air.share(counts, self._other_s(counts))

    def token_s(self, hertz: FloatArray) -> FloatArray:
        """As `SharedBand.token_s`."""
        return self._air.token_s(hertz)
