"""The conversation of a station with its devices on the control channel: from Hello to Goodbye.

The base station of a model and that of a broadcast hold the same conversation. What differs comes in as a `Host`.
Decisions are made by the `Roster`; here they meet the socket. One event loop owns all of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wdmoe.errors import BundleError, ProtocolError, RefusedError, TransportError, WdmoeError
from wdmoe.nodes.authentication import Authentication
from wdmoe.nodes.outbox import Outbox
from wdmoe.tasks import run_together
from wdmoe.transport.channel import ControlStation, Envelope
from wdmoe.transport.codec.messages import Attached, Chunk, Failure, Fetch, Goodbye, Hello, Message, Ping, Pong, Welcome
from wdmoe.transport.membership import (
    REVOKED,
    Action,
    Changed,
    Device,
    Joined,
    Lost,
    Outcome,
    Roster,
    SendAttached,
    SendGoodbye,
    SendWelcome,
)

log = logging.getLogger(__name__)

TICKS_PER_LEASE = 6
MAX_CHUNK_BYTES = 1 << 20
KEYS_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What every Welcome says about this station."""

    model: str
    lease_s: float
    max_message_bytes: int
    data_port: int = 0  # 0: there is no data plane
    manifest_sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedFile:
    """A file that a device may fetch. `read` (offset, length) may block: it runs in a worker thread."""

    size: int
    read: Callable[[int, int], bytes]


class Host:
    """What a station adds to the conversation. Every method may be left as it is.

    The methods run on the event loop, after the roster has taken in what happened.
    """

    def refuses(self, hello: Hello) -> str:
        """Why this device cannot take part here; "" if it can."""
        return ""

    def file(self, device: Device, fetch: Fetch) -> ServedFile | None:
        """The file that a device asks for; None if it has no right to it."""
        return None

    def welcomed(self, device: Device) -> None:
        """A Welcome is on its way to this device, the first or another one."""

    def joined(self, device: Device) -> None:
        """A session became live."""

    def lost(self, device: Device, reason: str) -> None:
        """A session ended."""

    def changed(self) -> None:
        """What devices can serve is not what it was."""

    def other(self, envelope: Envelope, device: Device | None) -> None:
        """Any other message; `device` is the live one on this connection."""

    def send_data(self, route: bytes, message: Message) -> None:
        """Send on a data connection, if it is still there."""


class Sessions:
    """Run `run` until cancelled. `roster` says who takes part."""

    def __init__(self, channel: ControlStation, authentication: Authentication, terms: Terms, host: Host) -> None:
        """Nothing is owned."""
        self._channel = channel
        self._authentication = authentication
        self._terms = terms
        self._host = host
        self._outbox = Outbox()
        self.roster = Roster(lease_s=terms.lease_s)

    async def run(self) -> None:
        """Serve until cancelled."""
        await run_together(self._receive(), self._watch(), self._watch_keys(), self._send())

    async def say_goodbye(self, reason: str) -> None:
        """Send every device away, to come back when it likes. Call when `run` has ended."""
        for device in self.roster.live():
            await self._send_now(device.route, Goodbye(reason=reason, retry=True))

    def post(self, route: bytes, message: Message) -> None:
        """Send soon. A device that is gone or deaf misses it: its lease will end."""
        self._outbox.put(route, message)

    def apply(self, outcome: Outcome) -> None:
        """Take over the roster of an event and do what follows from it: first what is sent, then what the host does."""
        self.roster, actions = outcome
        for action in actions:
            self._tell(action)
        for action in actions:
            if isinstance(action, Joined):
                self._host.joined(action.device)
            elif isinstance(action, Lost):
                self._host.lost(action.device, action.reason)
        if any(isinstance(action, (Changed, Lost)) for action in actions):
            self._host.changed()

    def adopt(self, outcome: Outcome) -> None:
        """Take over the roster of an event of the caller's own making, who does the rest."""
        self.roster, _ = outcome

    # ---- the loops

    async def _receive(self) -> None:
        while True:
            envelope = await self._channel.receive()
            try:
                await self._handle(envelope)
            except (BundleError, TransportError) as error:
                log.warning("could not serve a message: %s", error)

    async def _watch(self) -> None:
        """Leases."""
        while True:
            await asyncio.sleep(self._terms.lease_s / TICKS_PER_LEASE)
            self.apply(self.roster.tick(now=time.monotonic()))

    async def _watch_keys(self) -> None:
        """Keys that are revoked."""
        while True:
            await asyncio.sleep(KEYS_LOOK_S)
            for device in self.roster.live():
                if self._authentication.is_revoked(device.key):
                    self.apply(self.roster.revoke(key=device.key))

    async def _send(self) -> None:
        while True:
            await self._send_now(*await self._outbox.get())

    async def _send_now(self, route: bytes, message: Message) -> None:
        try:
            await self._channel.send(route, message)
        except TransportError as error:  # gone or deaf: its lease will end
            log.debug("not sent: %s", error)
        except ProtocolError as error:  # a bug of ours; the others are served on
            log.error("could not say %s: %s", type(message).__name__, error)

    # ---- messages

    async def _handle(self, envelope: Envelope) -> None:
        message, route = envelope.message, envelope.route
        if isinstance(message, Hello):
            self._hello(envelope, message)
            return
        device = self.roster.by_route(route)
        key = device.key if device is not None else envelope.key
        now = time.monotonic()
        if isinstance(message, Ping):
            self._ping(key, route, message, now)
        elif isinstance(message, Fetch):
            self.apply(self.roster.heard(key=key, route=route, now=now))
            if device is not None:
                await self._fetch(device, message)
        elif isinstance(message, Goodbye):
            self.apply(self.roster.goodbye(key=key, route=route))
        else:
            self._host.other(envelope, device)

    def _hello(self, envelope: Envelope, hello: Hello) -> None:
        if reason := self._host.refuses(hello):
            log.warning("refused %r: %s", hello.report.name, reason)
            self.post(envelope.route, Goodbye(reason=reason, retry=False))
            return
        if self._authentication.is_enrolment(envelope.key):
            self._enrol(envelope, hello)
            return
        key = self._authentication.identify(envelope, hello.session)
        if self._authentication.is_revoked(key):
            self.post(envelope.route, Goodbye(reason=REVOKED, retry=False))
            return
        self.apply(
            self.roster.hello(
                key=key,
                device_id=self._authentication.device_id(key),
                session=hello.session,
                route=envelope.route,
                report=hello.report,
                now=time.monotonic(),
            )
        )

    def _enrol(self, envelope: Envelope, hello: Hello) -> None:
        try:
            self._authentication.enrol(envelope.key, hello.enrol_key, hello.report.name)
        except RefusedError as error:
            log.warning("refused to enrol %r: %s", hello.report.name, error)
            self.post(envelope.route, Goodbye(reason=str(error), retry=False))
            return
        except WdmoeError as error:  # a full disk, no descriptor left: no fault of the device
            log.error("could not enrol %r: %s", hello.report.name, error)
            self.post(envelope.route, Goodbye(reason="it cannot enrol devices now", retry=True))
            return
        self.post(envelope.route, Welcome(session=hello.session, enrolled=True))

    def _ping(self, key: str, route: bytes, ping: Ping, now: float) -> None:
        figures = {"done": ping.done, "queued": ping.queued, "rss_bytes": ping.rss_bytes}
        self.apply(self.roster.ping(key=key, route=route, now=now, **figures))
        if self.roster.by_route(route) is not None:
            self.post(route, Pong(sequence=ping.sequence))

    async def _fetch(self, device: Device, fetch: Fetch) -> None:
        file = self._host.file(device, fetch) if 0 < fetch.length <= MAX_CHUNK_BYTES else None
        if file is None:
            expert = f"expert {fetch.expert} of layer {fetch.layer}"
            self.post(device.route, Failure(attempt=0, reason=f"{expert} was not placed here, or too much asked"))
            return
        offset = min(fetch.offset, file.size)
        data = np.frombuffer(await asyncio.to_thread(file.read, offset, fetch.length), np.uint8)
        chunk = Chunk(layer=fetch.layer, expert=fetch.expert, offset=offset, total=file.size, data=data)
        self.post(device.route, chunk)

    # ---- what is sent because of the roster

    def _tell(self, action: Action) -> None:
        if isinstance(action, SendWelcome):
            self._welcome(action)
        elif isinstance(action, SendAttached):
            self._host.send_data(action.route, Attached(session=action.session))
        elif isinstance(action, SendGoodbye):
            goodbye = Goodbye(reason=action.reason, retry=action.retry)
            send = self.post if action.plane == "control" else self._host.send_data
            send(action.route, goodbye)

    def _welcome(self, action: SendWelcome) -> None:
        terms = self._terms
        welcome = Welcome(
            session=action.session,
            device_id=action.device_id,
            data_port=terms.data_port,
            lease_s=terms.lease_s,
            max_message_bytes=terms.max_message_bytes,
            model=terms.model,
            manifest_sha256=terms.manifest_sha256,
        )
        self.post(action.route, welcome)
        device = self.roster.by_route(action.route)
        if device is not None:
            self._host.welcomed(device)
