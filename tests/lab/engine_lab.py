"""A base station and its devices in one process: real model, codec and ONNX Runtime; only the sockets are not."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wdmoe.arrays import Float32Array
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.backbone.runtime.engine import Engine
from wdmoe.backbone.runtime.model_thread import ModelThread
from wdmoe.config import StationSettings
from wdmoe.errors import ExpertError
from wdmoe.layer_call import LayerCall
from wdmoe.moe.expert import ExpertRunner
from wdmoe.moe.layer import ExpertLayers, LayerRules
from wdmoe.moe.providers import OnnxExpert, cpu_chain
from wdmoe.moe.verification.inspector import Inspector
from wdmoe.nodes.base_station.backbone import open_backbone
from wdmoe.nodes.base_station.verification import norm_band, open_verifier
from wdmoe.records import ExpertId
from wdmoe.transport.codec.messages import Activations, Attach, Failure, Message, Result, Run
from wdmoe.transport.exchange import Exchange
from wdmoe.transport.memory import MemoryDataStation
from wdmoe.transport.routing import DeviceRoute, Routing

Spoil = Callable[[Run, Message], Message | None]


class LabDevice:
    """The compute thread of a device. `spoil` may change or swallow its replies."""

    def __init__(self, station: MemoryDataStation, bundle: Bundle, name: str, experts: list[ExpertId]) -> None:
        self.name = name
        self.experts = experts
        self.spoil: Spoil = lambda run, reply: reply
        self.runs = 0
        self.run: Callable[[Run], Activations] = lambda run: self.runner.run(run)
        self.runner = ExpertRunner(lambda model, sha256: OnnxExpert(model, 1, cpu_chain()))
        for expert in experts:
            file = bundle.expert_file(expert)
            data = bundle.read_expert(expert, 0, file.size)
            self.runner.load(expert, data, file.sha256, bundle.manifest.hidden)
        self._link = station.connect(key=name)
        self.route = self._link.route
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name)

    def start(self) -> None:
        self._link.send(Attach(session=1))
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._link.wake()
        self._thread.join()
        self._link.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            envelope = self._link.receive(0.5)
            if envelope is not None and isinstance(envelope.message, Run):
                self.runs += 1
                reply = self.spoil(envelope.message, self._answer(envelope.message))
                if reply is not None:
                    self._link.send(reply)

    def _answer(self, run: Run) -> Message:
        begun = time.perf_counter()
        try:
            partial = self.run(run)
        except ExpertError as error:
            return Failure(attempt=run.attempt, reason=str(error))
        spent = time.perf_counter() - begun
        return Result(
            attempt=run.attempt,
            layer=run.layer,
            compute_s=spent,
            residence_s=spent,
            link_down_s=0.0,
            link_up_s=0.0,
            partial=partial,
        )


class Lab:
    """Spreads the experts of a bundle over devices, expert e of each layer on device e modulo their number.

    With two copies, the next device holds it as well.
    """

    def __init__(
        self,
        bundle: Bundle,
        devices: int = 3,
        rules: Mapping[str, object] | None = None,
        copies: int = 1,
        verify: float | None = None,
        draw: Callable[[], float] | None = None,
        engine: str = "transformers",
        max_active: int = 2,
    ) -> None:
        """`verify`: share of answers to compute again, with every first one; None: nobody looks."""
        manifest = bundle.manifest
        self._data = MemoryDataStation()
        self.prefill_chunk = 16
        self._homes = devices
        homes = [[f.id for f in manifest.experts if (d - f.id.expert) % devices < copies] for d in range(devices)]
        self.devices = [LabDevice(self._data, bundle, f"device {d}", homes[d]) for d in range(devices)]
        self.routing = Routing()
        exchange = self.exchange = Exchange(self._data, lambda envelope: None, lambda route: None)
        defaults: dict[str, Any] = {"renormalise": manifest.on_drop == "renormalise", "rank": manifest.rank}
        defaults |= {"gate_temperature": manifest.gate_temperature, "deadline_s": 30.0}
        all_rules = LayerRules(**{**defaults, **(rules or {})})
        self.barred: list[str] = []
        self._verifier = None if verify is None else open_verifier(bundle, exchange.post)
        inspector = Inspector(
            None if verify is None else norm_band(bundle),
            self._verifier,
            rate=verify or 0.0,
            barred=lambda route, reason: self.barred.append(route.device_id),
            draw=draw or random.Random(7).random,
        )
        self.layers = ExpertLayers(exchange, lambda: self.routing, all_rules, inspector)
        settings = StationSettings(bundle=bundle.root, engine=engine, threads=1, prefill_chunk=self.prefill_chunk)
        self.station: Any = open_backbone(bundle, settings, self._run, exchange)[0]
        self.thread = ModelThread(exchange, max_active=max_active, max_waiting=2, at_work=self.station.at_work)
        self.engine = Engine(self.station, self.thread, dict, policy=all_rules.policy)
        for device in self.devices:
            device.start()
        self.route()
        self.thread.start()

    def route(self, without: frozenset[str] = frozenset()) -> None:
        """Publish who serves what, as if the devices named in `without` were not there."""
        live = [d for d in self.devices if d.name not in without]
        counts = self.station.manifest.experts_per_layer
        device_of, standby_of = ({layer: np.full(n, -1, np.int32) for layer, n in counts.items()} for _ in range(2))
        for index, device in enumerate(live):
            for layer, expert in device.experts:
                home = device is self.devices[expert % self._homes]
                (device_of if home else standby_of)[layer][expert] = index
        routes = tuple(DeviceRoute(d.name, d.name, d.route) for d in live)
        complete = frozenset(layer for layer, row in device_of.items() if (row >= 0).all())
        self.routing = Routing(routes, device_of, complete, standby_of)

    def close(self) -> None:
        self.thread.stop()
        if self._verifier is not None:
            self._verifier.close()
        for device in self.devices:
            device.close()
        self._data.close()

    def _run(self, call: LayerCall) -> Float32Array:
        return self.layers.run(call)  # looked up anew: a test may have put itself in front
