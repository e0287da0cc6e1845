"""A TCP relay that can be cut one way or both, slowed, delayed, and made to flip a bit or reset."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from typing import Any

_PIECE = 1 << 14
_STALL_S = 0.2  # what TCP waits at least before it sends a lost segment again


class Relay:
    """Listens at `host:port` and forwards to `target` until closed."""

    def __init__(self, host: str, port: int, target: tuple[str, int]) -> None:
        self._target = target
        self._ways: list[Any] = [None, None]  # down, up
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((host, port))
        self.flip = 0  # flip one bit in so many of the next pieces that carry more than a heartbeat
        threading.Thread(target=self._accept, daemon=True, name="relay").start()

    def set(self, down: Any, up: Any) -> None:
        """From now on, for old and new connections."""
        self._ways = [down, up]

    def reset(self) -> None:
        """End every connection as a host does that knows of none."""
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening and forwarding."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True, name="relay").start()

    def _connect(self, near: socket.socket) -> None:
        while any(way is not None and way.cut for way in self._ways):  # a cut host answers no connect
            time.sleep(0.05)
        try:
            far = socket.create_connection(self._target, 5)
        except OSError:
            near.close()
            return
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {near, far}
        back = threading.Thread(target=self._forward, args=(near, far, 1), daemon=True, name="relay")
        back.start()
        self._forward(far, near, 0)
        back.join()
        with self._lock:
            self._open -= {near, far}
        near.close()
        far.close()

    def _forward(self, source: socket.socket, sink: socket.socket, way: int) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                self._hold(len(piece), way)
                if self.flip and len(piece) > 150:
                    self.flip -= 1
                    piece = piece[:-9] + bytes([piece[-9] ^ 4]) + piece[-8:]
                sink.sendall(piece)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _hold(self, size: int, way: int) -> None:
        """Wait as long as the link would take. A cut keeps the bytes, as TCP on both sides would."""
        while (now := self._ways[way]) is not None and now.cut:
            time.sleep(0.02)
        if now is None:
            return
        wait_s = now.delay_s + random.uniform(-1, 1) * now.jitter_s
        wait_s += size * 8 / now.rate_bps if now.rate_bps else 0.0
        if random.random() < now.loss:
            wait_s += _STALL_S
        if wait_s > 0:
            time.sleep(wait_s)
