"""What ZeroMQ's sockets do not tell their owners: that an attempt to connect is hopeless, that a connection ended."""

from __future__ import annotations

import time
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from wdmoe.errors import RefusedError

_FAILURES = 3
_FAILING_S = 1.0  # a station that is just starting, or just going down, may cut a few handshakes


class HandshakeWatch:
    """Tells a refusal from a bad network.

    - key refused: libzmq reports it once and never connects again;
    - not ZeroMQ at all, or without encryption: the same;
    - wrong server key: the station drops the connection, libzmq tries for ever. So a few failures in a row
      count as a refusal, where a single one may be a station that restarts.
    """

    def __init__(self, socket: zmq.Socket[Any], endpoint: str, fingerprint: str) -> None:
        """Start watching. Call before `connect`, or the first events are missed."""
        self._watched = socket
        self._endpoint = endpoint
        self._fingerprint = fingerprint
        self.socket: zmq.Socket[bytes] = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        self.connected = False  # a handshake has succeeded, at least once
        self._failures = 0
        self._failing_since = 0.0
        self._refusal: str | None = None

    def check(self) -> bool:
        """Read the news. False: they concern nobody but this object.

        Raises:
            RefusedError: the station does not want this key, or is not the station that was expected. The
                socket is dead then, and every further call raises again.
        """
        while int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._note(parse_monitor_message(self.socket.recv_multipart(zmq.NOBLOCK))["event"])
        self.raise_verdict()
        return False

    def raise_verdict(self) -> None:
        """As `check`, from what was read before: costs nothing."""
        if self._refusal is not None:
            raise RefusedError(self._refusal)

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
        self.socket.close(0)

    def _note(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.connected = True
            self._failures = 0
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refusal = f"the base station at {self._endpoint} refused key {self._fingerprint}"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self._refusal = f"what answers at {self._endpoint} does not speak this protocol, or not encrypted"
        else:
            self._note_failure()

    def _note_failure(self) -> None:
        now = time.monotonic()
        if self._failures == 0:
            self._failing_since = now
        self._failures += 1
        if self._failures >= _FAILURES and now - self._failing_since >= _FAILING_S:
            self._refusal = (
                f"{self._endpoint} broke off {self._failures} handshakes in a row: it has another server key "
                "than this node expects, or it lets nobody in"
            )


class EndWatch:
    """Counts the connections of a station that ended: by the peer's kernel at once, by silence after a heartbeat."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        """Start watching a socket that was not bound long ago."""
        self._watched = socket
        self.socket: zmq.Socket[bytes] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.ended = 0

    def check(self) -> bool:
        """Read the news. True: a connection ended."""
        before = self.ended
        while int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self.socket.recv_multipart(zmq.NOBLOCK)
            self.ended += 1
        return self.ended > before

    def raise_verdict(self) -> None:
        """Nothing that ends here is an error."""

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
        self.socket.close(0)
