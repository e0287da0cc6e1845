"""A radio link in user space: when a message that is already here would have come over the air."""

from __future__ import annotations

import math
import time

from wdmoe.config import LinkEmulation

REPLY_HEADER_BYTES = 128  # what travels beside the tensor of a Result, rounded up


class Lane:
    """One direction of a link: messages cross it one after the other, each at the rate that it is given then."""

    def __init__(self, fixed_bps: float, snr_hz: float = 0.0) -> None:
        """`fixed_bps` is its rate while the base station shares no band, or `snr_hz` is 0. A rate of 0: no limit."""
        self._fixed_bps = fixed_bps
        self._snr_hz = snr_hz
        self._free_s = 0.0

    def cross(self, now_s: float, size_bytes: int, band_hz: float = 0.0) -> float:
        """Send a message into the lane at `now_s` (monotonic); returns when its last bit comes out."""
        rate_bps = shannon_bps(band_hz, self._snr_hz) if band_hz and self._snr_hz else self._fixed_bps
        if not rate_bps:
            return now_s
        self._free_s = max(now_s, self._free_s) + 8 * size_bytes / rate_bps
        return self._free_s


class EmulatedLink:
    """Both directions. With no limits set, nothing ever waits."""

    def __init__(self, link: LinkEmulation) -> None:
        self.down = Lane(link.downlink_bps, link.downlink_snr_hz)
        self.up = Lane(link.uplink_bps, link.uplink_snr_hz)


def shannon_bps(band_hz: float, snr_hz: float) -> float:
    """Bit rate of a link of fixed power: `wdmoe.wireless.rates.fixed_power_bps` for plain numbers, in no time.

    Args:
        band_hz, snr_hz: hertz, > 0; the latter is received power over noise density.
    """
    return band_hz * math.log1p(snr_hz / band_hz) / math.log(2)


def sleep_until(due_s: float) -> None:
    """Sleep to a monotonic instant: polling a socket is only good to a millisecond, this to some 60 us."""
    remaining_s = due_s - time.monotonic()
    if remaining_s > 0:
        time.sleep(remaining_s)
