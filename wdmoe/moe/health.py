"""What the data plane has seen of each connection: its pace, and whether it may be asked again.

A device that missed a deadline is left out for a while (a circuit breaker), or one lost device would cost every
layer of every token a deadline. The pause doubles with each miss and ends at the first good answer. Entries belong
to a connection, not to a device: one that reconnects starts afresh.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.transport.messages import Int32Array
from wdmoe.transport.routing import DeviceRoute

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
SMOOTHING = 0.1  # weight of the newest latency in the running mean


@dataclass(slots=True)
class _Record:
    token_s: float = 0.0  # running mean of the time from sending to the answer, per token
    other_s: float = 0.0  # the same without what the device says of its (emulated) link
    pause_s: float = 0.0
    paused_until_s: float = 0.0


class DeviceHealth:
    """Pace and circuit breaker of every connection. Used by the model thread only."""

    def __init__(self) -> None:
        self._records: dict[bytes, _Record] = {}
        self._paused: set[bytes] = set()

    @property
    def all_well(self) -> bool:
        """No connection is paused: the cheap answer for the hot path."""
        return not self._paused

    def answered(self, route: bytes, seconds: float, tokens: int, link_s: float = 0.0) -> None:
        """A good reply came after so many seconds, of which its device says that it waited `link_s` for the link."""
        token_s, other_s = seconds / tokens, max(seconds - link_s, 0.0) / tokens
        record = self._records.get(route)
        if record is None:
            record = self._records[route] = _Record(token_s=token_s, other_s=other_s)
        record.token_s += SMOOTHING * (token_s - record.token_s)
        record.other_s += SMOOTHING * (other_s - record.other_s)
        if record.pause_s:
            record.pause_s = 0.0
            self._paused.discard(route)

    def failed(self, route: bytes) -> None:
        """No reply in time, or one that cannot be used."""
        record = self._records.setdefault(route, _Record())
        record.pause_s = min(record.pause_s * 2 or FIRST_PAUSE_S, LONGEST_PAUSE_S)
        record.paused_until_s = time.monotonic() + record.pause_s
        self._paused.add(route)

    def usable(self, device: DeviceRoute) -> bool:
        """May be asked: not paused, or its pause is over and the next order is its trial."""
        return device.route not in self._paused or self._records[device.route].paused_until_s <= time.monotonic()

    def available(self, devices: tuple[DeviceRoute, ...], device_of: Int32Array) -> np.ndarray:
        """(experts,) bool: served by a device that may be asked."""
        usable = np.array([self.usable(device) for device in devices] + [False])  # index -1: not served
        return usable[device_of]

    def pace_s(self, devices: tuple[DeviceRoute, ...]) -> npt.NDArray[np.float64] | None:
        """(devices,) expected seconds per token, > 0. One not measured counts as the mean one; None: none was."""
        return _filled([r.token_s if (r := self._records.get(device.route)) else 0.0 for device in devices])

    def other_s(self, devices: tuple[DeviceRoute, ...]) -> npt.NDArray[np.float64] | None:
        """As `pace_s`, without the time on the link: what a token costs there whatever its band."""
        return _filled([r.other_s if (r := self._records.get(device.route)) else 0.0 for device in devices])

    def token_s(self, route: bytes) -> float | None:
        """Running mean of seconds per token of one connection; None while nothing was measured. Any thread."""
        record = self._records.get(route)
        return record.token_s if record is not None and record.token_s else None

    def forget_all_but(self, devices: tuple[DeviceRoute, ...]) -> None:
        """Drop connections that are gone."""
        live = {device.route for device in devices}
        self._records = {route: r for route, r in self._records.items() if route in live}
        self._paused &= live


def _filled(seen: list[float]) -> npt.NDArray[np.float64] | None:
    """The mean of what is known in place of zeros; None where nothing is."""
    known = [s for s in seen if s > 0]
    if not known:
        return None
    mean_s = sum(known) / len(known)
    return np.array([s or mean_s for s in seen])
