"""Full disks, clocks that jump, power cuts, and files that change under a running program."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tools.bench.catalogue.checker import Expected
from tools.bench.catalogue.cluster import run_command
from tools.bench.catalogue.fault import Check, Checkup, Fault, Impossible, Scene
from tools.bench.catalogue.processes import LAUNCH, ROOT, Node
from tools.bench.catalogue.records import ClusterSpec

STEPS = ("+1 h", "-1 h", "1970")


class DiskFull(Fault):
    id = "F12"
    title = "a device starts with its cache on a full disk"
    cost_s = 3.0
    tries = 10
    passes = "it starts without cache, warns, serves; the cache is not corrupted"

    def __init__(self) -> None:
        self.victim: Node | None = None
        self.disk: Path | None = None

    def inject(self, scene: Scene) -> None:
        victim = self.victim = scene.cluster.victim(scene.rng)
        victim.kill()
        disk = scene.cluster.folder / victim.name / "cache"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            raise Impossible(f"cannot mount a file system, which needs root: {mounted.stderr.strip()}")
        self.disk = disk
        room = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize))
        before = len(victim.said())
        victim.start()
        settled = scene.cluster.settle(scene.bounds.settle_s)
        scene.require(settled is not None, "the device does not serve with its cache on a full disk")
        until_s = time.monotonic() + scene.bounds.settle_s  # the base station may have seen the session before
        while "WARNING" not in victim.said()[before:] and time.monotonic() < until_s:
            time.sleep(0.1)
        scene.require("WARNING" in victim.said()[before:], "the device does not say that its cache cannot be written")
        scene.require("Traceback" not in victim.said()[before:], "the device logged a traceback")

    def heal(self, scene: Scene) -> None:
        if self.victim is None:
            return
        self.victim.kill()
        if self.disk is not None:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)
            self.disk = None
        self.victim.start()


class ClockSteps(Fault):
    id = "F14"
    title = "the clock of a device or of the base station jumps by an hour, back by an hour, or to 1970"
    cost_s = 4.0
    tries = 10
    passes = "nothing happens"
    spec = ClusterSpec(clocks=True)

    def __init__(self) -> None:
        self.who = ""

    def inject(self, scene: Scene) -> None:
        if sys.version_info < (3, 11):
            raise Impossible("Python 3.10 waits for locks by the wall clock, which the kernel would not see moved")
        station = scene.rng.random() < 0.5
        self.who = "bs" if station else scene.cluster.victim(scene.rng).name
        step = scene.choose(STEPS)
        scene.notes.append("base station" if station else "device")
        seconds = {"+1 h": 3600, "-1 h": -3600, "1970": 86400 - int(time.time())}[step]
        scene.cluster.set_clock(self.who, seconds)
        time.sleep(1.0)
        for complaint in self._not_whole(scene):
            scene.violations.append(f"with another clock: {complaint}")

    def heal(self, scene: Scene) -> None:
        if self.who:
            scene.cluster.set_clock(self.who, 0)


class PowerCut(Fault):
    id = "F15"
    title = "a new device is killed at random moments of its first starts (enrolment, fetch, cache)"
    cost_s = 6.0
    passes = "the next start completes; nobody else notices"
    copies = (2,)

    def __init__(self) -> None:
        self.fresh: Node | None = None

    def inject(self, scene: Scene) -> None:
        cluster = scene.cluster
        fresh = self.fresh = cluster.device(f"fresh{scene.number}")
        for _ in range(3):
            fresh.start()
            time.sleep(scene.rng.uniform(0.3, 1.8))
            fresh.kill()
        fresh.start()
        cluster.devices.append(fresh)
        settled = cluster.settle(scene.bounds.settle_s)
        scene.require(settled is not None, f"after three cuts the device does not come up: {fresh.said()[-200:]}")
        scene.require("Traceback" not in fresh.said(), "the device logged a traceback")

    def heal(self, scene: Scene) -> None:
        if self.fresh is not None:
            self.fresh.end()
            scene.cluster.devices = [node for node in scene.cluster.devices if node is not self.fresh]


class ExportCut(Check):
    id = "F15b"
    title = "`export` is killed at a random moment and started again (there are no edge images yet to cut)"
    passes = "the second run completes, and the bundle is sound"
    tries = 5
    cost_s = 14.0

    def check(self, scene: Checkup) -> None:
        make = "import sys; from pathlib import Path; from tests.lab.families import save_tiny; "
        make += "save_tiny('mixtral', Path(sys.argv[1]))"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        checkpoint, bundle = scene.folder / "checkpoint", scene.folder / "bundle"
        subprocess.run([sys.executable, "-c", make, str(checkpoint)], check=True, capture_output=True, env=environment)
        line = [sys.executable, str(LAUNCH), "export", str(checkpoint), str(bundle)]
        first = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        began = _wait_for(bundle, first, 30.0)
        time.sleep(scene.rng.uniform(0.0, 0.4))
        first.kill()
        first.wait()
        whole = (bundle / "manifest.json").exists()
        scene.notes.append("in the middle" if began and not whole else "before or after")
        again = run_command("export", str(checkpoint), str(bundle))
        # What was whole before the kill came is not written over.
        ended = again.returncode == 0 or (whole and "is not empty" in again.stderr)
        scene.require(ended, f"the second export failed: {again.stderr.strip()[-200:]}")
        sound = run_command("verify", str(bundle))
        scene.require(sound.returncode == 0, f"the bundle is not sound: {sound.stderr.strip()[-200:]}")


class FileSwapped(Fault):
    id = "F19"
    title = "the expert files of a device are overwritten while it runs, then it restarts"
    cost_s = 2.5
    tries = 10
    passes = "exact; the restarted device fetches them again"

    def __init__(self) -> None:
        self.victim: Node | None = None

    def inject(self, scene: Scene) -> None:
        victim = self.victim = scene.cluster.victim(scene.rng)
        cache = scene.cluster.folder / victim.name / "cache"
        files = [file for file in cache.rglob("*") if file.is_file() and file.stat().st_size > 1000]
        scene.require(files, "no expert file in the device's cache")
        for file in files:
            spoilt = bytearray(file.read_bytes())
            for _ in range(16):
                spoilt[scene.rng.randrange(len(spoilt))] ^= 0xFF
            file.write_bytes(spoilt)
        scene.notes.append(f"{len(files)} files")

    def expected(self, scene: Scene) -> Expected:
        return Expected(exact=True, stall_s=scene.bounds.stall_s)

    def heal(self, scene: Scene) -> None:
        if self.victim is not None:
            self.victim.kill()
            self.victim.start()


def _wait_for(path: Path, process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    until_s = time.monotonic() + timeout_s
    while not path.exists() and process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.02)
    return path.exists()


FAULTS: tuple[type[Fault], ...] = (DiskFull, ClockSteps, PowerCut, ExportCut, FileSwapped)
