"""The base station's control plane: admits devices, places experts, serves their files, watches leases.

Decisions are made elsewhere (`Roster`, `placing`); here they meet the sockets. One event loop owns all of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Protocol

import numpy as np

from wdmoe.backbone.format.bundle import Bundle
from wdmoe.errors import BundleError, TransportError, WdmoeError
from wdmoe.nodes.authentication import Entrance
from wdmoe.nodes.base_station.placement import (
    Arrangement,
    Catalogue,
    Host,
    Wishes,
    arrange,
    holdings,
    knows_link,
    routing,
    wanted,
)
from wdmoe.records import ExpertId
from wdmoe.transport.channel import ControlStation, Envelope
from wdmoe.transport.codec.messages import (
    Attach,
    Attached,
    Chunk,
    Failure,
    Fetch,
    Goodbye,
    Hello,
    Message,
    Ping,
    Place,
    Pong,
    Ready,
    Welcome,
)
from wdmoe.transport.membership import (
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
from wdmoe.transport.routing import Routing

log = logging.getLogger(__name__)

SETTLE_S = 0.4  # devices that join within this time are placed together, so that little is fetched in vain
TICKS_PER_LEASE = 6
MAX_CHUNK_BYTES = 1 << 20
NEEDS_SNR = "this base station shares a band (--bandwidth), so a device must say how strong its link is: --link-snr"


class DataPlane(Protocol):
    """What the control plane asks of the model thread. Thread-safe."""

    def publish(self, table: Routing) -> None:
        """Use this table from now on."""
        ...

    def send(self, route: bytes, message: Message) -> None:
        """Send on a data connection, if it is still there."""
        ...


class ControlPlane:
    """Run `run` until cancelled; call `attached` and `data_gone` on its loop with news from the data plane."""

    def __init__(
        self,
        channel: ControlStation,
        bundle: Bundle,
        entrance: Entrance,
        data: DataPlane,
        *,
        data_port: int,
        lease_s: float,
        max_message_bytes: int,
        wishes: Wishes,
        shares_band: bool = False,
    ) -> None:
        """Nothing is owned. `shares_band`: a device must say how strong its link is."""
        self._channel = channel
        self._bundle = bundle
        self._entrance = entrance
        self._data = data
        self._data_port = data_port
        self._max_message_bytes = max_message_bytes
        self._wishes = wishes
        self._shares_band = shares_band
        self._catalogue = _catalogue(bundle)
        self._known = frozenset(self._catalogue.experts)
        self.roster = Roster(lease_s=lease_s)
        self.arrangement = Arrangement()
        self.routing = Routing()
        self._generation = 0
        self._placing: asyncio.TimerHandle | None = None
        self._outbox: asyncio.Queue[tuple[bytes, Message]] = asyncio.Queue()
        self.lost_devices = 0

    async def run(self) -> None:
        """Serve until cancelled."""
        tasks = [asyncio.create_task(work()) for work in (self._receive, self._watch, self._send)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            if self._placing is not None:
                self._placing.cancel()
            await self._say_goodbye()

    def wanted(self) -> dict[str, set[ExpertId]]:
        """device_id -> experts it shall hold, copies too."""
        return wanted(self._hosts(), self.arrangement)

    # ---- news from the data plane ----

    def attached(self, envelope: Envelope) -> None:
        """A device opened a data connection, or repeats that it did."""
        message = envelope.message
        if isinstance(message, Attach):
            key = self._entrance.identify(envelope, message.session)
            self._apply(
                self.roster.attach(key=key, session=message.session, data_route=envelope.route, now=time.monotonic())
            )

    def data_gone(self, route: bytes) -> None:
        """A data connection is gone."""
        device = self.roster.by_data_route(route)
        if device is not None:
            self._apply(self.roster.detach(key=device.key, data_route=route))

    # ---- the loops ----

    async def _receive(self) -> None:
        while True:
            envelope = await self._channel.receive()
            try:
                await self._handle(envelope)
            except (BundleError, TransportError) as error:
                log.warning("could not serve a message: %s", error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.roster.lease_s / TICKS_PER_LEASE)
            for device in self.roster.live():
                if not self._entrance.is_admitted(device.key):
                    self._apply(self.roster.revoke(key=device.key))
            self._apply(self.roster.tick(now=time.monotonic()))

    async def _send(self) -> None:
        while True:
            route, message = await self._outbox.get()
            try:
                await self._channel.send(route, message)
            except TransportError as error:  # gone or deaf: its lease will end
                log.debug("not sent: %s", error)

    async def _say_goodbye(self) -> None:
        for device in self.roster.live():
            try:
                await self._channel.send(device.route, Goodbye(reason="the base station stops", retry=True))
            except TransportError as error:
                log.debug("no goodbye: %s", error)

    # ---- messages ----

    async def _handle(self, envelope: Envelope) -> None:
        message = envelope.message
        if isinstance(message, Hello):
            self._hello(envelope, message)
            return
        device = self.roster.by_route(envelope.route)
        key = device.key if device is not None else envelope.key
        now = time.monotonic()
        if isinstance(message, Ping):
            self._apply(
                self.roster.ping(
                    key=key,
                    route=envelope.route,
                    now=now,
                    done=message.done,
                    queued=message.queued,
                    rss_bytes=message.rss_bytes,
                )
            )
            if device is not None:
                self._post(envelope.route, Pong(sequence=message.sequence))
        elif isinstance(message, Ready):
            experts = [ExpertId(layer, expert) for layer, expert in message.experts.tolist()]
            self._apply(
                self.roster.ready(
                    key=key, route=envelope.route, generation=message.generation, experts=experts, now=now
                )
            )
        elif isinstance(message, Fetch):
            self._apply(self.roster.heard(key=key, route=envelope.route, now=now))
            if device is not None:
                await self._fetch(device, message)
        elif isinstance(message, Goodbye):
            self._apply(self.roster.goodbye(key=key, route=envelope.route))
        elif isinstance(message, Failure):
            log.warning("%s says: %s", _who(device), message.reason)
        else:
            log.warning("%s sent a %s, which a device never does", _who(device), type(message).__name__)

    def _hello(self, envelope: Envelope, hello: Hello) -> None:
        if self._shares_band and not knows_link(hello.report):
            log.warning("refused %r: it does not say how strong its link is (--link-snr)", hello.report.name)
            self._post(envelope.route, Goodbye(reason=NEEDS_SNR, retry=False))
            return
        if self._entrance.is_enrolment(envelope.key):
            self._enrol(envelope, hello)
            return
        key = self._entrance.identify(envelope, hello.session)
        self._apply(
            self.roster.hello(
                key=key,
                device_id=self._entrance.device_id(key),
                session=hello.session,
                route=envelope.route,
                report=hello.report,
                now=time.monotonic(),
            )
        )

    def _enrol(self, envelope: Envelope, hello: Hello) -> None:
        try:
            self._entrance.enrol(envelope.key, hello.enrol_key, hello.report.name)
        except WdmoeError as error:
            log.warning("refused to enrol %r: %s", hello.report.name, error)
            self._post(envelope.route, Goodbye(reason=str(error), retry=False))
            return
        # Whoever was revoked and now comes with a new token is welcome again.
        self.roster = replace(self.roster, revoked=self.roster.revoked - {hello.enrol_key})
        self._post(envelope.route, Welcome(session=hello.session, enrolled=True))

    async def _fetch(self, device: Device, fetch: Fetch) -> None:
        expert = ExpertId(fetch.layer, fetch.expert)
        if expert not in device.placed or not 0 < fetch.length <= MAX_CHUNK_BYTES:
            self._post(
                device.route, Failure(attempt=0, reason=f"expert {expert} was not placed here, or too much asked")
            )
            return
        size = self._bundle.expert_file(expert).size
        data = await asyncio.to_thread(self._bundle.read_expert, expert, fetch.offset, fetch.length)
        chunk = Chunk(
            layer=fetch.layer,
            expert=fetch.expert,
            offset=fetch.offset,
            total=size,
            data=np.frombuffer(data, np.uint8),
        )
        self._post(device.route, chunk)

    def _post(self, route: bytes, message: Message) -> None:
        self._outbox.put_nowait((route, message))

    # ---- decisions and what follows from them ----

    def _apply(self, outcome: Outcome) -> None:
        self.roster, actions = outcome
        for action in actions:
            self._act(action)
        if any(isinstance(action, (Joined, Lost)) for action in actions):
            self._place_soon()
        if any(isinstance(action, (Changed, Lost)) for action in actions):
            self._rearrange()

    def _act(self, action: Action) -> None:
        if isinstance(action, SendWelcome):
            self._welcome(action)
        elif isinstance(action, SendAttached):
            self._data.send(action.route, Attached(session=action.session))
        elif isinstance(action, SendGoodbye):
            goodbye = Goodbye(reason=action.reason, retry=action.retry)
            if action.plane == "control":
                self._post(action.route, goodbye)
            else:
                self._data.send(action.route, goodbye)
        elif isinstance(action, Joined):
            report = action.device.report
            log.info(
                "%s joined: %s, %s, %.1f GFLOP/s", report.name, report.hardware, report.provider, report.flops / 1e9
            )
        elif isinstance(action, Lost):
            self.lost_devices += 1
            log.warning("lost %s: %s", action.device.report.name, action.reason)

    def _welcome(self, action: SendWelcome) -> None:
        manifest = self._bundle.manifest
        welcome = Welcome(
            session=action.session,
            device_id=action.device_id,
            data_port=self._data_port,
            lease_s=self.roster.lease_s,
            max_message_bytes=self._max_message_bytes,
            model=manifest.model,
            manifest_sha256=manifest.digest,
        )
        self._post(action.route, welcome)
        device = self.roster.by_route(action.route)
        if device is not None and device.generation >= 0:
            self._send_place(device)  # it came over another connection, where the last one may have been lost

    def _place_soon(self) -> None:
        if self._placing is None:
            self._placing = asyncio.get_running_loop().call_later(SETTLE_S, self._place)

    def _place(self) -> None:
        """Choose homes for all experts, now that the devices have changed."""
        self._placing = None
        hosts, before = self._hosts(), self.arrangement
        self.arrangement = arrange(self._catalogue, hosts, before, self._wishes)
        unplaced = self.arrangement.unplaced
        if unplaced and hosts and unplaced != before.unplaced:
            log.warning(
                "%d of %d experts fit on no device; add devices or memory", len(unplaced), len(self._catalogue.experts)
            )
        self._rearrange()

    def _rearrange(self) -> None:
        """Tell devices what to hold where that changed, and publish who serves what."""
        for device_id, experts in holdings(self._hosts(), self.arrangement).items():
            device = next(d for d in self.roster.live() if d.device_id == device_id)
            if device.generation < 0 or device.placed != frozenset(experts):
                self._tell(device, experts)
        self.routing = routing(self._catalogue, self._hosts(), self.arrangement.targets)
        self._data.publish(self.routing)

    def _tell(self, device: Device, experts: tuple[ExpertId, ...]) -> None:
        if not experts and device.generation < 0:
            return  # nothing has been decided for a newcomer yet
        self._generation += 1
        # The roster's news of this is of our own making: `_rearrange` publishes it.
        self.roster, _ = self.roster.place(key=device.key, generation=self._generation, experts=experts)
        self._send_place(self.roster.devices[device.key])

    def _send_place(self, device: Device) -> None:
        # What it is home to comes first: answers need not wait for copies.
        experts = sorted(
            device.placed, key=lambda expert: (self.arrangement.targets.get(expert) != device.device_id, expert)
        )
        files = [self._bundle.expert_file(expert) for expert in experts]
        place = Place(
            generation=device.generation,
            experts=np.array(experts, np.int32).reshape(-1, 2),
            sha256=np.array([list(bytes.fromhex(f.sha256)) for f in files], np.uint8).reshape(-1, 32),
            size=np.array([f.size for f in files], np.int64),
            hidden=self._bundle.manifest.hidden,
        )
        self._post(device.route, place)

    def _hosts(self) -> list[Host]:
        return [
            Host(device_id=d.device_id, report=d.report, ready=d.ready, route=d.data_route) for d in self.roster.live()
        ]


def _catalogue(bundle: Bundle) -> Catalogue:
    files = {file.id: file for file in bundle.manifest.experts}
    return Catalogue(
        experts=tuple(sorted(files)),
        # A CPU unpacks fp16 and int8 to fp32 when it loads them: four bytes for each multiply-add.
        weight_bytes={expert: max(file.size, 2 * file.flops_per_token) for expert, file in files.items()},
        load={expert: float(file.flops_per_token) for expert, file in files.items()},
        experts_per_layer=dict(bundle.manifest.experts_per_layer),
        top_k=bundle.manifest.top_k,
    )


def _who(device: Device | None) -> str:
    return device.report.name if device is not None else "a stranger"
