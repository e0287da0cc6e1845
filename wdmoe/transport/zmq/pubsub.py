"""The broadcast plane: what is said once and heard by many (PUB and SUB), over CURVE as the other planes.

Nothing here is acknowledged. A listener that is too slow, or comes too late, misses what was said meanwhile, as with a
radio; messages are numbered so that it knows. Both ends belong to one event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import zmq

from wdmoe.errors import TransportError
from wdmoe.transport.codec.messages import Message
from wdmoe.transport.security.zap import BROADCAST_DOMAIN
from wdmoe.transport.zmq.messaging import AsyncEnd, SocketMessages, open_link
from wdmoe.transport.zmq.sockets import (
    Context,
    LinkSecurity,
    SocketOptions,
    StationSecurity,
    endpoint_of,
    listen,
    new_publisher,
)

# A queue holds what is said while a listener's machine is busy elsewhere: 64 KiB each as pictures are sent here.
OPTIONS = SocketOptions(queue_messages=256)
_MOST_HEARD_BYTES = 4096  # of what listeners send: subscriptions, and the handshake
_ALL = b"\x01"  # a subscription to everything, as a Tuner sends it
_MOST_UNHEARD_BYTES = 1 << 16  # of a listener at once: one needs a thousandth of it
_MOST_READ = 20_000  # subscriptions before each message


class Transmitter:
    """The base station's end. Made by `open_transmitter`."""

    def __init__(self, messages: SocketMessages) -> None:
        self._messages = messages

    @property
    def endpoint(self) -> str:
        """Where it listens, with the port that was chosen for `:*`."""
        return endpoint_of(self._messages.socket)

    @property
    def counters(self) -> Mapping[str, int]:
        """Connections that were cut: `too_many_connections`, `flood`."""
        return self._messages.refusals.counters

    def send(self, message: Message) -> int:
        """Say something to whoever listens, without waiting. Returns its bytes.

        Raises:
            ProtocolError: the message breaks a rule or is larger than a listener accepts.
        """
        self._admit_listeners()
        return self._messages.send(message)

    def close(self) -> None:
        """Close without lingering. Idempotent."""
        self._messages.close()

    def _admit_listeners(self) -> None:
        """Who asks for everything gets it. What else they ask for is read and forgotten."""
        socket = self._messages.socket
        for _ in range(_MOST_READ):
            try:
                if socket.recv(zmq.NOBLOCK) == _ALL:
                    socket.set(zmq.SUBSCRIBE, b"")
            except zmq.Again:
                self._messages.gate.drained = True
                return


class Tuner(AsyncEnd):
    """A device's end, made by `open_tuner`. `receive` and `close` as of `wdmoe.transport.channel.ControlLink`."""


def open_transmitter(
    context: Context, bind: str, security: StationSecurity | None, options: SocketOptions = OPTIONS
) -> Transmitter:
    """Only admitted device keys may listen. A key that is revoked later hears on until its connection ends.

    Raises:
        TransportError: the address cannot be bound, or the door is not open.
    """
    heard = replace(options, max_message_bytes=_MOST_HEARD_BYTES)
    socket = new_publisher(context, BROADCAST_DOMAIN, security, heard)
    bounds = replace(heard.bounds(), first_bytes=_MOST_UNHEARD_BYTES)
    messages = SocketMessages(socket, options, routed=False, secure=security is not None, bounds=bounds)
    try:
        listen(socket, bind)
    except TransportError:
        messages.close()
        raise
    return Transmitter(messages)


def open_tuner(
    context: Context, endpoint: str, security: LinkSecurity | None, options: SocketOptions = OPTIONS
) -> Tuner:
    """For the running event loop. Connecting goes on in the background.

    Raises:
        TransportError: the address or a key is malformed.
    """
    return Tuner(open_link(context, zmq.SUB, endpoint, security, options))
