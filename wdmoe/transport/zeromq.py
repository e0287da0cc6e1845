"""The real channels, over ZeroMQ and CURVE. `wdmoe.transport.channel` says how they behave.

    door = Door(context, Admission(state))
    security = StationSecurity(keys, door)
    station = open_data_station(context, "tcp://*:5556", security)

    link = open_data_link(context, "tcp://192.168.1.2:5556", LinkSecurity(token.server_key, own_keys))

Without security the channel is plain and its messages carry a checksum, because a flipped bit would arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from wdmoe.errors import PeerBusyError, PeerGoneError, ProtocolError, TransportError, VersionError
from wdmoe.transport.channel import Envelope
from wdmoe.transport.framing import pack, unpack
from wdmoe.transport.keys import fingerprint
from wdmoe.transport.messages import Failure, Message
from wdmoe.transport.monitor import HandshakeWatch
from wdmoe.transport.refusals import Refusals
from wdmoe.transport.sockets import (
    Context,
    LinkSecurity,
    Socket,
    SocketOptions,
    StationSecurity,
    bind_router,
    connect,
    endpoint_of,
    new_dealer,
)
from wdmoe.transport.wire import Limits
from wdmoe.transport.zap import CONTROL_DOMAIN, DATA_DOMAIN

_LOG = logging.getLogger(__name__)
_DEFAULTS = SocketOptions()
_MORE = zmq.SNDMORE | zmq.NOBLOCK


class _Messages:
    """Messages over one socket, never waiting. What is common to both planes and both ends."""

    def __init__(
        self,
        socket: Socket,
        options: SocketOptions,
        *,
        routed: bool,
        secure: bool,
        admits: Callable[[str], bool] | None = None,
    ) -> None:
        self.socket = socket
        self.refusals = Refusals(_LOG)
        self._limits = Limits(max_message_bytes=options.max_message_bytes, checksum=not secure)
        self._routed = routed
        self._secure = secure
        self._admits = admits

    def send(self, message: Message, route: bytes | None = None) -> int:
        """Hand over a message. Returns bytes; raises as `DataStation.send`."""
        frame = pack(message, self._limits)
        try:
            try:
                self._hand_over(frame, route)
            except zmq.Again:
                # A queue that looks full may have drained: libzmq looks for that once a millisecond, or when asked.
                self.socket.get(zmq.EVENTS)
                self._hand_over(frame, route)
        except zmq.Again as error:
            raise PeerBusyError("the peer's queue is full, or it is not connected") from error
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGoneError("the peer is not connected any more") from error
            raise TransportError(f"cannot send: {error}") from error
        return len(frame)

    def _hand_over(self, frame: bytes, route: bytes | None) -> None:
        if route is not None:
            self.socket.send(route, _MORE)  # ZeroMQ decides here, and never sends this: the rest does not fail
        self.socket.send(frame, zmq.NOBLOCK)

    def take(self) -> Envelope | None:
        """The next message that waits in the socket; None where it was refused.

        Raises:
            zmq.Again: nothing waits.
        """
        receive = self.socket.recv
        route = receive(zmq.NOBLOCK) if self._routed else b""
        frame = rest = receive(zmq.NOBLOCK, copy=False)
        while rest.more:
            rest = receive(zmq.NOBLOCK, copy=False)
        # What the door said at the handshake, so it is proven; asking each time costs half a microsecond.
        key = str(frame.get("User-Id")) if self._secure and self._routed else ""
        if self._admits is not None and not self._admits(key):
            self._refuse("revoked_key", route, frame, key, "its key was revoked")
            return None
        try:
            message = unpack(frame.buffer, self._limits)
            if rest is not frame:
                raise ProtocolError("a message of several frames")
        except VersionError as error:
            self._refuse("wrong_version", route, frame, key, str(error))
            return None
        except ProtocolError as error:
            self._refuse("invalid_message", route, frame, key, str(error))
            return None
        return Envelope(route, key, message, len(frame))

    def _refuse(self, kind: str, route: bytes, frame: zmq.Frame, key: str, reason: str) -> None:
        address = frame.get("Peer-Address")
        who = f"{fingerprint(key)} at {address}" if key else str(address)
        spoke = self.refusals.note(kind, who, reason)
        # Only a station answers: two ends that answered each other's refusals would never stop.
        if spoke and self._routed and kind != "invalid_message":
            with contextlib.suppress(TransportError):
                self.send(Failure(attempt=0, reason=reason), route)


class _Blocking:
    """The waiting of a data plane end: a message, a wake, or what the monitor says."""

    def __init__(self, messages: _Messages, options: SocketOptions, watch: HandshakeWatch | None = None) -> None:
        self._messages = messages
        self._spin_s = options.spin_s
        self._watch = watch
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # half the cost of an inproc socket
        self._sources: list[tuple[Any, int]] = [
            (messages.socket, zmq.POLLIN),
            (self._wake_fd, zmq.POLLIN),
        ]
        if watch is not None:
            self._sources.append((watch.socket, zmq.POLLIN))
        self._closed = False

    @property
    def counters(self) -> Mapping[str, int]:
        """Refused messages by kind: `invalid_message`, `wrong_version`, `revoked_key`."""
        return self._messages.refusals.counters

    def receive(self, timeout_s: float) -> Envelope | None:
        """See `DataStation.receive`."""
        if self._watch is not None:
            self._watch.raise_verdict()
        until = time.monotonic() + timeout_s
        left_s = timeout_s
        while True:
            # Polling first: it takes 1.7 us, where asking an empty socket takes 5.2 for the exception.
            ready = self._poll(left_s)
            for source, _ in ready:  # in the order of the sources: a message goes before a wake
                if source is self._messages.socket:
                    if (envelope := self._messages.take()) is not None:
                        return envelope
                elif source == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                    return None
                elif self._watch is not None:
                    self._watch.check()
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
        self._closed = True
        if self._watch is not None:
            self._watch.close()
        self._messages.socket.close(0)
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


class _Waiting:
    """The waiting of a control plane end: tells the event loop's owner when to look at its sockets.

    ZeroMQ's descriptor only says that something changed, and any call on the socket may swallow the news. So
    the state is asked for after every call, and whoever waits is told.
    """

    def __init__(self, *sockets: Socket) -> None:
        self._sockets = sockets
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._descriptors = [int(socket.get(zmq.FD)) for socket in sockets]
        for descriptor in self._descriptors:
            self._loop.add_reader(descriptor, self.look)

    def look(self) -> None:
        """Ask all sockets. Call after every send."""
        if any(int(socket.get(zmq.EVENTS)) & zmq.POLLIN for socket in self._sockets):
            self._news.set()

    async def news(self) -> None:
        """Wait until a socket may have something to read."""
        self._news.clear()
        self.look()
        await self._news.wait()

    def close(self) -> None:
        """Stop watching; call before the sockets are closed."""
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)


class _Async:
    """What both ends of the control plane have in common."""

    def __init__(self, messages: _Messages, watch: HandshakeWatch | None = None) -> None:
        self._messages = messages
        self._watch = watch
        sockets = [messages.socket] if watch is None else [messages.socket, watch.socket]
        self._waiting = _Waiting(*sockets)
        self._closed = False

    @property
    def counters(self) -> Mapping[str, int]:
        """Refused messages by kind: `invalid_message`, `wrong_version`, `revoked_key`."""
        return self._messages.refusals.counters

    async def receive(self) -> Envelope:
        """See `ControlStation.receive`."""
        while True:
            try:
                envelope = self._messages.take()
            except zmq.Again:
                if self._watch is not None:
                    self._watch.check()
                await self._waiting.news()
            else:
                if envelope is not None:  # nothing is awaited after the take: cancelling loses no message
                    return envelope
                await asyncio.sleep(0)  # a flood of refused messages must not hold the loop

    def close(self) -> None:
        """See `ControlStation.close`."""
        if self._closed:
            return
        self._closed = True
        self._waiting.close()
        if self._watch is not None:
            self._watch.close()
        self._messages.socket.close(0)


class ZmqControlStation(_Async):
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


class ZmqControlLink(_Async):
    """See `ControlLink`. Made by `open_control_link`."""

    async def send(self, message: Message) -> None:
        """See `ControlLink.send`. Also raises RefusedError, as `receive`."""
        if self._watch is not None:
            self._watch.check()
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
    socket = bind_router(context, bind, DATA_DOMAIN, security, options)
    return ZmqDataStation(_station_messages(socket, security, options, ("device",)), options)


def open_control_station(
    context: Context, bind: str, security: StationSecurity | None, options: SocketOptions = _DEFAULTS
) -> ZmqControlStation:
    """The BS end of the control plane, for the running event loop. Enrolment keys connect to it, too.

    Raises:
        TransportError: the address cannot be bound, or the door is not open.
    """
    socket = bind_router(context, bind, CONTROL_DOMAIN, security, options)
    return ZmqControlStation(_station_messages(socket, security, options, ("device", "enrolment")))


def open_data_link(
    context: Context, endpoint: str, security: LinkSecurity | None, options: SocketOptions = _DEFAULTS
) -> ZmqDataLink:
    """The device end of the data plane. Connecting goes on in the background.

    Raises:
        TransportError: the address or a key is malformed.
    """
    messages, watch = _open_link(context, endpoint, security, options)
    return ZmqDataLink(messages, options, watch)


def open_control_link(
    context: Context, endpoint: str, security: LinkSecurity | None, options: SocketOptions = _DEFAULTS
) -> ZmqControlLink:
    """The device end of the control plane, for the running event loop. Connecting goes on in the background.

    Raises:
        TransportError: the address or a key is malformed.
    """
    messages, watch = _open_link(context, endpoint, security, options)
    return ZmqControlLink(messages, watch)


def _station_messages(
    socket: Socket, security: StationSecurity | None, options: SocketOptions, kinds: tuple[str, ...]
) -> _Messages:
    if security is None:
        return _Messages(socket, options, routed=True, secure=False)
    kind_of = security.door.admission.kind_of
    return _Messages(socket, options, routed=True, secure=True, admits=lambda key: kind_of(key) in kinds)


def _open_link(
    context: Context, endpoint: str, security: LinkSecurity | None, options: SocketOptions
) -> tuple[_Messages, HandshakeWatch]:
    socket = new_dealer(context, security, options)
    name = "(none)" if security is None else security.keys.fingerprint
    watch = HandshakeWatch(socket, endpoint, name)
    try:
        connect(socket, endpoint)
    except TransportError:
        watch.close()
        socket.close(0)
        raise
    return _Messages(socket, options, routed=False, secure=security is not None), watch
