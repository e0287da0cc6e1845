"""Devices that hold a valid key and answer something else than their experts compute."""

from __future__ import annotations

from tools.bench.catalogue.checker import Expected
from tools.bench.catalogue.fault import Fault, Scene
from tools.bench.catalogue.processes import Node
from tools.bench.catalogue.records import ClusterSpec


class Liar(Fault):
    id = "F18"
    title = "a device answers NaN, Inf, zeros, a wrong shape, 1e30, another expert's output or a stale reply"
    cost_s = 1.5
    passes = "exact, or the receipt says degraded or suspect; the device is caught; never wrong and called right"
    kinds: tuple[str, ...] = ("nan", "inf", "zeros", "shape", "huge", "foreign", "stale")
    tokens = 60

    def __init__(self) -> None:
        self.victim: Node | None = None

    def inject(self, scene: Scene) -> None:
        self.victim = scene.cluster.victim(scene.rng)
        scene.cluster.order(self.victim.name, lie=scene.choose(self.kinds))

    def heal(self, scene: Scene) -> None:
        """An honest device in its place, which starts anew."""
        if self.victim is not None:
            scene.cluster.renew(self.victim)

    def expected(self, scene: Scene) -> Expected:
        """It may be admitted or told as an error; completing exactly is better, not demanded of a lie in the middle."""
        bounds = scene.bounds
        return Expected(completes=False, stall_s=bounds.stall_s)


class PlausibleLiar(Liar):
    id = "I3"
    title = "a device answers noise of the right size, a factor of 1.5, zeros, or another expert's output"
    cost_s = 1.5
    kinds = ("noise", "factor", "zeros", "foreign", "huge")
    tries = 20
    spec = ClusterSpec(optional=("--verify", "5%"))


FAULTS: tuple[type[Fault], ...] = (Liar, PlausibleLiar)
