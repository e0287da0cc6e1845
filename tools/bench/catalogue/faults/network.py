"""Links that are cut, lossy, slow, half open or corrupt. Each device has a link of its own (`air.py`)."""

from __future__ import annotations

import time
from dataclasses import replace

from tools.bench.catalogue.air import CLEAR, Air, RelayAir, Way
from tools.bench.catalogue.checker import Expected
from tools.bench.catalogue.fault import Fault, Impossible, Scene
from tools.bench.catalogue.limits import confine, release
from tools.bench.catalogue.processes import Node
from tools.bench.catalogue.records import ClusterSpec

CUT = Way(cut=True)


class _OnAir(Fault):
    """What all of them share: links, and that they are clear afterwards."""

    spec = ClusterSpec(air=True)
    start_s = 10.0
    cost_s = 4.0

    def __init__(self) -> None:
        self.touched: set[int] = set()

    def air(self, scene: Scene) -> Air:
        """The links."""
        assert scene.cluster.air is not None
        return scene.cluster.air

    def spoil(self, scene: Scene, numbers: list[int], down: Way, up: Way) -> None:
        """Of these devices, until healed."""
        self.touched |= set(numbers)
        for number in numbers:
            self.air(scene).set(number, down, up)

    def heal(self, scene: Scene) -> None:
        for number in self.touched:
            self.air(scene).set(number, CLEAR, CLEAR)

    def everyone(self, scene: Scene) -> list[int]:
        """Numbers of all devices."""
        return list(range(len(scene.cluster.devices)))

    def victim(self, scene: Scene) -> tuple[int, Node]:
        """One that works."""
        node = scene.cluster.victim(scene.rng)
        return scene.cluster.devices.index(node), node


class Partition(_OnAir):
    id = "F3"
    title = "one, half or all devices cut off for 1 s or 10 s"
    cost_s = 5.5
    tries = 10
    passes = "one: as F1; half: degraded and said, or an error; all: a clear error; healed without any restart"
    kinds = ("one for 1 s", "half for 1 s", "all for 1 s", "one for 10 s", "all for 10 s")

    def inject(self, scene: Scene) -> None:
        kind = scene.choose(self.kinds)
        numbers = self.everyone(scene)
        scene.rng.shuffle(numbers)
        count = {"one": 1, "half": len(numbers) // 2, "all": len(numbers)}[kind.split()[0]]
        chosen = [self.victim(scene)[0]] if count == 1 else numbers[:count]
        self.spoil(scene, chosen, CUT, CUT)
        time.sleep(float(kind.split()[2]))
        self.heal(scene)

    def expected(self, scene: Scene) -> Expected:
        if scene.notes[-1].startswith("one"):
            return super().expected(scene)
        return Expected(completes=False, stall_s=scene.bounds.error_s)


class OneWay(_OnAir):
    id = "F4"
    title = "a device hears and cannot speak, or the other way round, for 2 s"
    cost_s = 3.3
    tries = 10
    passes = "as F1; it does not count as alive by the heartbeats of one side"

    def inject(self, scene: Scene) -> None:
        mute = scene.choose(("mute", "deaf")) == "mute"
        number, node = self.victim(scene)
        self.spoil(scene, [number], CLEAR if mute else CUT, CUT if mute else CLEAR)
        time.sleep(2.0)
        state = scene.cluster.status() or {"devices": []}
        ghosts = [each["name"] for each in state["devices"] if each["name"] == node.name and each["attached"]]
        scene.notes.append("still attached after 2 s" if ghosts else "given up within 2 s")


class Loss(_OnAir):
    id = "F5"
    title = "1 %, 5 % or 20 % of all frames lost, or bursts"
    cost_s = 3.0
    tries = 10
    passes = "1 % and 5 %: exact; 20 % and bursts: exact, degraded and said, or an error; never a hang"
    kinds = ("1 %", "5 %", "20 %", "bursts")
    tokens = 24

    def inject(self, scene: Scene) -> None:
        kind = scene.choose(self.kinds)
        if kind == "bursts":
            for _ in range(6):
                self.spoil(scene, self.everyone(scene), Way(loss=0.6), Way(loss=0.6))
                time.sleep(scene.rng.uniform(0.02, 0.15))
                self.heal(scene)
                time.sleep(scene.rng.uniform(0.1, 0.3))
            return
        way = Way(loss=float(kind.split()[0]) / 100)
        self.spoil(scene, self.everyone(scene), way, way)

    def expected(self, scene: Scene) -> Expected:
        """A lost frame costs TCP 0.2 s and more, so several in a row may cost a deadline even at 5 %."""
        gentle = scene.notes[-1] == "1 %"
        return Expected(completes=gentle, exact=False, stall_s=scene.bounds.error_s)


class Disorder(_OnAir):
    id = "F6"
    title = "10 % of frames out of order, 5 % twice, jitter as large as the delay"
    cost_s = 2.0
    tries = 10
    passes = "the same output"
    tokens = 24

    def inject(self, scene: Scene) -> None:
        way = Way(reorder=0.1, duplicate=0.05, delay_s=0.005, jitter_s=0.005)
        self.spoil(scene, self.everyone(scene), way, way)

    def expected(self, scene: Scene) -> Expected:
        return Expected(exact=True, stall_s=scene.bounds.stall_s)


class Corruption(_OnAir):
    id = "F7"
    title = "2 % of frames with a flipped bit, below TCP"
    cost_s = 1.5
    tries = 10
    passes = "never a wrong answer called right; the connection is made again"
    tokens = 40

    def inject(self, scene: Scene) -> None:
        if isinstance(self.air(scene), RelayAir):
            raise Impossible("a flipped bit below TCP needs the back end tap")
        way = Way(corrupt=0.02)
        self.spoil(scene, self.everyone(scene), way, way)

    def expected(self, scene: Scene) -> Expected:
        return Expected(completes=False, stall_s=scene.bounds.stall_s)


class CorruptStream(Corruption):
    id = "F7b"
    title = "a bit flipped inside the stream (by a relay), encrypted"
    cost_s = 2.8
    tries = 10

    def inject(self, scene: Scene) -> None:
        air = self.air(scene)
        assert isinstance(air, RelayAir)
        air.flip(self.victim(scene)[0], 3)

    def spec_for(self, copies: int) -> ClusterSpec:
        return replace(super().spec_for(copies), relay=True)


class CorruptPlain(CorruptStream):
    id = "F7c"
    title = "the same with --insecure"
    cost_s = 3.0
    passes = "the checksum catches it"

    def spec_for(self, copies: int) -> ClusterSpec:
        return replace(super().spec_for(copies), insecure=True)


class SlowLink(_OnAir):
    id = "F8"
    title = "a link that falls to 0.5 Mbit/s, or a device that gets a tenth of its time"
    cost_s = 2.0
    tries = 10
    passes = "complete; exact with copies; the pause stays bounded"
    kinds = ("slow link", "slow device")

    def __init__(self) -> None:
        super().__init__()
        self.slowed: Node | None = None

    def inject(self, scene: Scene) -> None:
        number, node = self.victim(scene)
        if scene.choose(self.kinds) == "slow link":
            way = Way(rate_bps=0.5e6)
            self.spoil(scene, [number], way, way)
        else:
            self.slowed = node
            if not confine("cpu", "cpu.cfs_quota_us", 10_000, node.pid):
                scene.notes.append("no cpu cgroup for us: 20 ms more for each answer in place of it")
                scene.cluster.order(node.name, delay_s=0.02)

    def heal(self, scene: Scene) -> None:
        super().heal(scene)
        if self.slowed is not None:
            scene.cluster.order(self.slowed.name)
            release("cpu")


class HalfOpen(_OnAir):
    id = "F9"
    title = "a device vanishes without a word: its process ends behind a cut link, or an idle link forgets it"
    cost_s = 4.5
    tries = 10
    passes = "noticed, descriptors freed, the device is back"
    kinds = ("vanishes", "idle drop")

    def __init__(self) -> None:
        super().__init__()
        self.gone: Node | None = None

    def inject(self, scene: Scene) -> None:
        number, node = self.victim(scene)
        self.spoil(scene, [number], CUT, CUT)
        if scene.choose(self.kinds) == "vanishes":
            self.gone = node
            node.kill()
        time.sleep(3.0)
        state = scene.cluster.status() or {"devices": []}
        there = [each["name"] for each in state["devices"] if each["name"] == node.name]
        scene.require(not there, f"3 s after {node.name} vanished the base station still counts it")

    def heal(self, scene: Scene) -> None:
        super().heal(scene)
        if self.gone is not None and not self.gone.alive:
            self.gone.start()


class Flapping(_OnAir):
    id = "F16"
    title = "a link that goes down and up five times, or a device that moves to another address"
    cost_s = 3.0
    tries = 10
    passes = "no storm of sessions: one joining a second and device at most; the device is back"
    kinds = ("flapping", "another address")

    def inject(self, scene: Scene) -> None:
        air = self.air(scene)
        number, node = self.victim(scene)
        before, begun_s = node.said().count("joined "), time.monotonic()
        if scene.choose(self.kinds) == "flapping":
            for _ in range(5):
                air.flap(number, up=False)
                time.sleep(scene.rng.uniform(0.1, 0.4))
                air.flap(number, up=True)
                time.sleep(scene.rng.uniform(0.1, 0.4))
        elif not air.move(number):
            scene.notes.append("no other address with relays: connections reset in place of it")
        joined = node.said().count("joined ") - before
        seconds = time.monotonic() - begun_s
        scene.require(joined <= seconds + 1, f"{joined} sessions in {seconds:.1f} s: a storm")


FAULTS: tuple[type[Fault], ...] = (
    Partition,
    OneWay,
    Loss,
    Disorder,
    Corruption,
    CorruptStream,
    CorruptPlain,
    SlowLink,
    HalfOpen,
    Flapping,
)
