"""The real channels, over ZeroMQ and CURVE. `wdmoe.transport.channel` says how they behave.

    door = Door(context, Admission(state))
    security = StationSecurity(keys, door)
    station = open_data_station(context, "tcp://*:5556", security)

    link = open_data_link(context, "tcp://192.168.1.2:5556", LinkSecurity(token.server_key, own_keys))

Without security the channel is plain and its messages carry a checksum, because a flipped bit would arrive.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import zmq

from wdmoe.errors import TransportError
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.messages import Message
from wdmoe.transport.security.zap import CONTROL_DOMAIN, DATA_DOMAIN
from wdmoe.transport.zmq.messaging import AsyncEnd, SocketMessages, open_link
from wdmoe.transport.zmq.sockets import (
    Context,
    LinkSecurity,
    SocketOptions,
    StationSecurity,
    endpoint_of,
    listen,
    new_router,
)

_DEFAULTS = SocketOptions()


class _Blocking:
    """The waiting of a data plane end: a message, a wake, or what its gate says."""

    def __init__(self, messages: SocketMessages, options: SocketOptions) -> None:
        self._messages = messages
        self._spin_s = options.spin_s
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # half the cost of an inproc socket
        self._sources: list[tuple[Any, int]] = [
            (messages.socket, zmq.POLLIN),
            (self._wake_fd, zmq.POLLIN),
        ]
        self._closed = False
        messages.gate.on_news = self.wake

    @property
    def counters(self) -> Mapping[str, int]:
        """Refused messages by kind: `invalid_message`, `wrong_version`, `revoked_key`; and connections that were cut:
        `too_many_connections`, `flood`."""
        return self._messages.refusals.counters

    def receive(self, timeout_s: float) -> Envelope | None:
        """See `DataStation.receive`."""
        watch = self._messages.watch
        if watch is not None:
            watch.raise_verdict()
        until = time.monotonic() + timeout_s
        left_s = timeout_s
        while True:
            # Polling first: it takes 1.7 us, where asking an empty socket takes 5.2 for the exception.
            ready = self._poll(left_s)
            if not ready or ready[0][0] is not self._messages.socket:
                self._messages.gate.drained = True
            for source, _ in ready:  # in the order of the sources: a message goes before a wake
                if source is self._messages.socket:
                    if (envelope := self._messages.take()) is not None:
                        return envelope
                else:
                    os.eventfd_read(self._wake_fd)
                    if watch is not None:
                        watch.raise_verdict()
                    return None
            left_s = until - time.monotonic()
            if left_s <= 0:
                return None

    def wake(self) -> None:
        """See `DataStation.wake`."""
        if not self._closed:
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """See `DataStation.close`."""
        if self._closed:
            return
        self._messages.close()
        self._closed = True
        os.close(self._wake_fd)

    def _poll(self, left_s: float) -> Sequence[tuple[Any, int]]:
        if left_s <= 0:
            return zmq.zmq_poll(self._sources, 0)
        if self._spin_s:
            stop = time.monotonic() + min(self._spin_s, left_s)
            while time.monotonic() < stop:
                if ready := zmq.zmq_poll(self._sources, 0):
                    return ready
        return zmq.zmq_poll(self._sources, int(left_s * 1000) + 1)


class ZmqDataStation(_Blocking):
    """See `DataStation`. Made by `open_data_station`."""

    @property
    def ended(self) -> int:
        """See `DataStation.ended`."""
        return self._messages.gate.ended

    @property
    def endpoint(self) -> str:
        """Where it listens, with the port that was chosen for `:*`."""
        return endpoint_of(self._messages.socket)

    def send(self, route: bytes, message: Message) -> int:
        """See `DataStation.send`."""
        return self._messages.send(message, route)


class ZmqDataLink(_Blocking):
    """See `DataLink`. Made by `open_data_link`. `receive` raises RefusedError as `ControlLink.receive`."""

    def send(self, message: Message) -> int:
        """See `DataLink.send`. PeerBusyError also stands for a station that is not connected."""
        return self._messages.send(message)


class ZmqControlStation(AsyncEnd):
    """See `ControlStation`. Made by `open_control_station`."""

    @property
    def endpoint(self) -> str:
        """Where it listens, with the port that was chosen for `:*`."""
        return endpoint_of(self._messages.socket)

    async def send(self, route: bytes, message: Message) -> None:
        """See `ControlStation.send`."""
        try:
            self._messages.send(message, route)
        finally:
            self._waiting.look()


class ZmqControlLink(AsyncEnd):
    """See `ControlLink`. Made by `open_control_link`."""

    async def send(self, message: Message) -> None:
        """See `ControlLink.send`. Also raises RefusedError, as `receive`."""
        self._check()
        try:
            self._messages.send(message)
        finally:
            self._waiting.look()


def open_data_station(
    context: Context, bind: str, security: StationSecurity | None, options: SocketOptions = _DEFAULTS
) -> ZmqDataStation:
    """The BS end of the data plane. Only admitted device keys connect, and are heard until revoked.

    Raises:
        TransportError: the address cannot be bound, or the door is not open.
    """
    return ZmqDataStation(_listening(context, bind, DATA_DOMAIN, ("device",), security, options), options)


def open_control_station(
    context: Context, bind: str, security: StationSecurity | None, options: SocketOptions = _DEFAULTS
) -> ZmqControlStation:
    """The BS end of the control plane, for the running event loop. Enrolment keys connect to it, too.

    Raises:
        TransportError: the address cannot be bound, or the door is not open.
    """
    return ZmqControlStation(_listening(context, bind, CONTROL_DOMAIN, ("device", "enrolment"), security, options))


def open_data_link(
    context: Context, endpoint: str, security: LinkSecurity | None, options: SocketOptions = _DEFAULTS
) -> ZmqDataLink:
    """The device end of the data plane. Connecting goes on in the background.

    Raises:
        TransportError: the address or a key is malformed.
    """
    return ZmqDataLink(open_link(context, zmq.DEALER, endpoint, security, options), options)


def open_control_link(
    context: Context, endpoint: str, security: LinkSecurity | None, options: SocketOptions = _DEFAULTS
) -> ZmqControlLink:
    """The device end of the control plane, for the running event loop. Connecting goes on in the background.

    Raises:
        TransportError: the address or a key is malformed.
    """
    return ZmqControlLink(open_link(context, zmq.DEALER, endpoint, security, options))


def _listening(
    context: Context,
    bind: str,
    domain: bytes,
    kinds: tuple[str, ...],
    security: StationSecurity | None,
    options: SocketOptions,
) -> SocketMessages:
    socket = new_router(context, domain, security, options)
    admits = None
    if security is not None:
        kind_of = security.door.admission.kind_of
        admits = lambda key: kind_of(key) in kinds  # noqa: E731 - asked for each message: no more than this
    messages = SocketMessages(socket, options, routed=True, secure=security is not None, admits=admits)
    try:
        listen(socket, bind)
    except TransportError:
        messages.close()
        raise
    return messages
