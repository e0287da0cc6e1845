"""A TCP relay whose wire can be cut without a word, or made to flip a bit."""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Forwards connections to `target` port on this machine until closed."""

    def __init__(self, target: int) -> None:
        self.cut = False  # True: bytes vanish, connections stay: what a partition looks like
        self.flip_frames_above = 0  # flip one bit in the next forwarded piece of more bytes than this; 0: never
        self.flipped = threading.Event()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self._start(self._accept)

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _start(self, work: object, *arguments: object) -> None:
        assert callable(work)
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.cut:  # a partitioned host answers nothing; closest thing here is to say nothing
                    self._sockets.append(near)
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                self._start(self._forward, near, far)
                self._start(self._forward, far, near)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        lost = False
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                lost = lost or self.cut  # a stream with a hole cannot go on: TCP would have kept the bytes
                if lost:
                    continue
                if 0 < self.flip_frames_above < len(piece):
                    self.flip_frames_above = 0
                    piece = piece[:-9] + bytes([piece[-9] ^ 4]) + piece[-8:]
                    self.flipped.set()
                sink.sendall(piece)
            if not lost:
                sink.shutdown(socket.SHUT_WR)
