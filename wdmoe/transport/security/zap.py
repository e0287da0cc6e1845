"""The door: answers libzmq's question "may this key connect?" for all sockets of a context (ZAP, RFC 27).

It has a thread of its own, so that a handshake never waits for arithmetic or for a busy event loop. Without a
running door a socket with an enforced domain lets nobody in: the failure is a closed one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import zmq
from zmq.utils import z85

from wdmoe.errors import TransportError
from wdmoe.transport.refusals import Refusals
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.keys import fingerprint

CONTROL_DOMAIN = b"wdmoe-control"
DATA_DOMAIN = b"wdmoe-data"
BROADCAST_DOMAIN = b"wdmoe-broadcast"

_LOG = logging.getLogger(__name__)
_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by the RFC
_VERSION = b"1.0"
_ADMITS = {CONTROL_DOMAIN: ("device", "enrolment"), DATA_DOMAIN: ("device",), BROADCAST_DOMAIN: ("device",)}
_JOIN_S = 5.0


class Door:
    """Lets admitted keys through to all planes, live enrolment keys to the control plane, and nobody else.

    Start it before any station binds, close it after they are closed.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], admission: Admission) -> None:
        """Start answering.

        Raises:
            TransportError: the context has a door already.
        """
        self.admission = admission
        self._refusals = Refusals(_LOG)
        self._answers: zmq.Socket[bytes] = context.socket(zmq.REP)
        stop_endpoint = f"inproc://wdmoe-door-{id(self)}"
        self._stop: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._stopped: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        try:
            self._answers.bind(_ENDPOINT)
        except zmq.ZMQError as error:
            for socket in (self._answers, self._stop, self._stopped):
                socket.close(0)
            raise TransportError("this ZeroMQ context has a ZAP handler already; one is enough") from error
        self._stopped.bind(stop_endpoint)
        self._stop.connect(stop_endpoint)
        self._thread = threading.Thread(target=self._run, name="wdmoe-door", daemon=True)
        self._thread.start()

    @property
    def counters(self) -> Mapping[str, int]:
        """Refused handshakes by kind: `unknown_key`, `revoked_key`, `enrolment_key_on_data_plane`, `not_curve`."""
        return self._refusals.counters

    @property
    def is_open(self) -> bool:
        """Whether handshakes are being answered."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop: from here on nobody new gets in. Idempotent."""
        if not self._stop.closed:
            self._stop.send(b"")
            self._thread.join(_JOIN_S)
            self._stop.close(0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._answers, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._stopped in ready:
                    return
                self._answers.send_multipart(self._answer(self._answers.recv_multipart()))
        except zmq.ContextTerminated:
            return
        finally:
            self._answers.close(0)
            self._stopped.close(0)

    def _answer(self, request: Sequence[bytes]) -> list[bytes]:
        version, number, domain, address, _, mechanism, *credentials = request
        if version != _VERSION or mechanism != b"CURVE" or len(credentials) != 1:
            self._refusals.note("not_curve", _text(address), f"{_text(mechanism)} instead of CURVE")
            return [_VERSION, number, b"400", b"CURVE only", b"", b""]
        key = z85.encode(credentials[0]).decode()
        kind = self.admission.kind_of(key)
        if kind in _ADMITS.get(domain, ()):
            return [_VERSION, number, b"200", b"OK", key.encode(), b""]
        who = f"{fingerprint(key)} at {_text(address)}"
        if kind == "enrolment":
            self._refusals.note("enrolment_key_on_data_plane", who, "an enrolment key opens the control plane only")
        elif kind == "revoked":
            self._refusals.note("revoked_key", who, "its key was revoked")
        else:
            self._refusals.note("unknown_key", who, "its key is not admitted, or its join token is no longer valid")
        return [_VERSION, number, b"400", b"key not admitted", b"", b""]


def _text(raw: bytes) -> str:
    return raw.decode("ascii", "replace")
