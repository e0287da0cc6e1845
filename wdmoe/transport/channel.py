"""The channel interfaces. `zeromq` holds the real ones, `memory` the ones for tests, both with the same behaviour.

The data plane blocks and has one owner thread, because a hop between a thread and an event loop costs as much as
the wire does (docs/design.md). The control plane is asyncio and never waits for arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from wdmoe.transport.codec.messages import Message


class Envelope(NamedTuple):
    """A decoded message and who sent it."""

    route: bytes  # connection id; changes when a peer reconnects, meaningless outside this channel
    key: str  # the peer's CURVE public key (Z85), proven by the handshake; "" on an insecure channel
    message: Message
    size_bytes: int  # all frames together, as they travelled


class DataStation(Protocol):
    """The BS end of the data plane. One thread owns it; only `wake` may be called from others."""

    @property
    def ended(self) -> int:
        """Connections that have ended so far; which they were, a `send` finds out. `receive` returns when it grows."""
        ...

    def send(self, route: bytes, message: Message) -> int:
        """Hand a message over without waiting.

        Returns:
            Bytes of all frames.
        Raises:
            PeerGoneError: no such connection (any more).
            PeerBusyError: its queue is full.
            ProtocolError: the message is larger than the peer accepts.
        """
        ...

    def receive(self, timeout_s: float) -> Envelope | None:
        """Next message, or None after `timeout_s` seconds, when woken or when a connection ended. Frames that are not
        valid are logged, counted and skipped, never raised."""
        ...

    def wake(self) -> None:
        """Make a waiting `receive` return None. Thread-safe, does not block."""
        ...

    def close(self) -> None:
        """Close without lingering. Idempotent."""
        ...


class DataLink(Protocol):
    """The device end of the data plane, same rules as `DataStation`."""

    def send(self, message: Message) -> int:
        """As `DataStation.send`."""
        ...

    def receive(self, timeout_s: float) -> Envelope | None:
        """As `DataStation.receive`."""
        ...

    def wake(self) -> None:
        """As `DataStation.wake`."""
        ...

    def close(self) -> None:
        """As `DataStation.close`."""
        ...


class ControlStation(Protocol):
    """The BS end of the control plane, owned by one event loop."""

    async def send(self, route: bytes, message: Message) -> None:
        """Hand a message over. Raises as `DataStation.send`."""
        ...

    async def receive(self) -> Envelope:
        """Next valid message. Cancelling loses nothing."""
        ...

    def close(self) -> None:
        """Close without lingering. Idempotent."""
        ...


class ControlLink(Protocol):
    """The device end of the control plane, owned by one event loop."""

    async def send(self, message: Message) -> None:
        """Hand a message over. Raises TransportError when not connected or the queue is full."""
        ...

    async def receive(self) -> Envelope:
        """Next valid message. Cancelling loses nothing.

        Raises:
            RefusedError: the BS refused this key, or the server key is wrong. The socket is dead; make a new one.
        """
        ...

    def close(self) -> None:
        """Close without lingering. Idempotent."""
        ...
