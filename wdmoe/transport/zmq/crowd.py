"""Which connections of a socket go too far, decided without I/O: too many, too much unread, too many messages.

ZeroMQ offers no such bounds. Its own bound of a queue (RCVHWM) is no help: a peer that vanishes while its queue is full
can abort the process (Z22 in docs/wire.md). So queues are unbounded there, and whoever fills one is cut here.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

MESSAGE_BYTES = 64  # what libzmq keeps for each message that waits, beside its content
COMMANDS_BYTES_PER_S = 4096.0  # heartbeats and handshakes arrive, too, and no owner reads them
_PER_DESCRIPTORS = 8  # a connection has two of them; three sockets share a process with files and with HTTP
_LEAST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one socket bears."""

    connections: int  # in all
    per_address: int
    unread_bytes: int  # of one connection that has been heard
    first_bytes: int  # of one that has not
    messages_per_s: float  # of one connection, for long
    burst: float  # messages of one connection, at once
    handshake_s: float  # a connection that lasts longer has a key that is admitted

    def within(self, descriptors: int) -> Bounds:
        """These bounds in a process that may open so many descriptors."""
        most = max(_LEAST, min(self.connections, descriptors // _PER_DESCRIPTORS))
        return Bounds(
            connections=most,
            per_address=max(_LEAST // 2, min(self.per_address, most // 2)),
            unread_bytes=self.unread_bytes,
            first_bytes=self.first_bytes,
            messages_per_s=self.messages_per_s,
            burst=self.burst,
            handshake_s=self.handshake_s,
        )


@dataclass(slots=True, eq=False)
class Connection:
    """One accepted connection. Its owner thread adds to `taken`, the gate's thread to the rest."""

    origin: str  # what bounds per address count
    since_s: float
    route: bytes = b""
    taken: int = 0  # bytes as they travelled, of messages that its owner has read
    messages: int = 0
    received: int = 0  # bytes that the kernel has acknowledged
    unread: float = 0.0  # bytes
    held: float = 0.0  # bytes of memory for them
    allowance: float = 0.0  # messages that it may still send at once
    cut: bool = False  # it is on its way out
    _taken: int = field(default=0, repr=False)  # at the last look
    _messages: int = field(default=0, repr=False)
    _mean: float = field(default=float(MESSAGE_BYTES), repr=False)  # bytes of a message, lately

    @property
    def waiting(self) -> float:
        """Messages that are unread, about: as many as there would be of the size that it sent lately."""
        return self.unread / self._mean

    def took(self, route: bytes, size_bytes: int) -> None:
        """Its owner has read a message. ROUTER numbers routes upwards: an older one had the same descriptor before."""
        if route < self.route:
            return
        if route != self.route:
            self.route, self.taken, self.messages = route, 0, 0
        self.taken += size_bytes
        self.messages += 1

    def look(self, received: int, passed_s: float, bounds: Bounds) -> str:
        """Take in the kernel's count of bytes.

        Args:
            received: bytes since the connection began.
            passed_s: since the last look.
            bounds: of its socket.
        Returns:
            why it must be cut; "" if it need not be.
        """
        taken, messages = self.taken, self.messages
        new = max(0, messages - self._messages)
        if new:
            self._mean = max(1.0, (taken - self._taken) / new)
        fresh = received - self.received - max(0, taken - self._taken)
        self.unread = max(0.0, self.unread + fresh - COMMANDS_BYTES_PER_S * passed_s)
        # Many small messages take more memory than their bytes.
        self.held = self.unread * (1 + MESSAGE_BYTES / self._mean) if messages else self.unread
        self.received, self._taken, self._messages = received, taken, messages
        self.allowance = min(bounds.burst, self.allowance + bounds.messages_per_s * passed_s) - new
        if self.allowance < 0:
            return f"it sends more than {bounds.messages_per_s:.0f} messages a second"
        most = bounds.unread_bytes if messages else bounds.first_bytes
        return f"{self.held / 2**20:.0f} MiB of what it sent wait unread" if self.held > most else ""

    def is_proven(self, now_s: float, bounds: Bounds) -> bool:
        """Whether it has done what only an admitted key can."""
        return self.messages > 0 or now_s - self.since_s > bounds.handshake_s


def origin_of(address: str) -> str:
    """What counts as one address: of IPv6 a /64, since whoever has one of its addresses has them all."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


def one_too_many(
    connections: list[Connection], newcomer: Connection, now_s: float, bounds: Bounds
) -> Connection | None:
    """Who must go now that `newcomer` is there, the last of `connections` (in the order of their coming); None: nobody.

    The oldest that has not proven anything goes: an honest device does so within milliseconds. Where all have, the
    newcomer goes. In a crowd of many addresses it is one of the address that has most.
    """
    neighbours = [each for each in connections if each.origin == newcomer.origin]
    if len(neighbours) > bounds.per_address:
        return _oldest_unproven(neighbours, now_s, bounds) or newcomer
    if len(connections) <= bounds.connections:
        return None
    counts: dict[str, int] = {}
    for each in connections:
        counts[each.origin] = counts.get(each.origin, 0) + 1
    crowd = max(counts, key=lambda origin: counts[origin])
    guests = [each for each in connections if each.origin == crowd]
    return _oldest_unproven(guests, now_s, bounds) or _oldest_unproven(connections, now_s, bounds) or newcomer


def _oldest_unproven(connections: list[Connection], now_s: float, bounds: Bounds) -> Connection | None:
    return next((each for each in connections if not each.is_proven(now_s, bounds)), None)
