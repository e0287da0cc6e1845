"""A radio link in user space: when a message that is already here would have come over the air."""

from __future__ import annotations

import time

from wdmoe.config import LinkEmulation

REPLY_HEADER_BYTES = 128  # what travels beside the tensor of a Result, rounded up


class Lane:
    """One direction of a link: messages cross it one after the other at a fixed rate. Rate 0: no limit."""

    def __init__(self, rate_bps: float) -> None:
        self._rate_bps = rate_bps
        self._free_s = 0.0

    def cross(self, now_s: float, size_bytes: int) -> float:
        """Send a message into the lane at `now_s` (monotonic); returns when its last bit comes out."""
        if not self._rate_bps:
            return now_s
        self._free_s = max(now_s, self._free_s) + 8 * size_bytes / self._rate_bps
        return self._free_s


class EmulatedLink:
    """Both directions. With no limits set, nothing ever waits."""

    def __init__(self, link: LinkEmulation) -> None:
        self.down = Lane(link.downlink_bps)
        self.up = Lane(link.uplink_bps)


def sleep_until(due_s: float) -> None:
    """Sleep to a monotonic instant: polling a socket is only good to a millisecond, this to some 60 us."""
    remaining_s = due_s - time.monotonic()
    if remaining_s > 0:
        time.sleep(remaining_s)
