"""Old and new side by side: another protocol version, and the release before this one."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tools.bench.catalogue.checker import Expected
from tools.bench.catalogue.fault import Fault, Impossible, Scene
from tools.bench.catalogue.processes import ROOT, Node

BEFORE = os.environ.get("WDMOE_BEFORE", "757cd81")  # until there is a tag: the commit that wire version 2 stands in
REFUSED = ("version", "refused", "not spoken")


class VersionSkew(Fault):
    id = "F20"
    title = "a device of protocol version 1 or 3, or of the release before, joins"
    passes = "it serves exactly, or is refused with a reason; nobody else notices"
    kinds = ("protocol 1", "protocol 3", "release before")
    cost_s = 8.0
    copies = (2,)
    tries = 20

    def __init__(self) -> None:
        self.other: Node | None = None

    def inject(self, scene: Scene) -> None:
        cluster, kind = scene.cluster, scene.choose(self.kinds)
        other = self.other = cluster.device(f"other{scene.number}")
        if kind == "release before":
            other.environment["PYTHONPATH"] = str(release_before(cluster.folder.parent))
        else:
            other.environment["CATALOGUE_PROTOCOL"] = kind.split()[1]
        other.start()
        scene.notes.append(self._outcome(scene, other))

    def _outcome(self, scene: Scene, other: Node) -> str:
        """Joined or refused, whichever comes first."""
        until_s = time.monotonic() + 15.0
        while time.monotonic() < until_s:
            said = other.said()
            if any(each["name"] == other.name for each in (scene.cluster.status() or {"devices": []})["devices"]):
                return "joined"
            if any(word in said for word in REFUSED):
                return "refused"
            time.sleep(0.2)
        scene.violations.append(f"neither joined nor refused with a reason: {other.said()[-200:]}")
        return "neither"

    def expected(self, scene: Scene) -> Expected:
        return Expected(exact=True, stall_s=scene.bounds.stall_s)

    def judge(self, scene: Scene) -> None:
        if scene.notes[-1] == "joined":
            for complaint in self._not_whole(scene):
                scene.violations.append(f"with a device of another release: {complaint}")

    def heal(self, scene: Scene) -> None:
        if self.other is not None:
            self.other.end()


def release_before(folder: Path, commit: str = BEFORE) -> Path:
    """The sources of the release before, once for a run. The native modules are these, or built anew."""
    old = folder / "release-before"
    if old.exists():
        return old
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=False)
    if archive.returncode:
        raise Impossible(f"no sources of {commit}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(old, filter="data")
    for package in ("wdmoe/solver", "wdmoe/transport/codec"):
        for file in (ROOT / package).glob("_native*.so"):
            shutil.copy(file, old / package)
    environment = {**os.environ, "PYTHONPATH": str(old)}
    words = [sys.executable, "-c", "import wdmoe.nodes.device.device"]
    if subprocess.run(words, env=environment, capture_output=True, cwd=old, check=False).returncode:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        built = subprocess.run(build, cwd=old, capture_output=True, text=True, check=False)
        if built.returncode:
            shutil.rmtree(old)
            raise Impossible(f"{commit} cannot be built: {built.stderr.strip()[-200:]}")
    return old


FAULTS: tuple[type[Fault], ...] = (VersionSkew,)
