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

Context: TypeAlias = zmq.Context[zmq.Socket[bytes]]
Socket: TypeAlias = zmq.Socket[bytes]

_TCP = re.compile(r"tcp://[^\s/]+:(?P<port>\*|[0-9]{1,5})")
_LOOKS_LIKE = "an address looks like tcp://192.168.1.2:5555"


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """Tunable per network. The defaults suit a LAN; scale the times with the round trip."""

    max_message_bytes: int = MAX_MESSAGE_BYTES
    queue_messages: int = 16  # each way, per peer (half of it for sure): work waits where it can be sent elsewhere
    heartbeat_ms: int = 200  # a silent peer is given up after three, a stopped one after five
    handshake_ms: int = 3000
    reconnect_ms: int = 100
    reconnect_most_ms: int = 2000
    connect_timeout_ms: int = 1000
    spin_s: float = 0.0  # data plane: look this long before sleeping; costs a core, saves a wake-up


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


def bind_router(
    context: Context, bind: str, domain: bytes, security: StationSecurity | None, options: SocketOptions
) -> Socket:
    """An open ROUTER. Never with ROUTER_HANDOVER: an admitted peer could take over another's connection.

    Raises:
        TransportError: the address cannot be bound, or the door is not open.
    """
    _require_tcp(bind)
    _hide_routing_ids()
    socket: Socket = context.socket(zmq.ROUTER)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    return _bound(socket, bind, domain, security, options)


def bind_publisher(
    context: Context, bind: str, domain: bytes, security: StationSecurity | None, options: SocketOptions
) -> Socket:
    """An open PUB. What peers may send, subscriptions, is bounded; it never waits for them: a full queue drops.

    Raises:
        TransportError: the address cannot be bound, or the door is not open.
    """
    _require_tcp(bind)
    return _bound(context.socket(zmq.PUB), bind, domain, security, options)


def _bound(
    socket: Socket, bind: str, domain: bytes, security: StationSecurity | None, options: SocketOptions
) -> Socket:
    try:
        _common(socket, options)
        socket.set(zmq.BACKLOG, 128)
        socket.set(zmq.IPV6, int("[" in bind))
        if security is not None:
            _require_open(security.door)
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.CURVE_SECRETKEY, security.keys.secret.encode())
            socket.set(zmq.ZAP_DOMAIN, domain)
            socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.bind(bind)
    except zmq.ZMQError as error:
        socket.close(0)
        raise TransportError(f"cannot listen at {bind}: {_advice(error)}") from error
    except BaseException:
        socket.close(0)
        raise
    return socket


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
    socket.set(zmq.RCVHWM, options.queue_messages)
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
