"""Slow devices, layers that nobody holds any more, and many devices at once."""

from __future__ import annotations

import signal
import time

from tools.bench.catalogue.checker import Expected
from tools.bench.catalogue.fault import Fault, Scene
from tools.bench.catalogue.faults.processes import BothHoldersKilled
from tools.bench.catalogue.processes import Node
from tools.bench.catalogue.records import ClusterSpec

SLOW_S = 0.5
FIRST = 3  # tokens after the fault that may be slow
EXTRA = 12


class SlowDevice(Fault):
    id = "I4"
    title = "a device takes 0.5 s for each answer"
    passes = "with copies exact, and after three tokens at most 1.3 times the time without a fault"
    cost_s = 3.0
    copies = (2,)  # without copies there is nobody to ask in its place
    alone = True

    def __init__(self) -> None:
        self.victim: Node | None = None

    def inject(self, scene: Scene) -> None:
        self.victim = scene.cluster.victim(scene.rng)
        scene.cluster.order(self.victim.name, delay_s=SLOW_S)

    def judge(self, scene: Scene) -> None:
        answer, bounds = scene.answers[0], scene.bounds
        later = [each for each in answer.times_s if each > scene.injected_s][FIRST:]
        if scene.cluster.spec.copies < 2 or len(later) < 2:
            return
        took_s, usual_s = later[-1] - later[0], scene.cluster.token_s * (len(later) - 1)
        scene.notes.append(f"{took_s:.2f} s in place of {usual_s:.2f} s")
        bound_s = bounds.slow_ratio * usual_s + bounds.slow_slack_s
        scene.require(took_s <= bound_s, f"S4: {len(later)} tokens took {took_s:.2f} s, usually {usual_s:.2f} s")

    def heal(self, scene: Scene) -> None:
        if self.victim is not None:
            scene.cluster.order(self.victim.name)


class LayerLost(BothHoldersKilled):
    id = "I5"
    title = "both homes of a layer lost, survivors can load its experts"
    passes = "the stream waits and goes on, exact; new requests wait too"
    copies = (2,)
    spec = ClusterSpec(optional=("--wait-for-experts", "20s"))
    cost_s = 8.0

    def expected(self, scene: Scene) -> Expected:
        return Expected(completes=True, stall_s=scene.bounds.error_s)

    def judge(self, scene: Scene) -> None:
        """A request that comes now waits and is answered as well."""
        if again := self._not_whole(scene):
            scene.violations.append(f"a new request: {again[0]}")


class EightOfMany(Fault):
    id = "I10"
    title = "8 of 48 devices lost at once"
    passes = "a pause and no answer; exact"
    tries = 5
    cost_s = 15.0
    start_s = 120.0
    copies = (2,)
    spec = ClusterSpec(devices=48, model="wide")

    def __init__(self) -> None:
        self.lost: list[Node] = []

    def inject(self, scene: Scene) -> None:
        scene.notes.append(f"served {scene.cluster.start_s:.0f} s after the first start")
        self.lost = scene.rng.sample([node for node in scene.cluster.devices if node.alive], 8)
        for node in self.lost:
            assert node.process is not None
            node.process.kill()

    def heal(self, scene: Scene) -> None:
        for node in self.lost:
            node.kill()
            node.start()

    def expected(self, scene: Scene) -> Expected:
        return Expected(exact=True, stall_s=scene.bounds.error_s)


class ManyEnd(Fault):
    id = "I11"
    title = "12 more devices start and are told to end, under load"
    passes = "every one ends; nobody is left in the status"
    tries = 5
    cost_s = 25.0
    copies = (2,)
    tokens = 120

    def __init__(self) -> None:
        self.extra: list[Node] = []

    def inject(self, scene: Scene) -> None:
        cluster = scene.cluster
        self.extra = [cluster.device(f"extra{scene.number}-{n}").start() for n in range(EXTRA)]
        cluster.devices += self.extra
        scene.require(cluster.settle(60.0) is not None, f"with {EXTRA} more devices: {cluster.trouble()}")
        load = [cluster.ask(question, self.tokens) for question in cluster.model.questions]
        time.sleep(scene.rng.uniform(0.0, 0.5))
        for node in self.extra:
            node.send(signal.SIGTERM)
        took = [node.end(signal.SIGCONT, scene.bounds.end_s) for node in self.extra]
        scene.require(None not in took, f"{took.count(None)} of {EXTRA} devices did not end on SIGTERM")
        scene.notes.append(f"slowest end {max((each for each in took if each is not None), default=0.0):.1f} s")
        for client in load:
            client.join(scene.bounds.patience_s)
            scene.require(client.answer.complete, f"S1: {client.answer.error or 'an answer without an end'}")

    def heal(self, scene: Scene) -> None:
        for node in self.extra:
            node.kill()
        scene.cluster.devices = [node for node in scene.cluster.devices if node not in self.extra]


FAULTS: tuple[type[Fault], ...] = (SlowDevice, LayerLost, EightOfMany, ManyEnd)
