"""What ZeroMQ's sockets do not tell their owners: that an attempt to connect is hopeless."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import zmq

from wdmoe.errors import RefusedError

_FAILURES = 3
_FAILING_S = 1.0  # a station that is just starting, or just going down, may cut a few handshakes
_NUMBERS = itertools.count()


def open_monitor(socket: zmq.Socket[Any], events: int) -> zmq.Socket[bytes]:
    """A PAIR that says what happens to a socket; `disable_monitor` of that socket ends it.

    Without a bound of its own: libzmq's I/O thread, and with it every connection of the process, would wait once 2,000
    events are unread, which 2,000 strangers can see to.
    """
    endpoint = f"inproc://wdmoe-monitor-{os.getpid()}-{next(_NUMBERS)}"
    socket.monitor(endpoint, events)
    pair: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
    pair.set(zmq.LINGER, 0)
    pair.set(zmq.RCVHWM, 0)
    pair.connect(endpoint)
    return pair


class HandshakeWatch:
    """Tells a refusal from a bad network, from what a link's monitor says.

    - key refused: libzmq reports it once and never connects again;
    - not ZeroMQ at all, or without encryption: the same;
    - wrong server key: the station drops the connection, libzmq tries for ever. So a few failures in a row
      count as a refusal, where a single one may be a station that restarts.
    """

    EVENTS = (
        zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    )

    def __init__(self, endpoint: str, fingerprint: str) -> None:
        """`note` is called in another thread than the rest."""
        self._endpoint = endpoint
        self._fingerprint = fingerprint
        self._failures = 0
        self._failing_since = 0.0
        self._refusal: str | None = None

    def raise_verdict(self) -> None:
        """Nothing, as long as there is hope; costs nothing.

        Raises:
            RefusedError: the station does not want this key, or is not the station that was expected. The
                socket is dead then, and every further call raises again.
        """
        if self._refusal is not None:
            raise RefusedError(self._refusal)

    def note(self, event: int) -> bool:
        """Take in one of `EVENTS`. Returns whether there is a verdict."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._failures = 0
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refusal = f"the base station at {self._endpoint} refused key {self._fingerprint}"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self._refusal = f"what answers at {self._endpoint} does not speak this protocol, or not encrypted"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._note_failure()
        return self._refusal is not None

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
