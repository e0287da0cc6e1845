"""The base station's control plane: its devices' sessions, and which experts they hold.

Decisions are made elsewhere (`placement`); here they meet the sessions. One event loop owns all of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from wdmoe.backbone.format.bundle import Bundle
from wdmoe.nodes.authentication import Authentication
from wdmoe.nodes.base_station.catalogue import Arrangement, Catalogue, Holder, Wishes
from wdmoe.nodes.base_station.copies import to_fill
from wdmoe.nodes.base_station.device_speeds import speeds_now
from wdmoe.nodes.base_station.placement import arrange, holdings, knows_link, routing, wanted
from wdmoe.nodes.sessions import Host, ServedFile, Sessions, Terms
from wdmoe.records import ExpertId
from wdmoe.tasks import run_together
from wdmoe.transport.channel import ControlStation, Envelope
from wdmoe.transport.codec.messages import Attach, Failure, Fetch, Hello, Message, Place, Ready
from wdmoe.transport.membership import Device, Roster
from wdmoe.transport.routing import Routing

log = logging.getLogger(__name__)

SETTLE_S = 0.4  # devices that join within this time are placed together, so that little is fetched in vain
TOGETHER_S = 0.05  # changes within this time are taken in together: a large fleet that loads has hundreds a second
LOOK_EVERY_S = 1.0
LOADING_S = 30.0  # who takes longer to load what it was told holds up nobody else
NEEDS_SNR = "this base station shares a band (--bandwidth), so a device must say how strong its link is: --link-snr"


class DataPlane(Protocol):
    """What the control plane asks of the model thread. Thread-safe."""

    def publish(self, table: Routing) -> None:
        """Use this table from now on."""
        ...

    def send(self, route: bytes, message: Message) -> None:
        """Send on a data connection, if it is still there."""
        ...

    def speeds(self) -> Mapping[str, float]:
        """device_id -> how fast it computed while it served, against the median device."""
        ...


class ControlPlane(Host):
    """Run `run` until cancelled; call `attached` and `data_gone` on its loop with news from the data plane."""

    def __init__(
        self,
        channel: ControlStation,
        bundle: Bundle,
        authentication: Authentication,
        data: DataPlane,
        *,
        data_port: int,
        lease_s: float,
        max_message_bytes: int,
        wishes: Wishes,
        shares_band: bool = False,
        barred: frozenset[str] = frozenset(),
    ) -> None:
        """Nothing is owned.

        Args:
            shares_band: a device must say how strong its link is.
            barred: device ids that get no experts from the start, see `bar`.
        """
        terms = Terms(
            model=bundle.manifest.model,
            lease_s=lease_s,
            max_message_bytes=max_message_bytes,
            data_port=data_port,
            manifest_sha256=bundle.manifest.digest,
        )
        self._sessions = Sessions(channel, authentication, terms, self)
        self._bundle = bundle
        self._authentication = authentication
        self._data = data
        self._wishes = wishes
        self._shares_band = shares_band
        self._catalogue = _catalogue(bundle)
        self.arrangement = Arrangement()
        self.routing = Routing()
        self._generation = 0
        self._placing: asyncio.TimerHandle | None = None
        self._rearranging: asyncio.TimerHandle | None = None
        self._rearranged_s = 0.0
        self._told_s: dict[str, float] = {}  # device_id -> when its last Place went out
        self._speeds: dict[str, float] = {}
        self.lost_devices = 0
        self.barred = barred

    @property
    def roster(self) -> Roster:
        """Who takes part now."""
        return self._sessions.roster

    async def run(self) -> None:
        """Serve until cancelled; then say goodbye."""
        try:
            await run_together(self._sessions.run(), self._look())
        finally:
            for timer in (self._placing, self._rearranging):
                if timer is not None:
                    timer.cancel()
            await self._sessions.say_goodbye("the base station stops")

    def wanted(self) -> dict[str, set[ExpertId]]:
        """device_id -> experts it shall hold, copies too."""
        return wanted(self._holders(), self.arrangement)

    # ---- news from the data plane ----

    def attached(self, envelope: Envelope) -> None:
        """A device opened a data connection, or repeats that it did."""
        message = envelope.message
        if isinstance(message, Attach):
            key = self._authentication.identify(envelope, message.session)
            now = time.monotonic()
            self._sessions.apply(
                self.roster.attach(key=key, session=message.session, data_route=envelope.route, now=now)
            )

    def data_gone(self, route: bytes) -> None:
        """A data connection is gone."""
        device = self.roster.by_data_route(route)
        if device is not None:
            self._sessions.apply(self.roster.detach(key=device.key, data_route=route))

    def bar(self, device_id: str) -> None:
        """Give a device no experts any more, whatever connection it comes over: it answered wrong. Others take over.

        Its session stays, so that it shows in the status. A new command forgets this.
        """
        self.barred |= {device_id}
        self._place_soon()
        self._rearrange()

    # ---- what this station adds to its sessions ----

    def refuses(self, hello: Hello) -> str:
        """A shared band needs to know each link."""
        return NEEDS_SNR if self._shares_band and not knows_link(hello.report) else ""

    def file(self, device: Device, fetch: Fetch) -> ServedFile | None:
        """An expert that was placed on this device."""
        expert = ExpertId(fetch.layer, fetch.expert)
        if expert not in device.placed:
            return None
        size = self._bundle.expert_file(expert).size
        return ServedFile(size=size, read=lambda offset, length: self._bundle.read_expert(expert, offset, length))

    def welcomed(self, device: Device) -> None:
        """It came over another connection, where its last Place may have been lost."""
        if device.generation >= 0:
            self._send_place(device)

    def joined(self, device: Device) -> None:
        """It gets experts soon."""
        report = device.report
        log.info("%s joined: %s, %s, %.1f GFLOP/s", report.name, report.hardware, report.provider, report.flops / 1e9)
        self._place_soon()

    def lost(self, device: Device, reason: str) -> None:
        """Others take over its experts soon."""
        self.lost_devices += 1
        log.warning("lost %s: %s", device.report.name, reason)
        self._place_soon()

    def changed(self) -> None:
        """Others serve what this device served, or it serves more."""
        if self._rearranging is None:
            wait_s = max(0.0, self._rearranged_s + TOGETHER_S - time.monotonic())
            self._rearranging = asyncio.get_running_loop().call_later(wait_s, self._rearrange)

    def other(self, envelope: Envelope, device: Device | None) -> None:
        """Ready, and what is only worth a line in the log."""
        message = envelope.message
        name = device.report.name if device is not None else "a stranger"
        if isinstance(message, Ready):
            key = device.key if device is not None else envelope.key
            self._sessions.apply(
                self.roster.ready(
                    key=key,
                    route=envelope.route,
                    generation=message.generation,
                    experts=[ExpertId(layer, expert) for layer, expert in message.experts.tolist()],
                    now=time.monotonic(),
                )
            )
        elif isinstance(message, Failure):
            log.warning("%s says: %s", name, message.reason)
        else:
            log.warning("%s sent a %s, which a device never does", name, type(message).__name__)

    def send_data(self, route: bytes, message: Message) -> None:
        """See `DataPlane`."""
        self._data.send(route, message)

    # ---- which device holds what ----

    def _place_soon(self) -> None:
        if self._placing is None:
            self._placing = asyncio.get_running_loop().call_later(SETTLE_S, self._place)

    def _place(self) -> None:
        """Choose homes for all experts, now that the devices have changed."""
        self._placing = None
        hosts, before = self._measured(self._holders()), self.arrangement
        self.arrangement = arrange(self._catalogue, hosts, before, self._wishes)
        unplaced = self.arrangement.unplaced
        if unplaced and hosts and unplaced != before.unplaced:
            log.warning(
                "%d of %d experts fit on no device; add devices or memory", len(unplaced), len(self._catalogue.experts)
            )
        self._rearrange()

    def _rearrange(self) -> None:
        """Tell devices what to hold where that changed, and publish who serves what."""
        if self._rearranging is not None:
            self._rearranging.cancel()
            self._rearranging = None
        self._rearranged_s = time.monotonic()
        hosts, live = self._holders(), {device.device_id: device for device in self.roster.live()}
        filled = to_fill(hosts, self.arrangement.further, self._loading())
        for device_id, experts in holdings(hosts, self.arrangement, filled).items():
            device = live[device_id]
            if device.generation < 0 or device.placed != frozenset(experts):
                self._tell(device, experts)
        self._publish()

    def _loading(self) -> int:
        """How many devices have not loaded yet what they were told lately."""
        long_ago_s = time.monotonic() - LOADING_S
        return sum(d.ready != d.placed and self._told_s.get(d.device_id, 0) > long_ago_s for d in self.roster.live())

    def _publish(self) -> None:
        targets, copies = self.arrangement.targets, self.arrangement.copies
        self.routing = routing(self._catalogue, self._holders(), targets, copies)
        self._data.publish(self.routing)

    async def _look(self) -> None:
        """See now and then whether another device may load its further copies."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if to_fill(self._holders(), self.arrangement.further, self._loading()):
                self._rearrange()

    def _tell(self, device: Device, experts: tuple[ExpertId, ...]) -> None:
        if not experts and device.generation < 0:
            return  # nothing has been decided for a newcomer yet
        self._generation += 1
        self._told_s[device.device_id] = time.monotonic()
        # The roster's news of this is of our own making: `_rearrange` publishes it.
        self._sessions.adopt(self.roster.place(key=device.key, generation=self._generation, experts=experts))
        self._send_place(self.roster.devices[device.key])

    def _send_place(self, device: Device) -> None:
        # What it is home to comes first: answers need not wait for copies, and further ones wait for standbys.
        standby = self.arrangement.copies.get(device.device_id, frozenset())
        targets = self.arrangement.targets
        experts = sorted(device.placed, key=lambda e: (targets.get(e) != device.device_id, e not in standby, e))
        files = [self._bundle.expert_file(expert) for expert in experts]
        place = Place(
            generation=device.generation,
            experts=np.array(experts, np.int32).reshape(-1, 2),
            sha256=np.array([list(bytes.fromhex(f.sha256)) for f in files], np.uint8).reshape(-1, 32),
            size=np.array([f.size for f in files], np.int64),
            hidden=self._bundle.manifest.hidden,
        )
        self._sessions.post(device.route, place)

    def _holders(self) -> list[Holder]:
        return [
            Holder(device_id=d.device_id, report=d.report, ready=d.ready, placed=d.placed, route=d.data_route)
            for d in self.roster.live()
            if d.device_id not in self.barred
        ]

    def _measured(self, hosts: list[Holder]) -> list[Holder]:
        """With the speeds that devices showed in place of those that they say."""
        reported = {host.device_id: host.report.flops for host in hosts}
        self._speeds = speeds_now(reported, self._data.speeds(), self._speeds)
        return [replace(h, report=replace(h.report, flops=self._speeds[h.device_id])) for h in hosts]


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
