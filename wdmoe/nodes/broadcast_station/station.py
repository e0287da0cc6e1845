"""The base station of a broadcast: lets devices in, tunes two of them, sends the waveform once, takes pictures back.

async with BroadcastStation(job, settings...) as station:
    audience = await station.run(progress)

One event loop owns all sockets; the encoder computes in a worker thread. Every wait has an end.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from wdmoe.broadcast.codec.blocks import share_of
from wdmoe.errors import ProtocolError, TransportError
from wdmoe.nodes.addresses import data_bind, dial_endpoints
from wdmoe.nodes.authentication import CurveAuthentication
from wdmoe.nodes.broadcast_station.listeners import Audience, Listener
from wdmoe.nodes.broadcast_station.symbol_source import SymbolSource
from wdmoe.nodes.device.broadcast_receiver import DECODER
from wdmoe.nodes.join_token_file import JoinTokenFile
from wdmoe.nodes.sessions import Host, ServedFile, Sessions, Terms
from wdmoe.tasks import OpenedInSteps, in_thread, run_until_first
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.messages import (
    Failure,
    Fetch,
    Message,
    Pilot,
    Rows,
    Shown,
    Symbols,
    Tune,
    Tuned,
)
from wdmoe.transport.membership import Device
from wdmoe.transport.security.station_state import make_or_open_state
from wdmoe.transport.security.zap import Door
from wdmoe.transport.zmq.channels import open_control_station
from wdmoe.transport.zmq.pubsub import open_transmitter
from wdmoe.transport.zmq.sockets import SocketOptions, StationSecurity, new_context

log = logging.getLogger(__name__)

BATCH = 32  # blocks in a message, and encoded at once
PILOT_S = 0.25
STUCK_S = 60.0  # without progress: the decoder's download, or rows that come back
JOIN_FILE = "broadcast-token"  # in the state folder, which may be that of a base station
JOIN_USES = 16  # two devices listen; others may wait for the next broadcast
MODEL_NAME = "semantic broadcast"
_LOOK_S = 0.05

Progress: TypeAlias = Callable[[str, float], None]  # (what is going on, how much of it is done)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is sent."""

    source: SymbolSource
    decoder: bytes
    decoder_sha256: str
    fades: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a station stands."""

    bind: str
    state: Path
    advertise: str = ""
    names: tuple[str, str] = ("", "")  # of the devices that shall be user 1 and 2; "": in the order of joining
    lease_s: float = 5.0
    wait_s: float = 120.0  # for devices to join


class BroadcastStation(OpenedInSteps, Host):
    """One broadcast. At the end it says goodbye to the devices.

    Raises (from `async with`):
        ConfigError: the state folder or a key file cannot be used.
        TransportError: an address cannot be bound.
    """

    def __init__(self, job: Job, site: Site) -> None:
        super().__init__()
        self._job, self._site = job, site
        self._plan = job.source.plan
        self._number = secrets.randbits(64)
        self.audience = Audience(self._plan.grids, site.names)
        self.bytes_on_air = 0
        self._sent = 0  # blocks

    @property
    def join_text(self) -> str:
        """A join token, which `join_file` holds too."""
        return self._join_token.renew()

    @property
    def join_file(self) -> Path:
        """Where the join token lies."""
        return self._join_token.path

    async def run(self, progress: Progress, *beside: Coroutine[Any, Any, None]) -> None:
        """Do all of it; `audience` says how it went. A bug in one of the loops comes out here.

        Args:
            progress: told all the while.
            beside: runs on meanwhile, without an end of its own.
        Raises:
            TransportError: the devices did not join in time.
            BundleError: the model gives no symbols.
        """
        await run_until_first(self._steps(progress), self._sessions.run(), self._beat(), *beside)

    # ---- the steps

    async def _steps(self, progress: Progress) -> None:
        await self._gather(progress)
        await self._tune(progress)
        await self._transmit(progress)
        await self._collect(progress)

    async def _gather(self, progress: Progress) -> None:
        """Wait for two devices."""
        until_s = time.monotonic() + self._site.wait_s
        while self.audience.waits_for("awaited"):
            missing = self.audience.seat(self._sessions.roster.live(), time.monotonic())
            progress("waiting for devices", 1 - missing / 2)
            if missing and time.monotonic() > until_s:
                raise TransportError(f"{missing} of 2 devices did not join within {self._site.wait_s:.0f} s")
            await asyncio.sleep(_LOOK_S)

    async def _tune(self, progress: Progress) -> None:
        """Tell both what to hear, until they do."""
        next_s = 0.0
        while self.audience.waits_for("tuning"):
            now_s = time.monotonic()
            progress("tuning in", sum(each.state != "tuning" for each in self.audience) / 2)
            if now_s >= next_s:
                next_s = now_s + 4 * PILOT_S
                for each in self.audience:
                    if each.state == "tuning" and (device := self._sessions.roster.devices.get(each.key)) is not None:
                        self._sessions.post(device.route, self._tune_of(each))
            self.audience.lose_stuck("tuning", now_s, STUCK_S)
            await asyncio.sleep(_LOOK_S)

    async def _transmit(self, progress: Progress) -> None:
        """Send each block once."""
        source, blocks = self._job.source, self._plan.blocks
        while self._sent < blocks and self.audience.open:
            first, last = self._sent, min(self._sent + BATCH, blocks)
            symbols = await in_thread(lambda: source.symbols(first, last))  # noqa: B023
            message = Symbols(broadcast=self._number, first=first, symbols=symbols)
            self.bytes_on_air += self._transmitter.send(message)
            self._sent = last
            progress("sending", last / blocks)
            await asyncio.sleep(0)  # a bar and a signal get their turn also where encoding takes no time
        for each in self.audience:
            each.moved_s = time.monotonic()

    async def _collect(self, progress: Progress) -> None:
        """Wait for the pictures."""
        while self.audience.open:
            done = [each.rows / each.grid.height if each.state != "lost" else 1.0 for each in self.audience]
            progress("receiving", sum(done) / 2)
            self.audience.lose_stuck("listening", time.monotonic(), STUCK_S)
            await asyncio.sleep(_LOOK_S)

    def _tune_of(self, listener: Listener) -> Tune:
        job = self._job
        return Tune(
            broadcast=self._number,
            port=int(self._transmitter.endpoint.rsplit(":", 1)[1]),
            user=listener.user,
            blocks=self._plan.blocks,
            shared=self._plan.shared,
            uses=job.source.uses,
            height=listener.grid.height,
            width=listener.grid.width,
            share=share_of(listener.user, job.source.alpha),
            snr_db=job.source.snr_db[listener.user],
            fades=job.fades,
            seed=job.seed,
            decoder_sha256=job.decoder_sha256,
            decoder_bytes=len(job.decoder),
        )

    async def _beat(self) -> None:
        """Pilots, all the while."""
        while True:
            self._transmitter.send(Pilot(broadcast=self._number, sent=self._sent))
            await asyncio.sleep(PILOT_S)

    # ---- opening

    async def _open(self) -> None:
        context = new_context()
        self._stack.callback(context.term)
        state = self._state = make_or_open_state(self._site.state)
        door = Door(context, state.admission)
        self._stack.callback(door.close)
        security = StationSecurity(state.keys, door)
        channel = open_control_station(context, self._site.bind, security)
        self._stack.callback(channel.close)
        air = data_bind(channel.endpoint, self._site.bind, 0)
        self._transmitter = open_transmitter(context, air, security)
        self._stack.callback(self._transmitter.close)
        self._endpoints = dial_endpoints(channel.endpoint, self._site.advertise)
        file = self._site.state / JOIN_FILE
        self._join_token = JoinTokenFile(file, state.admission, state.keys, self._endpoints, JOIN_USES)
        terms = Terms(model=MODEL_NAME, lease_s=self._site.lease_s, max_message_bytes=SocketOptions().max_message_bytes)
        self._sessions = Sessions(channel, CurveAuthentication(state.admission), terms, self)
        self._stack.push_async_callback(self._sessions.say_goodbye, "the broadcast is over")

    # ---- what this station adds to its sessions

    def file(self, device: Device, fetch: Fetch) -> ServedFile | None:
        """The decoder."""
        if (fetch.layer, fetch.expert) != DECODER:
            return None
        if (listener := self.audience.of_key(device.key)) is not None:
            listener.moved_s = time.monotonic()
        data = self._job.decoder
        return ServedFile(size=len(data), read=lambda offset, length: data[offset : offset + length])

    def lost(self, device: Device, reason: str) -> None:
        """Its user sees nothing more."""
        if (listener := self.audience.of_key(device.key)) is not None:
            listener.lose(f"its device was lost: {reason}")

    def other(self, envelope: Envelope, device: Device | None) -> None:
        """What a device says about the broadcast."""
        now_s = time.monotonic()
        self._sessions.apply(self._sessions.roster.heard(key=envelope.key, route=envelope.route, now=now_s))
        if device is not None and (listener := self.audience.of_key(device.key)) is not None:
            self._heed(listener, envelope.message, now_s)

    def _heed(self, listener: Listener, message: Message, now_s: float) -> None:
        """What a listener says about this broadcast. One that breaks the rules is given up."""
        try:
            if isinstance(message, Failure) and message.attempt == self._number:
                listener.lose(f"its device says: {message.reason}")
            elif isinstance(message, (Tuned, Rows, Shown)) and message.broadcast == self._number:
                if isinstance(message, Tuned):
                    listener.tuned(now_s)
                elif isinstance(message, Rows):
                    listener.take_rows(message, now_s)
                else:
                    listener.take_shown(message)
        except ProtocolError as error:
            listener.lose(f"its device sent {error}")
