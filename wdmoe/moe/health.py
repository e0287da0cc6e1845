"""What the data plane has seen of each connection: its pace, and whether it may be asked again.

A device that missed a deadline is left out for a while (a circuit breaker), or one lost device would cost every
layer of every token a deadline. The pause doubles with each miss and ends at the first good answer. Entries belong
to a connection, not to a device: one that reconnects starts afresh.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Int32Array
from wdmoe.transport.routing import DeviceRoute

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
SMOOTHING = 0.1  # weight of the newest latency in the running mean


@dataclass(slots=True)
class _Pace:
    """Running means of the time from sending to the answer, per token."""

    token_s: float
    other_s: float  # without what the device says of its (emulated) link

    def learn(self, token_s: float, other_s: float) -> None:
        self.token_s += SMOOTHING * (token_s - self.token_s)
        self.other_s += SMOOTHING * (other_s - self.other_s)


@dataclass(slots=True)
class _Record:
    pace: _Pace | None = None  # over all orders
    # Apart for orders of 1, 2 to 3, 4 to 7, ... tokens: a message costs the same with one token in it or with many, so
    # what a token takes in an answer says little about what it takes in a prompt.
    by_size: dict[int, _Pace] = field(default_factory=dict)
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
            record = self._records[route] = _Record()
        if record.pace is None:
            record.pace = _Pace(token_s, other_s)
        record.pace.learn(token_s, other_s)
        record.by_size.setdefault(tokens.bit_length(), _Pace(token_s, other_s)).learn(token_s, other_s)
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

    def is_paused(self, route: bytes) -> bool:
        """It missed a deadline, or what it answered could not be used, and nothing good came since. Any thread."""
        return route in self._paused

    def around(
        self,
        devices: tuple[DeviceRoute, ...],
        device_of: Int32Array,
        standby_of: Int32Array,
        slow: Callable[[DeviceRoute], bool] = lambda device: False,
    ) -> Int32Array:
        """(experts,) who serves each: its standby where its device may not be asked now, or is slow, and that is not.

        A slow one that has no copy elsewhere is still asked, and so is one whose copy may not be asked.
        """
        rank = [slow(device) if self.usable(device) else 2 for device in devices]
        ranks = np.array([*rank, 3])  # index -1: not served
        return np.where(ranks[standby_of] < ranks[device_of], standby_of, device_of)

    def available(self, devices: tuple[DeviceRoute, ...], device_of: Int32Array) -> np.ndarray:
        """(experts,) bool: served by a device that may be asked."""
        usable = np.array([self.usable(device) for device in devices] + [False])  # index -1: not served
        return usable[device_of]

    def token_s(self, devices: tuple[DeviceRoute, ...], tokens: Sequence[int]) -> npt.NDArray[np.float64] | None:
        """(devices,) expected seconds per token, > 0. One not measured counts as the mean one; None: none was.

        Args:
            tokens: of the order that each would get; the nearest size that was measured counts.
        """
        paces = map(self._nearest, devices, tokens)
        return _filled([pace.token_s if pace else 0.0 for pace in paces])

    def other_s(self, devices: tuple[DeviceRoute, ...], tokens: Sequence[int]) -> npt.NDArray[np.float64] | None:
        """As `token_s`, without the time on the link: what a token costs there whatever its band."""
        paces = map(self._nearest, devices, tokens)
        return _filled([pace.other_s if pace else 0.0 for pace in paces])

    def _nearest(self, device: DeviceRoute, tokens: int) -> _Pace | None:
        record, size = self._records.get(device.route), tokens.bit_length()
        if record is None or not record.by_size:
            return None
        return record.by_size.get(size) or record.by_size[min(record.by_size, key=lambda known: abs(known - size))]

    def seen_s(self, route: bytes) -> float | None:
        """Running mean of seconds per token of one connection; None while nothing was measured. Any thread."""
        record = self._records.get(route)
        return record.pace.token_s if record is not None and record.pace is not None else None

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
