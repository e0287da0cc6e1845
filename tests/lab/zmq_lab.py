"""A base station's sockets and devices' links over real TCP, for the tests of the transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.lab.waiting import PATIENCE_S
from wdmoe.errors import TransportError
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.messages import Attach, Message
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.keys import KeyPair, new_key_pair
from wdmoe.transport.security.zap import Door
from wdmoe.transport.zmq.channels import ZmqDataLink, ZmqDataStation, open_data_link, open_data_station
from wdmoe.transport.zmq.sockets import Context, LinkSecurity, SocketOptions, StationSecurity, new_context

DEFAULTS = SocketOptions()
WAIT_S = PATIENCE_S


@dataclass
class Lab:
    """One base station identity with its door, and a second context for the devices."""

    state: Path
    keys: KeyPair = field(default_factory=new_key_pair)

    def __post_init__(self) -> None:
        self.context: Context = new_context()
        self.devices: Context = new_context()
        self.strangers: Context = new_context()
        self.admission = Admission(self.state)
        self.door = Door(self.context, self.admission)
        self.security = StationSecurity(self.keys, self.door)
        self._open: list[ZmqDataLink | ZmqDataStation] = []

    def station(self, bind: str = "tcp://127.0.0.1:*", options: SocketOptions = DEFAULTS) -> ZmqDataStation:
        station = open_data_station(self.context, bind, self.security, options)
        self._open.append(station)
        return station

    def admitted(self, name: str = "kit") -> LinkSecurity:
        pair = new_key_pair()
        self.admission.admit(pair.public, name)
        return LinkSecurity(self.keys.public, pair)

    def link(
        self, endpoint: str, security: LinkSecurity | None = None, options: SocketOptions = DEFAULTS
    ) -> ZmqDataLink:
        link = open_data_link(self.devices, endpoint, security or self.admitted(), options)
        self._open.append(link)
        return link

    def close(self) -> None:
        for end in self._open:
            end.close()
        self.devices.destroy(0)
        self.strangers.destroy(0)
        self.door.close()
        self.context.destroy(0)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with open_lab(tmp_path) as opened:
        yield opened


@contextmanager
def open_lab(state: Path) -> Iterator[Lab]:
    lab = Lab(state)
    try:
        yield lab
    finally:
        lab.close()


def until(condition: Callable[[], object], what: str = "the condition") -> None:
    limit = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < limit, f"waited {WAIT_S} s for {what}"
        time.sleep(0.02)


def ask(link: ZmqDataLink, station: ZmqDataStation, message: Message | None = None) -> Envelope:
    """Send (again and again, as devices do) until the station has it."""
    limit = time.monotonic() + WAIT_S
    while time.monotonic() < limit:
        with suppress(TransportError):
            link.send(message or Attach(session=1))
            if (envelope := station.receive(0.5)) is not None:
                return envelope
        time.sleep(0.02)
    raise AssertionError("the station heard nothing")


def hear(end: ZmqDataLink | ZmqDataStation) -> Envelope:
    """The next message, in as many short waits as it takes."""
    envelope = end.receive(WAIT_S)
    assert envelope is not None
    return envelope
