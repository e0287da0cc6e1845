"""The base station: opens the sockets, loads attention and gate, starts the two planes, and ends them in order.

async with BaseStation(settings) as station:
    print(station.join_text)
    await station.run()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wdmoe.backbone.format.bundle import Bundle
from wdmoe.backbone.runtime.engine import Backbone, Engine
from wdmoe.backbone.runtime.model_thread import ModelThread
from wdmoe.config import StationSettings
from wdmoe.errors import ConfigError, TransportError, WdmoeError
from wdmoe.moe.layer import ExpertLayers
from wdmoe.moe.verification.inspector import Inspector
from wdmoe.nodes.addresses import data_bind, dial_endpoints, remember_endpoints
from wdmoe.nodes.authentication import Authentication, CurveAuthentication, NoAuthentication
from wdmoe.nodes.base_station.backbone import most_active, open_backbone, room_bytes
from wdmoe.nodes.base_station.catalogue import Wishes
from wdmoe.nodes.base_station.control_plane import ControlPlane
from wdmoe.nodes.base_station.layer_rules import layer_rules
from wdmoe.nodes.base_station.status import describe
from wdmoe.nodes.base_station.verification import norm_band, open_verifier
from wdmoe.nodes.join_token_file import JoinTokenFile
from wdmoe.records import ExpertId
from wdmoe.solver.placement.file import read_placement, write_placement
from wdmoe.tasks import OpenedInSteps, run_until_first
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.messages import Message
from wdmoe.transport.exchange import Exchange
from wdmoe.transport.routing import DeviceRoute, Routing
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.station_state import make_or_open_state
from wdmoe.transport.security.zap import Door
from wdmoe.transport.zmq.channels import open_control_station, open_data_station
from wdmoe.transport.zmq.sockets import SocketOptions, StationSecurity, new_context

log = logging.getLogger(__name__)

MOST_TRACED_TOKENS = 32_768  # some 35 MB with the default model, ten times that with 64 experts a layer
SWITCH_INTERVAL_S = 0.0005  # the model thread must get the GIL back soon after the network woke it


class BaseStation(OpenedInSteps):
    """One running base station. `engine` answers requests once devices serve the experts.

    At the end it stops taking work, ends what runs and says goodbye to the devices.

    Raises (from `async with`):
        BundleError: the bundle cannot be used.
        ConfigError: a setting, key file or placement file cannot be used.
        TransportError: an address cannot be bound.
    """

    engine: Engine

    def __init__(
        self,
        settings: StationSettings,
        *,
        barred: frozenset[str] = frozenset(),
        on_barred: Callable[[str], None] = lambda device_id: None,
    ) -> None:
        """Nothing is opened yet.

        Args:
            settings: of the station.
            barred: ids of devices that get no experts: they lied to the station before this one.
            on_barred: told of each one that follows, on the loop.
        """
        super().__init__()
        self._settings = settings
        self._barred_before = barred
        self._on_barred = on_barred
        self._options = SocketOptions()
        self._routing = Routing()

    async def run(self) -> None:
        """Serve until cancelled, with a join token ready; a bug in the control plane comes out here."""
        if self._join_file is None:
            await asyncio.shield(self._control_task)
        else:
            await run_until_first(asyncio.wait([self._control_task]), self._join_file.keep())
            self._control_task.result()

    async def wait_until_served(self, timeout_s: float) -> None:
        """Wait until every expert is served by some device.

        Raises:
            TransportError: not within `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        while len(self._routing.complete) < len(self.bundle.manifest.moe_layers):
            if time.monotonic() > until:
                raise TransportError(
                    f"after {timeout_s:.0f} s only {len(self._routing.complete)} of "
                    f"{len(self.bundle.manifest.moe_layers)} layers have all their experts on devices"
                )
            await asyncio.sleep(0.02)

    async def leave(self) -> None:
        """Say goodbye to the devices and talk to them no more. They look for another base station then."""
        await self._end_control()

    @property
    def control_port(self) -> int:
        """Where devices dial first."""
        return _port(self._control_channel.endpoint)

    @property
    def data_port(self) -> int:
        """Where expert traffic goes."""
        return _port(self._data.endpoint)

    @property
    def join_text(self) -> str:
        """What a device needs to join: a token, which is kept in a file too, or the plain address if insecure."""
        return self.endpoints[0] if self._join_file is None else self._join_file.renew()

    def serve_by(self, settings: StationSettings, *, rehearsal: bool = False) -> None:
        """Serve by other rules from the next pass on; of `settings` only what `layer_rules` reads may have changed.

        Args:
            rehearsal: see `LayerRules`.
        Raises:
            ConfigError: no layer is left for the policy.
        """
        rules = layer_rules(settings, self.bundle.manifest)
        self.layers.rules = replace(rules, rehearsal=rehearsal)
        self._exchange.post(self._backbone.forget)  # what other rules computed
        self.engine.policy = settings.policy
        self._settings = settings

    def placement_text(self) -> str:
        """Who shall hold what now, as a placement file."""
        names = {device.device_id: device.report.name for device in self.control.roster.live()}
        return write_placement({names[at]: tuple(experts) for at, experts in self.control.wanted().items()})

    # ---- opening, in the order of need ----

    async def _open(self) -> None:
        settings = self._settings
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._stack.callback(sys.setswitchinterval, interval_s)
        self.bundle = await asyncio.to_thread(Bundle.open, settings.bundle)
        rules = layer_rules(settings, self.bundle.manifest)
        pinned = self._read_placement()
        if (trace := settings.record_trace) is not None and not trace.parent.is_dir():
            raise ConfigError(f"--record-trace {trace}: there is no folder {trace.parent}")
        self._open_sockets()
        self._exchange = Exchange(self._data, self._data_news, self._data_gone)
        self.layers = ExpertLayers(self._exchange, lambda: self._routing, rules, self._open_inspector())
        self._backbone, self._why = await asyncio.to_thread(
            open_backbone, self.bundle, settings, self.layers.run, self._exchange
        )
        self._record(self._backbone)
        self._start_control(pinned)
        self._start_engine(self._backbone)

    def _open_inspector(self) -> Inspector:
        verifier = open_verifier(self.bundle, self._exchange.post)
        self._stack.push_async_callback(asyncio.to_thread, verifier.close)
        return Inspector(
            norm_band(self.bundle),
            verifier,
            rate=self._settings.verify,
            barred=self._barred,
            quarantined=self._barred_before,
        )

    def _start_control(self, pinned: Mapping[str, frozenset[ExpertId]]) -> None:
        settings = self._settings
        shares_band = settings.bandwidth_hz > 0
        choosy = settings.policy != "topk" or shares_band
        self.control = ControlPlane(
            self._control_channel,
            self.bundle,
            self._authentication,
            self,
            data_port=self.data_port,
            lease_s=settings.lease_s,
            max_message_bytes=self._options.max_message_bytes,
            wishes=Wishes(pinned=pinned, copies=settings.copies, choosy=choosy),
            shares_band=shares_band,
            barred=self._barred_before,
        )
        self._loop = asyncio.get_running_loop()
        self._control_task = asyncio.create_task(self.control.run())
        self._stack.push_async_callback(self._end_control)

    def _start_engine(self, backbone: Backbone) -> None:
        settings = self._settings
        thread = ModelThread(
            self._exchange,
            max_active=most_active(backbone, settings),
            max_waiting=settings.max_queued,
            room_bytes=room_bytes(settings),
            at_work=backbone.at_work,
        )
        self.engine = Engine(backbone, thread, self.overview, policy=settings.policy)
        thread.start()
        self._stack.push_async_callback(asyncio.to_thread, thread.stop)

    def _open_sockets(self) -> None:
        settings, options = self._settings, self._options
        context = new_context()
        self._stack.callback(context.term)
        security: StationSecurity | None = None
        self.admission: Admission | None = None
        self._join_file: JoinTokenFile | None = None
        self._authentication: Authentication = NoAuthentication()
        if settings.insecure:
            log.warning("no encryption: anyone on this network may read, inject and join")
        else:
            state = make_or_open_state(settings.state)
            self.admission = state.admission
            door = Door(context, self.admission)
            self._stack.callback(door.close)
            security = StationSecurity(state.keys, door)
            self._authentication = CurveAuthentication(self.admission)
        self._control_channel = open_control_station(context, settings.bind, security, options)
        self._stack.callback(self._control_channel.close)
        bind = data_bind(self._control_channel.endpoint, settings.bind, settings.data_port)
        self._data = open_data_station(context, bind, security, options)
        self._stack.callback(self._data.close)
        self.endpoints = dial_endpoints(self._control_channel.endpoint, settings.advertise)
        if self.admission is not None:
            remember_endpoints(settings.state, self.endpoints)
            self._join_file = JoinTokenFile(
                settings.join_file, self.admission, state.keys, self.endpoints, settings.join_uses
            )

    async def _end_control(self) -> None:
        self._control_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._control_task

    def _record(self, backbone: Any) -> None:
        """Listen to the gates from now on, and save what they said once the model thread has ended."""
        file = self._settings.record_trace
        if file is None:
            return
        from wdmoe.backbone.evaluation.trace_recorder import TraceRecorder  # torch, which few stations have

        recorder = TraceRecorder(backbone.model, self.bundle.manifest.model, most_tokens=MOST_TRACED_TOKENS)
        self._stack.enter_context(recorder)
        self._stack.push_async_callback(asyncio.to_thread, _save_trace, recorder, file)

    def _read_placement(self) -> Mapping[str, frozenset[ExpertId]]:
        path = self._settings.placement
        if path is None:
            return {}
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"placement file {path} cannot be read: {error}") from error
        known = {file.id for file in self.bundle.manifest.experts}
        placement = read_placement(text)
        for name, experts in placement.items():
            for expert in experts:
                if expert not in known:
                    raise ConfigError(
                        f"placement file {path}: {name!r} is given expert {expert.expert} of layer {expert.layer}, "
                        f"which {self.bundle.manifest.model} does not have"
                    )
        return {name: frozenset(experts) for name, experts in placement.items()}

    # ---- between the planes ----

    def publish(self, table: Routing) -> None:
        """`DataPlane.publish`: one assignment, so the model thread sees the old table or the new one, never a mix."""
        was_served = self._routing.was_served or len(table.complete) == len(self.bundle.manifest.moe_layers)
        self._routing = replace(table, was_served=was_served)

    def send(self, route: bytes, message: Message) -> None:
        """`DataPlane.send`."""
        self._exchange.post(lambda: self._exchange.send(route, message))

    def speeds(self) -> Mapping[str, float]:
        """`DataPlane.speeds`."""
        return self.layers.observed.speed.against_usual()

    def _data_news(self, envelope: Envelope) -> None:
        self._loop.call_soon_threadsafe(self.control.attached, envelope)

    def _data_gone(self, route: bytes) -> None:
        self._loop.call_soon_threadsafe(self.control.data_gone, route)

    def _barred(self, device: DeviceRoute, reason: str) -> None:
        self._backbone.forget()  # what this device computed before it was found to lie
        self._loop.call_soon_threadsafe(self._bar, device.device_id)

    def _bar(self, device_id: str) -> None:
        self.control.bar(device_id)
        self._on_barred(device_id)

    def overview(self) -> Mapping[str, object]:
        """State for `/health` and `wdmoe-node status`: plain JSON types."""
        lists = self.admission
        state = describe(
            self.bundle.manifest,
            self._settings,
            {"computed_by": self._backbone.kind, "computed_why": self._why},
            self.control,
            self.layers.observed.health,
            self.layers.observed.lateness,
            self.layers.observed.inspector,
            self._exchange.counters,
            self.placement_text(),
        )
        faults = {"allow_list_faults": lists.faults, "allow_list_unread": lists.unread} if lists is not None else {}
        return {**state, **faults}


def _port(endpoint: str) -> int:
    return int(endpoint.rsplit(":", 1)[1])


def _save_trace(recorder: Any, file: Path) -> None:
    try:
        trace = recorder.trace()
        trace.save(file)
    except WdmoeError as error:  # the station ends all the same
        log.error("could not save the gate trace: %s", error)
    else:
        log.info("saved a gate trace of %d tokens as %s", trace.tokens, file)
