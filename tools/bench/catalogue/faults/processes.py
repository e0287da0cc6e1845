"""Processes that die, freeze, come back too fast, or run out of memory."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

from tools.bench.catalogue.checker import Expected
from tools.bench.catalogue.fault import Fault, Scene
from tools.bench.catalogue.limits import confine, release
from tools.bench.catalogue.processes import Node

FREEZES_S = (0.5, 5.0, 0.0)  # 0: until the answers have ended


class _OfOneDevice(Fault):
    """Something happens to one device; whatever it was, the device is back afterwards."""

    def __init__(self) -> None:
        self.victim: Node | None = None

    def choose(self, scene: Scene) -> Node:
        """The device of this try."""
        self.victim = scene.cluster.victim(scene.rng)
        return self.victim

    def heal(self, scene: Scene) -> None:
        if self.victim is not None and not self.victim.alive:
            self.victim.start()


class DeviceKilled(_OfOneDevice):
    id = "F1"
    title = "kill -9 of a device"
    cost_s = 2.0
    passes = "with copies exact, without copies degraded and said; the device is back"

    def inject(self, scene: Scene) -> None:
        self.choose(scene).kill()


class DeviceFrozen(_OfOneDevice):
    id = "F2"
    title = "a device stopped for 0.5 s, 5 s, or until the end"
    cost_s = 3.0
    tries = 10
    passes = "as F1; late replies are dropped, the device rejoins by itself"

    def inject(self, scene: Scene) -> None:
        for_s = FREEZES_S[scene.number // scene.cells % len(FREEZES_S)]
        scene.notes.append(f"{for_s:g} s" if for_s else "until the end")
        self.choose(scene).send_all(signal.SIGSTOP)
        if for_s:
            time.sleep(for_s)
            self._thaw()

    def heal(self, scene: Scene) -> None:
        self._thaw()

    def _thaw(self) -> None:
        if self.victim is not None:
            self.victim.send_all(signal.SIGCONT)


class StationKilled(Fault):
    id = "F10"
    title = "kill -9 of the base station, and a restart"
    cost_s = 6.0
    passes = "streams end with an error or a broken connection, never a hang; all devices are back"
    copies = (2,)

    def inject(self, scene: Scene) -> None:
        station = scene.cluster.station
        whole = scene.choose(("its worker", "its first process")) == "its first process"
        before = station.tree()
        os.kill(station.pid if whole else station.worker(), signal.SIGKILL)
        if whole:
            time.sleep(1.0)
            left = [each.pid for each in before if each.is_running() and each.status() != "zombie"]
            scene.require(not left, f"S5: kill -9 of the base station left {len(left)} processes of it")

    def judge(self, scene: Scene) -> None:
        """A client of a killed process sees its connection break: that is the end of an answer in words enough."""
        for answer in scene.answers:
            if answer.error and not answer.told:
                answer.told = True
                scene.notes.append("a broken connection")

    def heal(self, scene: Scene) -> None:
        station = scene.cluster.station
        time.sleep(0.2)
        if not station.alive:
            station.kill()
            station.start()
        scene.cluster.wait_for(lambda: scene.cluster.status() is not None, 60, "the base station does not come back")

    def expected(self, scene: Scene) -> Expected:
        return Expected(completes=False, stall_s=scene.bounds.error_s)


class NewKey(StationKilled):
    id = "F10b"
    title = "the base station comes back with another key, then with its own"
    cost_s = 25.0
    passes = "devices refuse it loudly, and come back to the right one"
    tries = 4

    def inject(self, scene: Scene) -> None:
        cluster = scene.cluster
        before = {node.name: node.said().count("WARNING") for node in cluster.devices}
        cluster.station.kill()
        scene.require((cluster.state / "station.key").exists(), "no station.key in the state folder")
        cluster.state.rename(
            _kept(cluster.state)
        )  # all of it: no station begins anew beside the devices of another key
        cluster.station.start()
        time.sleep(14.0)
        quiet = [node.name for node in cluster.devices if node.said().count("WARNING") == before[node.name]]
        joined = (cluster.status() or {"devices": []})["devices"]
        scene.require(not quiet, f"{', '.join(quiet)}: no word about a base station with another key")
        scene.require(not joined, "a device joined a base station with another key")
        cluster.station.kill()
        self._put_back(cluster.state)

    def heal(self, scene: Scene) -> None:
        self._put_back(scene.cluster.state)
        super().heal(scene)

    @staticmethod
    def _put_back(state: Path) -> None:
        if _kept(state).exists():
            shutil.rmtree(state, ignore_errors=True)
            _kept(state).rename(state)


def _kept(state: Path) -> Path:
    return state.with_name(f"{state.name}.kept")


class FastRestart(_OfOneDevice):
    id = "F11"
    title = "a device restarts while the base station's loop is blocked, or all of it stopped, for 1 s"
    cost_s = 2.5
    tries = 10
    passes = "the newer session wins, nobody is deaf; a base station that was stopped may end answers with an error"
    kinds = ("loop blocked", "all stopped")

    def inject(self, scene: Scene) -> None:
        worker, victim = scene.cluster.station.worker(), self.choose(scene)
        stopped = scene.choose(self.kinds) == "all stopped"
        os.kill(worker, signal.SIGSTOP if stopped else signal.SIGUSR2)
        try:
            victim.kill()
            victim.start()
            time.sleep(1.0)
        finally:
            os.kill(worker, signal.SIGCONT)

    def expected(self, scene: Scene) -> Expected:
        usual, stopped = super().expected(scene), scene.notes[-1] == "all stopped"
        return Expected(completes=not stopped, exact=usual.exact and not stopped, stall_s=usual.stall_s + 1.0)


class OutOfMemory(_OfOneDevice):
    id = "F13"
    title = "a device runs out of memory"
    cost_s = 2.0
    tries = 10
    passes = "as F1: the kernel ends it, it is started again"

    def inject(self, scene: Scene) -> None:
        victim = self.choose(scene)
        if not confine("memory", "memory.limit_in_bytes", 64 << 20, victim.pid):
            scene.notes.append("no memory cgroup for us: killed in place of it")
            victim.kill()
            return
        scene.notes.append("memory cgroup of 64 MiB")
        scene.cluster.order(victim.name, hog_bytes=256 << 20)
        until_s = time.monotonic() + 5.0
        while victim.alive and time.monotonic() < until_s:
            time.sleep(0.02)
        scene.require(not victim.alive, "the device outlived the limit on its memory")

    def heal(self, scene: Scene) -> None:
        if self.victim is not None:
            scene.cluster.order(self.victim.name)
            self.victim.kill()
        release("memory")
        super().heal(scene)


class BothHoldersKilled(Fault):
    id = "F17"
    title = "every device that holds an expert is lost"
    cost_s = 2.0
    passes = "a clear error, or degraded and said; whole again once the devices are back"

    def __init__(self) -> None:
        self.lost: list[Node] = []

    def inject(self, scene: Scene) -> None:
        holders = scene.cluster.holders()
        layer = scene.rng.choice(sorted({at for held in holders.values() for at in held}))
        self.lost = [node for node in scene.cluster.devices if layer in holders.get(node.name, set())]
        scene.notes.append(f"{len(self.lost)} devices with layer {layer[0]}")
        for node in self.lost:
            node.kill()

    def heal(self, scene: Scene) -> None:
        for node in self.lost:
            if not node.alive:
                node.start()

    def expected(self, scene: Scene) -> Expected:
        return Expected(completes=False, stall_s=scene.bounds.error_s)


FAULTS: tuple[type[Fault], ...] = (
    DeviceKilled,
    DeviceFrozen,
    StationKilled,
    NewKey,
    FastRestart,
    OutOfMemory,
    BothHoldersKilled,
)
