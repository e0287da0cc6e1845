"""ZeroMQ sockets with the options this project needs (docs/wire.md says which trap each one closes)."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from dataclasses import dataclass
from typing import TypeAlias

import zmq

from wdmoe.errors import TransportError
from wdmoe.transport.codec.wire import MAX_MESSAGE_BYTES
from wdmoe.transport.security.keys import KeyPair
from wdmoe.transport.security.zap import Door
from wdmoe.transport.zmq.crowd import Bounds

Context: TypeAlias = zmq.Context[zmq.Socket[bytes]]
Socket: TypeAlias = zmq.Socket[bytes]

_TCP = re.compile(r"tcp://[^\s/]+:(?P<port>\*|[0-9]{1,5})")
_SLACK_BYTES = 1 << 20
_LOOKS_LIKE = "an address looks like tcp://192.168.1.2:5555"


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """Tunable per network. The defaults suit a LAN; scale the times with the round trip."""

    max_message_bytes: int = MAX_MESSAGE_BYTES
    queue_messages: int = 16  # to each peer (half of it for sure): work waits where it can be sent elsewhere
    heartbeat_ms: int = 200  # a silent peer is given up after three, a stopped one after five
    handshake_ms: int = 3000
    reconnect_ms: int = 100
    reconnect_most_ms: int = 2000
    connect_timeout_ms: int = 1000
    connections: int = 1024  # that a station bears on one socket, and of one address: a laboratory may be behind it
    connections_per_address: int = 256
    messages_per_s: float = 20_000.0  # of one connection, for long; two seconds' worth at once
    spin_s: float = 0.0  # data plane: look this long before sleeping; costs a core, saves a wake-up

    def bounds(self, *, trusting: bool = False) -> Bounds:
        """What a socket bears of its peers. `trusting`: of one that it has chosen itself, from the first message on."""
        unread_bytes = 4 * self.max_message_bytes + _SLACK_BYTES
        return Bounds(
            connections=self.connections,
            per_address=self.connections_per_address,
            unread_bytes=unread_bytes,
            first_bytes=unread_bytes if trusting else self.max_message_bytes + _SLACK_BYTES,
            messages_per_s=self.messages_per_s,
            burst=2 * self.messages_per_s,
            handshake_s=1.5 * self.handshake_ms / 1000,
        )


@dataclass(frozen=True, slots=True)
class StationSecurity:
    """What makes a station an encrypted one: its own pair, and the door that decides who may connect."""

    keys: KeyPair
    door: Door


@dataclass(frozen=True, slots=True)
class LinkSecurity:
    """What makes a link an encrypted one: the station's public key, known before, and the device's pair."""

    server_key: str
    keys: KeyPair


def new_context(io_threads: int = 1) -> Context:
    """A ZeroMQ context for one process."""
    return zmq.Context(io_threads)


def new_router(context: Context, domain: bytes, security: StationSecurity | None, options: SocketOptions) -> Socket:
    """A ROUTER for `listen`. Never with ROUTER_HANDOVER: an admitted peer could take over another's connection.

    Raises:
        TransportError: the door is not open.
    """
    _hide_routing_ids()
    socket = _new_station(context, zmq.ROUTER, domain, security, options)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    return socket


def new_publisher(context: Context, domain: bytes, security: StationSecurity | None, options: SocketOptions) -> Socket:
    """An XPUB for `listen`. It never waits for its listeners: a full queue drops.

    What it is told to send to whom is its owner's word, not the listeners': each would be remembered.

    Raises:
        TransportError: the door is not open.
    """
    socket = _new_station(context, zmq.XPUB, domain, security, options)
    socket.set(zmq.XPUB_MANUAL, 1)
    return socket


def listen(socket: Socket, bind: str) -> None:
    """Accept connections.

    Raises:
        TransportError: the address cannot be bound.
    """
    _require_tcp(bind)
    try:
        socket.set(zmq.IPV6, int("[" in bind))
        socket.bind(bind)
    except zmq.ZMQError as error:
        raise TransportError(f"cannot listen at {bind}: {_advice(error)}") from error


def _new_station(
    context: Context, kind: int, domain: bytes, security: StationSecurity | None, options: SocketOptions
) -> Socket:
    if security is not None:
        _require_open(security.door)
    socket: Socket = context.socket(kind)
    try:
        _set_station(socket, domain, security, options)
    except BaseException:
        socket.close(0)
        raise
    return socket


def _set_station(socket: Socket, domain: bytes, security: StationSecurity | None, options: SocketOptions) -> None:
    _common(socket, options)
    socket.set(zmq.BACKLOG, 128)
    if security is not None:
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, security.keys.secret.encode())
        socket.set(zmq.ZAP_DOMAIN, domain)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


def new_client(context: Context, kind: int, security: LinkSecurity | None, options: SocketOptions) -> Socket:
    """A DEALER or SUB that is not connected yet; a SUB wants all there is.

    No routing id: the station numbers its connections itself.

    Raises:
        TransportError: a key cannot be used.
    """
    socket: Socket = context.socket(kind)
    try:
        _common(socket, options)
        if kind == zmq.SUB:
            socket.set(zmq.SUBSCRIBE, b"")
        else:
            socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.RECONNECT_IVL, options.reconnect_ms)
        socket.set(zmq.RECONNECT_IVL_MAX, options.reconnect_most_ms)
        socket.set(zmq.CONNECT_TIMEOUT, options.connect_timeout_ms)
        if security is not None:
            socket.set(zmq.CURVE_SERVERKEY, security.server_key.encode())
            socket.set(zmq.CURVE_PUBLICKEY, security.keys.public.encode())
            socket.set(zmq.CURVE_SECRETKEY, security.keys.secret.encode())
    except (zmq.ZMQError, UnicodeError) as error:
        socket.close(0)
        raise TransportError("the base station's key or the device's own is not a Z85 key") from error
    return socket


def connect(socket: Socket, endpoint: str) -> None:
    """Start connecting.

    Raises:
        TransportError: `endpoint` is not an address.
    """
    _require_tcp(endpoint)
    try:
        socket.set(zmq.IPV6, int("[" in endpoint))
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise TransportError(f"cannot connect to {endpoint}: {_advice(error)}") from error


def endpoint_of(socket: Socket) -> str:
    """Where a bound socket listens, with the port that was chosen for `:*`."""
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")


def _common(socket: Socket, options: SocketOptions) -> None:
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.MAXMSGSIZE, options.max_message_bytes)
    socket.set(zmq.SNDHWM, options.queue_messages)
    socket.set(zmq.RCVHWM, 0)  # a full queue of a peer that vanishes could abort the process (docs/wire.md, Z22)
    socket.set(zmq.HEARTBEAT_IVL, options.heartbeat_ms)
    socket.set(zmq.HEARTBEAT_TIMEOUT, 3 * options.heartbeat_ms)
    socket.set(zmq.HEARTBEAT_TTL, 5 * options.heartbeat_ms)
    socket.set(zmq.HANDSHAKE_IVL, options.handshake_ms)
    socket.set(zmq.TCP_KEEPALIVE, 1)


def _require_tcp(address: str) -> None:
    # Other transports would go without encryption whatever the options say, and libzmq cuts 65537 down to port 1.
    form = _TCP.fullmatch(address)
    if form is None or (form["port"] != "*" and int(form["port"]) > 65535):
        raise TransportError(f"cannot use {address}: {_LOOKS_LIKE}")


def _hide_routing_ids() -> None:
    """Make the numbers that the next ROUTER gives to its connections unpredictable.

    libzmq 4.3.5 starts them with libc's rand(), which nobody seeds, and aborts the whole process when a
    connection is due for a number that a peer has claimed as its routing id before. So one admitted peer that
    knows the number could kill the base station. Nothing else here uses rand().
    """
    ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))


def _require_open(door: Door) -> None:
    if not door.is_open:
        raise TransportError("the door (ZAP handler) must be open before a station binds")


def _advice(error: zmq.ZMQError) -> str:
    known = {
        errno.EADDRINUSE: "the port is in use; stop the other program or choose another port",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.ENODEV: "this machine has no such interface or address; use an IP address of it, or *",
        errno.EACCES: "no permission; use a port above 1023",
        errno.EINVAL: _LOOKS_LIKE,
    }
    return known.get(error.errno or 0, str(error))
