"""Stands at a socket: knows each TCP connection, counts what the peer has sent, and cuts those that go too far.

It has a thread of its own. libzmq's I/O thread waits while nobody reads what a monitor says, and a busy owner would let
it wait; nor can an owner that computes for seconds bound what its queues take meanwhile.

Each connection's descriptor is kept as a duplicate, so that what is counted and cut is this connection, whatever number
libzmq's own descriptor had. The duplicate is closed as soon as libzmq has given the connection up.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import socket as tcp
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import zmq

from wdmoe.heap import return_memory
from wdmoe.transport.refusals import Refusals
from wdmoe.transport.zmq.crowd import Bounds, Connection, one_too_many, origin_of
from wdmoe.transport.zmq.monitor import HandshakeWatch, open_monitor

_EVENT = struct.Struct("=HI")  # of a monitor: what, and which descriptor
_RECEIVED_AT = 128  # tcpi_bytes_received in the kernel's struct tcp_info
_INFO_BYTES = 136
_LOOK_MS = 100
_LOOK_SOON_MS = 20  # while much is unread, or somebody is new
_NEW_S = 1.0
_MUCH = 1 / 16  # of what one connection may leave unread before it is heard
_MOST_LEFT = 1000  # messages unread of a connection that ended: no honest peer leaves as many
_JOIN_S = 5.0
_SEE_OUT_S = 0.2
_CALM_S = 3.0  # without much unread before their memory is handed back: that holds up who allocates for some 10 ms


def _nobody() -> None:
    """Nobody wants to know."""


def _descriptors() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit if limit != resource.RLIM_INFINITY else 1 << 30


def _spare() -> int | None:
    """A descriptor to give up when none is left; None if there is none even for that."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


class Gate:
    """Guards one socket from before it is bound or connected until `close`."""

    def __init__(
        self,
        socket: zmq.Socket[Any],
        bounds: Bounds,
        refusals: Refusals,
        watch: HandshakeWatch | None = None,
    ) -> None:
        """Start watching.

        Args:
            socket: not bound or connected yet.
            bounds: of its connections, made smaller where this process may open few descriptors.
            refusals: counts and logs who is cut, as `too_many_connections` and `flood`.
            watch: what judges the handshakes of a link.
        """
        self.bounds = bounds.within(_descriptors())
        self.ended = 0
        self.drained = False  # its owner sets this where the socket has nothing to read
        self._socket = socket
        self._refusals = refusals
        self.on_news: Callable[[], None] = _nobody  # called in the gate's thread: an end, or a verdict of `watch`
        self._watch = watch
        self._closing = False
        self._present: dict[int, tuple[Connection, tcp.socket]] = {}  # by libzmq's descriptor, in the order of coming
        self._left_unread: Counter[str] = Counter()  # bytes by origin, of connections that ended
        # Routes of connections that were cut, or left many messages, until all is read.
        self._flooded: set[bytes] = set()
        self._looked_s = time.monotonic()
        self._grew_s = math.inf  # when much last waited, while this process still has its memory
        self._read_since = False  # all that waited then
        self._spare_fd: int | None = _spare()
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED
        self._monitor = open_monitor(socket, events if watch is None else events | HandshakeWatch.EVENTS)
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="wdmoe-gate", daemon=True)
        self._thread.start()

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._present)

    def took(self, descriptor: int, route: bytes, size_bytes: int) -> bool:
        """The owner has read a message that came over this descriptor of libzmq's, of so many bytes on the wire.

        Returns:
            whether it is worth a look: what a flood left behind is not, and would hold others up.
        """
        present = self._present.get(descriptor)
        if present is not None:
            present[0].took(route, size_bytes)
            if present[0].cut and present[0].route == route:  # not another that had this descriptor before
                return False
        return route not in self._flooded

    def close(self) -> None:
        """Let what was sent go out, end all connections and stop watching. Call before the socket is closed.

        Idempotent. libzmq could abort where a peer vanishes from a socket that is just being closed (Z22).
        """
        if self._stop_fd < 0:
            return
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(_JOIN_S)
        self._socket.disable_monitor()
        self._monitor.close(0)
        os.close(self._stop_fd)
        self._stop_fd = -1
        for _, duplicate in self._present.values():
            duplicate.close()
        self._present.clear()
        if self._spare_fd is not None:
            os.close(self._spare_fd)

    # ---- the gate's thread

    def _run(self) -> None:
        sources: list[tuple[Any, int]] = [(self._monitor, zmq.POLLIN), (self._stop_fd, zmq.POLLIN)]
        wait_ms = _LOOK_MS
        with contextlib.suppress(zmq.ContextTerminated):
            while True:
                ready = [source for source, _ in zmq.zmq_poll(sources, wait_ms)]
                if self._stop_fd in ready:
                    self._see_out()
                    return
                if self._monitor in ready:
                    self._hear()
                wait_ms = self._look_at_all()

    def _see_out(self) -> None:
        """End all connections and wait, not for long, until libzmq knows."""
        self._closing = True
        for _, duplicate in self._present.values():
            self._stop_reading(duplicate)
        until_s = time.monotonic() + _SEE_OUT_S
        while self._present and (left_s := until_s - time.monotonic()) > 0:
            self._monitor.poll(int(left_s * 1000) + 1)
            self._hear()

    @staticmethod
    def _stop_reading(duplicate: tcp.socket) -> None:
        """libzmq finds the end of this stream, after it has written what it was given before."""
        with contextlib.suppress(OSError):
            duplicate.shutdown(tcp.SHUT_RD)

    def _hear(self) -> None:
        """Read the monitor's news, all of it."""
        while int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            event, descriptor = _EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
            if event in (zmq.EVENT_ACCEPTED, zmq.EVENT_CONNECTED):
                self._opened(descriptor)
            elif event == zmq.EVENT_DISCONNECTED:
                self._closed(descriptor)
            elif self._watch is not None and self._watch.note(event):
                self.on_news()

    def _opened(self, descriptor: int) -> None:
        duplicate = self._duplicate(descriptor)
        if duplicate is None:
            return
        try:
            origin = origin_of(duplicate.getpeername()[0])
        except (OSError, ValueError):  # it has gone already, or the number is another's by now
            duplicate.close()
            return
        now_s = time.monotonic()
        newcomer = Connection(origin, now_s, allowance=self.bounds.burst)
        self._forget(descriptor)
        self._present[descriptor] = (newcomer, duplicate)
        if self._closing:
            self._stop_reading(duplicate)
            return
        if self._left_unread[origin] > self.bounds.unread_bytes:
            self._cut(newcomer, "flood", "its earlier connections left too much unread")
            return
        present = [connection for connection, _ in self._present.values() if not connection.cut]
        if (guest := one_too_many(present, newcomer, now_s, self.bounds)) is not None:
            bounds = f"{self.bounds.per_address} connections of an address, {self.bounds.connections} in all"
            self._cut(guest, "too_many_connections", f"more than {bounds}")

    def _closed(self, descriptor: int) -> None:
        present = self._present.get(descriptor)
        if present is not None:
            connection, duplicate = present
            self._look(connection, duplicate, 0.0)
            self._left_unread[connection.origin] += int(connection.held)
            if connection.route and (connection.cut or connection.waiting > _MOST_LEFT):
                self._flooded.add(connection.route)
            self._forget(descriptor)
        self.ended += 1
        if self._watch is None:  # a link comes back by itself, and its owner need not know
            self.on_news()

    def _forget(self, descriptor: int) -> None:
        present = self._present.pop(descriptor, None)
        if present is not None:
            present[1].close()

    def _duplicate(self, descriptor: int) -> tcp.socket | None:
        if self._spare_fd is None:
            self._spare_fd = _spare()
        try:
            return tcp.socket(fileno=os.dup(descriptor))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away(descriptor)
            return None

    def _turn_away(self, descriptor: int) -> None:
        """No descriptor is left to watch this connection with: end it, by means of the spare one."""
        if self._spare_fd is None:
            return
        os.close(self._spare_fd)
        self._spare_fd = None
        with contextlib.suppress(OSError), tcp.socket(fileno=os.dup(descriptor)) as duplicate:
            origin = origin_of(duplicate.getpeername()[0])
            duplicate.shutdown(tcp.SHUT_RDWR)
            self._refusals.note("too_many_connections", origin, "this process has no descriptors left")

    def _look_at_all(self) -> int:
        """Cut who goes too far. Returns milliseconds until the next look."""
        now_s = time.monotonic()
        passed_s = now_s - self._looked_s
        if passed_s * 1000 < _LOOK_SOON_MS:
            return _LOOK_SOON_MS
        self._looked_s = now_s
        much = self._much_waits()
        if much:
            self._grew_s, self._read_since = now_s, False
        if self.drained:
            self.drained = False
            self._left_unread.clear()
            self._flooded.clear()
            self._read_since = True
        if self._read_since and now_s - self._grew_s > _CALM_S:
            self._grew_s = math.inf
            return_memory()
        soon = much
        for connection, duplicate in list(self._present.values()):
            if (reason := self._look(connection, duplicate, passed_s)) and not connection.cut:
                self._cut(connection, "flood", reason)
            soon = soon or now_s - connection.since_s < _NEW_S
        return _LOOK_SOON_MS if soon else _LOOK_MS

    def _much_waits(self) -> bool:
        """Whether what waits unread takes memory that is worth handing back: of all together, also who has gone."""
        held = sum(connection.held for connection, _ in self._present.values())
        return held + self._left_unread.total() > _MUCH * self.bounds.first_bytes

    def _look(self, connection: Connection, duplicate: tcp.socket, passed_s: float) -> str:
        info = duplicate.getsockopt(tcp.IPPROTO_TCP, tcp.TCP_INFO, _INFO_BYTES)
        if len(info) < _INFO_BYTES:  # a kernel before 4.1 does not count
            return ""
        return connection.look(struct.unpack_from("=Q", info, _RECEIVED_AT)[0], passed_s, self.bounds)

    def _cut(self, guest: Connection, kind: str, reason: str) -> None:
        """End a connection; libzmq sees it end and says so."""
        guest.cut = True
        for connection, duplicate in self._present.values():
            if connection is guest:
                with contextlib.suppress(OSError):  # it has ended by itself
                    duplicate.shutdown(tcp.SHUT_RDWR)
        self._refusals.note(kind, guest.origin, reason)
