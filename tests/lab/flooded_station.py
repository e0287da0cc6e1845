"""A station's three sockets with their real owners, in a process of its own, for hostile peers to flood.

    python -m tests.lab.flooded_station STATE [--insecure] [--old]

Prints one line of JSON: where each plane listens, and with encryption the station's key and two admitted pairs, for an
honest peer and for a hostile one. Ends when its input does. `--old` undoes the bounds: RCVHWM 16 as once, nobody cut.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import zmq

from wdmoe.errors import TransportError
from wdmoe.nodes.authentication import Authentication, CurveAuthentication, NoAuthentication
from wdmoe.nodes.sessions import Host, Sessions, Terms
from wdmoe.records import DeviceReport
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.framing import pack
from wdmoe.transport.codec.messages import Attach, Attached, Hello, Message, Pilot, Ping, Welcome
from wdmoe.transport.codec.wire import Limits
from wdmoe.transport.exchange import Exchange
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.keys import KeyPair, new_key_pair, station_keys
from wdmoe.transport.security.zap import Door
from wdmoe.transport.zmq import crowd, sockets
from wdmoe.transport.zmq.channels import open_control_link, open_control_station, open_data_link, open_data_station
from wdmoe.transport.zmq.pubsub import open_transmitter, open_tuner
from wdmoe.transport.zmq.sockets import LinkSecurity, SocketOptions, StationSecurity, new_context

ANY = "tcp://127.0.0.1:*"
PLANES = ("control", "data", "broadcast")
REPORT = DeviceReport(
    name="kit",
    hardware="x",
    system="x",
    provider="x",
    threads=1,
    memory_bytes=1,
    flops=1.0,
    downlink_snr_hz=0.0,
    uplink_snr_hz=0.0,
)


@dataclass
class FloodedStation:
    """The station's process, and what is needed to talk to it."""

    process: subprocess.Popen[str]
    endpoints: dict[str, str]
    server_key: str
    honest: KeyPair
    hostile: KeyPair

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def peak_mib(self) -> float:
        """The most memory it has had."""
        return self._memory_mib("VmHWM:")

    @property
    def mib(self) -> float:
        """The memory that it has now."""
        return self._memory_mib("VmRSS:")

    def _memory_mib(self, name: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition(name)[2].split()[0]) / 1024

    @property
    def descriptors(self) -> int:
        return int(psutil.Process(self.process.pid).num_fds())

    def order(self, plane: str, kind: str, **more: Any) -> str:
        """What `tests.lab.hostile_peer` is told."""
        keys = {"server_key": self.server_key, "public": self.hostile.public, "secret": self.hostile.secret}
        message = Ping(sequence=1, done=0, queued=0, rss_bytes=1) if plane == "control" else Attach(session=1)
        payload = pack(message, Limits(checksum=not self.server_key)).hex()
        known = {"endpoint": self.endpoints[plane], "kind": kind, "payload": payload}
        return json.dumps({**known, **(keys if self.server_key else {}), **more})

    def seconds_to_answer(self, plane: str, patience_s: float) -> float:
        """How long an honest newcomer waits for its first answer; `patience_s` if there is none."""
        security = LinkSecurity(self.server_key, self.honest) if self.server_key else None
        ask = {"control": _ask_control, "data": _ask_data, "broadcast": _ask_broadcast}[plane]
        context, begun = new_context(), time.monotonic()
        try:
            with suppress(TimeoutError, asyncio.TimeoutError):
                asyncio.run(asyncio.wait_for(ask(context, self.endpoints[plane], security), patience_s))
            return min(time.monotonic() - begun, patience_s)
        finally:
            context.destroy(0)


@contextmanager
def flooded_station(state: Path, *words: str, prefix: tuple[str, ...] = ()) -> Iterator[FloodedStation]:
    """Start one; `prefix` is a command that starts it in turn, as `prlimit`."""
    command = [*prefix, sys.executable, "-m", "tests.lab.flooded_station", str(state), *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        pairs = [KeyPair(*pair) for pair in told["pairs"]]
        yield FloodedStation(process, told["endpoints"], told["server_key"], *pairs)
    finally:
        process.kill()
        process.communicate()


# ---- the honest peers


async def _ask_control(context: sockets.Context, endpoint: str, security: LinkSecurity | None) -> None:
    link = open_control_link(context, endpoint, security)
    with closing(link):
        while True:
            with suppress(TransportError):
                await link.send(Hello(session=7, report=REPORT, enrol_key=""))
            with suppress(asyncio.TimeoutError):
                if isinstance((await asyncio.wait_for(link.receive(), 0.2)).message, Welcome):
                    return


async def _ask_data(context: sockets.Context, endpoint: str, security: LinkSecurity | None) -> None:
    link = open_data_link(context, endpoint, security)
    with closing(link):
        while True:
            with suppress(TransportError):
                link.send(Attach(session=7))
            if link.receive(0.2) is not None:
                return
            await asyncio.sleep(0)


async def _ask_broadcast(context: sockets.Context, endpoint: str, security: LinkSecurity | None) -> None:
    with closing(open_tuner(context, endpoint, security)) as tuner:
        await tuner.receive()


# ---- the station's process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--old", action="store_true")
    options = parser.parse_args()
    if options.old:
        _undo()
    asyncio.run(_serve(options))


def _undo() -> None:
    """As it was: libzmq bounds what is unread, and nobody is cut."""
    common = sockets._common

    def as_it_was(socket: sockets.Socket, options: SocketOptions) -> None:
        common(socket, options)
        socket.set(zmq.RCVHWM, options.queue_messages)

    sockets._common = as_it_was
    crowd.Connection.look = lambda *_: ""  # type: ignore[method-assign]


async def _serve(options: argparse.Namespace) -> None:
    context = new_context()
    security: StationSecurity | None = None
    authentication: Authentication = NoAuthentication()
    pairs = [new_key_pair(), new_key_pair()]
    if not options.insecure:
        keys, admission = station_keys(options.state), Admission(options.state)
        for pair, name in zip(pairs, ("honest", "hostile"), strict=True):
            admission.admit(pair.public, name)
        security = StationSecurity(keys, Door(context, admission))
        authentication = CurveAuthentication(admission)
    control = open_control_station(context, ANY, security)
    data = open_data_station(context, ANY, security)
    transmitter = open_transmitter(context, ANY, security)
    terms = Terms(model="none", lease_s=3.0, max_message_bytes=SocketOptions().max_message_bytes)
    sessions = Sessions(control, authentication, terms, Host())
    threading.Thread(target=_answer_data, args=(data,), daemon=True).start()
    threading.Thread(target=_end_with_input, daemon=True).start()
    ends: dict[str, Any] = {"control": control, "data": data, "broadcast": transmitter}
    told = {
        "endpoints": {plane: end.endpoint for plane, end in ends.items()},
        "server_key": security.keys.public if security is not None else "",
        "pairs": [[pair.public, pair.secret] for pair in pairs],
    }
    print(json.dumps(told), flush=True)
    await asyncio.gather(sessions.run(), _beat(transmitter))


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def _answer_data(data: Any) -> None:
    def answer(envelope: Envelope) -> None:
        message: Message = envelope.message
        if isinstance(message, Attach):
            exchange.send(envelope.route, Attached(session=message.session))

    exchange = Exchange(data, answer, lambda route: None)
    while True:
        exchange.pump(1.0)


async def _beat(transmitter: Any) -> None:
    while True:
        transmitter.send(Pilot(broadcast=1, sent=0))
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    main()
