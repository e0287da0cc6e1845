"""In-process twins of the four channel ends, for tests: same codec and exceptions; loss and delay to order.

station = MemoryDataStation(faults=Faults(loss=0.1), rng=np.random.default_rng(1))
link = station.connect(key="device one")
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wdmoe.errors import PeerBusyError, PeerGoneError, ProtocolError, TransportError, VersionError
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.framing import pack, unpack
from wdmoe.transport.codec.messages import Failure, Message
from wdmoe.transport.codec.wire import DEFAULT_LIMITS, Limits
from wdmoe.transport.refusals import Refusals

_LOG = logging.getLogger(__name__)
_LINK_QUEUE = 32  # messages; as the two queues of a real link
_STATION_QUEUE = 1024  # many links share it here, while real ones have a queue each


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What the air does to each message, independently, in both directions."""

    loss: float = 0.0  # probability
    duplicate: float = 0.0  # probability of a second copy
    delay_s: float = 0.0
    jitter_s: float = 0.0  # uniform, added to the delay: messages overtake each other


@dataclass(frozen=True, slots=True)
class _Parcel:
    route: bytes
    key: str
    frame: bytes


class _Air:
    """Decides when, and how often, a message arrives."""

    def __init__(self, faults: Faults, rng: np.random.Generator | None) -> None:
        self.faults = faults
        self._rng = rng if rng is not None else np.random.default_rng(0)
        self._lock = threading.Lock()

    def delays_s(self) -> list[float]:
        """Delay of every copy that arrives; empty where the message is lost."""
        faults = self.faults
        with self._lock:
            lost, doubled = self._rng.random(2) < (faults.loss, faults.duplicate)
            copies = 0 if lost else 1 + int(doubled)
            return [faults.delay_s + faults.jitter_s * float(self._rng.random()) for _ in range(copies)]


def _open(parcel: _Parcel, limits: Limits, refusals: Refusals) -> Envelope | VersionError | None:
    try:
        message = unpack(memoryview(parcel.frame), limits)
    except VersionError as error:
        refusals.note("wrong_version", parcel.key or "a peer", str(error))
        return error
    except ProtocolError as error:
        refusals.note("invalid_message", parcel.key or "a peer", str(error))
        return None
    return Envelope(parcel.route, parcel.key, message, len(parcel.frame))


class _ThreadInbox:
    """Arrived and arriving parcels of one blocking end."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._condition = threading.Condition()
        self._heap: list[tuple[float, int, _Parcel]] = []
        self._order = itertools.count()
        self._woken = False
        self.closed = False

    def put(self, parcel: _Parcel, delays_s: Sequence[float]) -> None:
        with self._condition:
            if self.closed:
                raise PeerGoneError("the peer has closed its end")
            if len(self._heap) >= self._most:
                raise PeerBusyError(f"the peer has {len(self._heap)} unread messages")
            for delay_s in delays_s:
                heapq.heappush(self._heap, (time.monotonic() + delay_s, next(self._order), parcel))
            self._condition.notify()

    def get(self, timeout_s: float) -> _Parcel | None:
        until = time.monotonic() + timeout_s
        with self._condition:
            while True:
                now = time.monotonic()
                if self._heap and self._heap[0][0] <= now:
                    return heapq.heappop(self._heap)[2]
                if self._woken or self.closed or now >= until:
                    self._woken = False
                    return None
                self._condition.wait(min([until, *(due for due, _, _ in self._heap[:1])]) - now)

    def wake(self) -> None:
        with self._condition:
            self._woken = True
            self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self.closed = True
            self._heap.clear()
            self._condition.notify()


class _Station:
    """What the stations of both planes have in common."""

    def __init__(self, *, faults: Faults, rng: np.random.Generator | None, limits: Limits) -> None:
        self.limits = limits
        self._air = _Air(faults, rng)
        self._numbers = itertools.count(1)
        self._refusals = Refusals(_LOG)

    @property
    def faults(self) -> Faults:
        """What the air does. Set it to change the weather of all links."""
        return self._air.faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._air.faults = faults

    @property
    def counters(self) -> Mapping[str, int]:
        """Refused messages by kind."""
        return self._refusals.counters


class MemoryDataStation(_Station):
    """See `DataStation`."""

    def __init__(
        self,
        *,
        faults: Faults = Faults(),
        rng: np.random.Generator | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(faults=faults, rng=rng, limits=limits)
        self._inbox = _ThreadInbox(_STATION_QUEUE)
        self._links: dict[bytes, MemoryDataLink] = {}
        self._ended = 0

    @property
    def ended(self) -> int:
        """See `DataStation.ended`."""
        return self._ended

    def connect(self, key: str = "") -> MemoryDataLink:
        """A new device end. `key` is what the station sees as the proven key."""
        route = next(self._numbers).to_bytes(5, "big")
        link = self._links[route] = MemoryDataLink(self, self._air, self._inbox, route, key)
        return link

    def send(self, route: bytes, message: Message) -> int:
        """See `DataStation.send`."""
        frame = pack(message, self.limits)
        link = self._links.get(route)
        if link is None:
            raise PeerGoneError(f"no connection {route.hex()}")
        link.inbox.put(_Parcel(b"", "", frame), self._air.delays_s())
        return len(frame)

    def receive(self, timeout_s: float) -> Envelope | None:
        """See `DataStation.receive`."""
        until = time.monotonic() + timeout_s
        while (parcel := self._inbox.get(max(0.0, until - time.monotonic()))) is not None:
            envelope = _open(parcel, self.limits, self._refusals)
            if isinstance(envelope, Envelope):
                return envelope
            if isinstance(envelope, VersionError):
                with contextlib.suppress(TransportError):
                    self.send(parcel.route, Failure(attempt=0, reason=str(envelope)))
        return None

    def wake(self) -> None:
        """See `DataStation.wake`."""
        self._inbox.wake()

    def close(self) -> None:
        """See `DataStation.close`."""
        self._inbox.close()

    def forget(self, route: bytes) -> None:
        """Drop a connection, as a heartbeat that stays away would."""
        if self._links.pop(route, None) is not None:
            self._ended += 1
            self._inbox.wake()


class MemoryDataLink:
    """See `DataLink`. Made by `MemoryDataStation.connect`."""

    def __init__(self, station: MemoryDataStation, air: _Air, outbox: _ThreadInbox, route: bytes, key: str) -> None:
        self.inbox = _ThreadInbox(_LINK_QUEUE)
        self.route = route
        self._station = station
        self._air = air
        self._outbox = outbox
        self._key = key
        self._refusals = Refusals(_LOG)

    @property
    def counters(self) -> Mapping[str, int]:
        """Refused messages by kind."""
        return self._refusals.counters

    def send(self, message: Message) -> int:
        """See `DataLink.send`. A closed station looks like a busy one, as a socket that reconnects does."""
        return self.send_frame(pack(message, self._station.limits))

    def send_frame(self, frame: bytes) -> int:
        """Send what no correct device would: for tests of the other end."""
        parcel = _Parcel(self.route, self._key, frame)
        try:
            self._outbox.put(parcel, self._air.delays_s())
        except PeerGoneError as error:
            raise PeerBusyError("the station is not connected") from error
        return len(parcel.frame)

    def receive(self, timeout_s: float) -> Envelope | None:
        """See `DataLink.receive`."""
        until = time.monotonic() + timeout_s
        while (parcel := self.inbox.get(max(0.0, until - time.monotonic()))) is not None:
            envelope = _open(parcel, self._station.limits, self._refusals)
            if isinstance(envelope, Envelope):
                return envelope
        return None

    def wake(self) -> None:
        """See `DataLink.wake`."""
        self.inbox.wake()

    def close(self) -> None:
        """See `DataLink.close`."""
        self._station.forget(self.route)
        self.inbox.close()


class _LoopInbox:
    """Arrived parcels of one asyncio end."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._parcels: deque[_Parcel] = deque()
        self._arrived = asyncio.Event()
        self._travelling = 0
        self.closed = False

    def put(self, parcel: _Parcel, delays_s: Sequence[float]) -> None:
        if self.closed:
            raise PeerGoneError("the peer has closed its end")
        if len(self._parcels) + self._travelling >= self._most:
            raise PeerBusyError(f"the peer has {len(self._parcels)} unread messages")
        for delay_s in delays_s:
            if delay_s > 0:
                self._travelling += 1
                asyncio.get_running_loop().call_later(delay_s, self._land, parcel)
            else:
                self._append(parcel)

    def _land(self, parcel: _Parcel) -> None:
        self._travelling -= 1
        self._append(parcel)

    def _append(self, parcel: _Parcel) -> None:
        self._parcels.append(parcel)
        self._arrived.set()

    async def get(self) -> _Parcel:
        while not self._parcels:
            self._arrived.clear()
            await self._arrived.wait()
        return self._parcels.popleft()  # nothing is awaited after this: a cancelled `get` loses no parcel


class MemoryControlStation(_Station):
    """See `ControlStation`."""

    def __init__(
        self,
        *,
        faults: Faults = Faults(),
        rng: np.random.Generator | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(faults=faults, rng=rng, limits=limits)
        self._inbox = _LoopInbox(_STATION_QUEUE)
        self._links: dict[bytes, MemoryControlLink] = {}

    def connect(self, key: str = "") -> MemoryControlLink:
        """A new device end. `key` is what the station sees as the proven key."""
        route = next(self._numbers).to_bytes(5, "big")
        link = self._links[route] = MemoryControlLink(self, self._air, self._inbox, route, key)
        return link

    async def send(self, route: bytes, message: Message) -> None:
        """See `ControlStation.send`."""
        frame = pack(message, self.limits)
        link = self._links.get(route)
        if link is None:
            raise PeerGoneError(f"no connection {route.hex()}")
        link.inbox.put(_Parcel(b"", "", frame), self._air.delays_s())

    async def receive(self) -> Envelope:
        """See `ControlStation.receive`."""
        while True:
            parcel = await self._inbox.get()
            envelope = _open(parcel, self.limits, self._refusals)
            if isinstance(envelope, Envelope):
                return envelope
            if isinstance(envelope, VersionError):
                with contextlib.suppress(TransportError):
                    await self.send(parcel.route, Failure(attempt=0, reason=str(envelope)))

    def close(self) -> None:
        """See `ControlStation.close`."""
        self._inbox.closed = True

    def forget(self, route: bytes) -> None:
        """Drop a connection, as a heartbeat that stays away would."""
        self._links.pop(route, None)


class MemoryControlLink:
    """See `ControlLink`. Made by `MemoryControlStation.connect`."""

    def __init__(self, station: MemoryControlStation, air: _Air, outbox: _LoopInbox, route: bytes, key: str) -> None:
        self.inbox = _LoopInbox(_LINK_QUEUE)
        self.route = route
        self._station = station
        self._air = air
        self._outbox = outbox
        self._key = key
        self._refusals = Refusals(_LOG)

    @property
    def counters(self) -> Mapping[str, int]:
        """Refused messages by kind."""
        return self._refusals.counters

    async def send(self, message: Message) -> None:
        """See `ControlLink.send`."""
        await self.send_frame(pack(message, self._station.limits))

    async def send_frame(self, frame: bytes) -> None:
        """Send what no correct device would: for tests of the other end."""
        parcel = _Parcel(self.route, self._key, frame)
        try:
            self._outbox.put(parcel, self._air.delays_s())
        except PeerGoneError as error:
            raise PeerBusyError("the station is not connected") from error

    async def receive(self) -> Envelope:
        """See `ControlLink.receive`."""
        while True:
            envelope = _open(await self.inbox.get(), self._station.limits, self._refusals)
            if isinstance(envelope, Envelope):
                return envelope

    def close(self) -> None:
        """See `ControlLink.close`."""
        self._station.forget(self.route)
        self.inbox.closed = True
