"""Messages over one ZeroMQ socket, without waiting, and the waiting of an event loop: what the channels are made of."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

import zmq

from wdmoe.errors import PeerBusyError, PeerGoneError, ProtocolError, TransportError, VersionError
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.framing import pack, unpack
from wdmoe.transport.codec.messages import Failure, Message
from wdmoe.transport.codec.wire import Limits
from wdmoe.transport.refusals import Refusals
from wdmoe.transport.security.keys import fingerprint
from wdmoe.transport.zmq.crowd import Bounds
from wdmoe.transport.zmq.gate import Gate
from wdmoe.transport.zmq.monitor import HandshakeWatch
from wdmoe.transport.zmq.sockets import Context, LinkSecurity, Socket, SocketOptions, connect, new_client

_LOG = logging.getLogger(__name__)
_TURN = 16  # messages that are read before the event loop does something else
# As plain numbers and bytes: a member of an enumeration is turned into one each time, which costs as much as the call.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.SNDMORE | zmq.NOBLOCK)
_SRCFD = int(zmq.SRCFD)
_USER_ID = b"User-Id"


class SocketMessages:
    """Messages over one socket, never waiting. What is common to both planes and both ends."""

    def __init__(
        self,
        socket: Socket,
        options: SocketOptions,
        *,
        routed: bool,
        secure: bool,
        admits: Callable[[str], bool] | None = None,
        watch: HandshakeWatch | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        """Owns the socket, which is not bound or connected yet. `watch`, `bounds`: see `Gate`."""
        self.socket = socket
        self.refusals = Refusals(_LOG)
        self.watch = watch
        self.gate = Gate(socket, bounds or options.bounds(trusting=watch is not None), self.refusals, watch)
        self._limits = Limits(max_message_bytes=options.max_message_bytes, checksum=not secure)
        self._routed = routed
        self._secure = secure
        self._admits = admits
        self._closed = False
        self._send = super(zmq.Socket, socket).send  # past PyZMQ's second layer, which is for what we do not use
        # What a frame takes on the wire beside its content: ZMTP's head, and CURVE's nonce and seal.
        self._overhead_bytes = 9 + (33 if secure else 0)

    def close(self) -> None:
        """Without lingering. Idempotent."""
        if not self._closed:
            self._closed = True
            self.gate.close()
            self.socket.close(0)

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
            self._send(route, _MORE)  # ZeroMQ decides here, and never sends this: the rest does not fail
        self._send(frame, _NOBLOCK)

    def take(self) -> Envelope | None:
        """The next message that waits in the socket; None where it was refused.

        Raises:
            zmq.Again: nothing waits.
        """
        receive = self.socket.recv
        try:
            route = receive(_NOBLOCK) if self._routed else b""
            frame = rest = receive(_NOBLOCK, False)
        except zmq.Again:
            self.gate.drained = True
            raise
        size_bytes = len(frame) + self._overhead_bytes
        while rest.more:
            rest = receive(_NOBLOCK, False)
            size_bytes += len(rest) + self._overhead_bytes
        if not self.gate.took(int(frame.get(_SRCFD)), route, size_bytes):
            return None
        # What the door said at the handshake, so it is proven; asking each time costs half a microsecond.
        key = str(frame.get(_USER_ID)) if self._secure and self._routed else ""
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


class _Waiting:
    """The waiting of a control plane end: tells the event loop's owner when to look at its socket.

    ZeroMQ's descriptor only says that something changed, and any call on the socket may swallow the news. So
    the state is asked for after every call, and whoever waits is told. The gate's thread tells its news by `wake`.
    """

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._descriptor = int(socket.get(zmq.FD))
        self._loop.add_reader(self._descriptor, self.look)

    def look(self) -> None:
        """Ask the socket. Call after every send."""
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._news.set()

    def wake(self) -> None:
        """Let whoever waits look. Thread-safe."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._news.set)

    async def news(self) -> None:
        """Wait until there may be something to read, or a verdict. Check the verdict after `clear`."""
        self.look()
        await self._news.wait()

    def clear(self) -> None:
        """From here on news count."""
        self._news.clear()

    def close(self) -> None:
        """Stop watching; call before the socket is closed."""
        self._loop.remove_reader(self._descriptor)


class AsyncEnd:
    """What both ends of the control plane have in common."""

    def __init__(self, messages: SocketMessages) -> None:
        self._messages = messages
        self._waiting = _Waiting(messages.socket)
        messages.gate.on_news = self._waiting.wake
        self._in_a_row = 0
        self._closed = False

    @property
    def counters(self) -> Mapping[str, int]:
        """Refused messages by kind: `invalid_message`, `wrong_version`, `revoked_key`; and connections that were cut:
        `too_many_connections`, `flood`."""
        return self._messages.refusals.counters

    async def receive(self) -> Envelope:
        """See `ControlStation.receive`."""
        while True:
            self._in_a_row += 1
            if self._in_a_row >= _TURN:  # a flood must not hold the loop, which has answers to send
                self._in_a_row = 0
                await asyncio.sleep(0)
            try:
                envelope = self._messages.take()
            except zmq.Again:
                self._waiting.clear()
                self._check()
                await self._waiting.news()
            else:
                if envelope is not None:  # nothing is awaited after the take: cancelling loses no message
                    return envelope

    def _check(self) -> None:
        if self._messages.watch is not None:
            self._messages.watch.raise_verdict()

    def close(self) -> None:
        """See `ControlStation.close`."""
        if self._closed:
            return
        self._closed = True
        self._waiting.close()
        self._messages.close()


def open_link(
    context: Context, kind: int, endpoint: str, security: LinkSecurity | None, options: SocketOptions
) -> SocketMessages:
    """A socket of this kind (`zmq.DEALER`, `zmq.SUB`) that connects in the background.

    Raises:
        TransportError: the address or a key is malformed.
    """
    socket = new_client(context, kind, security, options)
    name = "(none)" if security is None else security.keys.fingerprint
    messages = SocketMessages(
        socket, options, routed=False, secure=security is not None, watch=HandshakeWatch(endpoint, name)
    )
    try:
        connect(socket, endpoint)
    except TransportError:
        messages.close()
        raise
    return messages
