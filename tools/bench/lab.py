"""What the benchmarks share: a base station with real device processes, and figures told the same way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NODE = [sys.executable, "-c", "from wdmoe.cli.main import main; main()"]
SEED = 20240623


class Device:
    """A `wdmoe-node device` process that can be killed and started again."""

    def __init__(
        self, folder: Path, name: str, token: str, words: Sequence[str] = (), node: Sequence[str] = NODE
    ) -> None:
        self.name = name
        self._command = [*node, "-q", "device", "--join", token, "--name", name]
        self._command += ["--state", str(folder / name), "--cache", str(folder / "cache"), *words]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


@contextlib.asynccontextmanager
async def served(
    bundle: Path,
    devices: int,
    folder: Path,
    words: Sequence[Sequence[str]] = (),
    nodes: Sequence[Sequence[str]] = (),
    **settings: Any,
) -> AsyncIterator[tuple[Any, list[Device]]]:
    """A base station in this process and devices in others, CURVE on.

    `words` are further flags of each device, as for an emulated link; none means no link emulation. `nodes` are the
    programs that they run, `wdmoe-node` if none are given.
    """
    from wdmoe.config import StationSettings
    from wdmoe.nodes.base_station.base_station import BaseStation

    defaults = {
        "bind": "tcp://127.0.0.1:*",
        "state": folder / "bs",
        "deadline_s": 30.0,
        "threads": 1,
        "join_uses": None,
        "prefix_cache_bytes": 0,  # what was asked before must not answer
    }
    async with BaseStation(StationSettings(bundle=bundle, **{**defaults, **settings})) as station:
        token = station.join_text
        fleet = [
            Device(folder, f"device{i}", token, words[i] if words else (), nodes[i] if nodes else NODE)
            for i in range(devices)
        ]
        try:
            await settled(station, devices)
            yield station, fleet
        finally:
            for device in fleet:
                device.process.terminate()
            for device in fleet:
                device.process.wait(30)


async def settled(station: Any, devices: int) -> None:
    """Until so many devices serve, every expert is served where it was placed, and nothing moves any more."""
    await station.wait_until_served(300)
    quiet = 0
    while quiet < 10:
        roster, wanted = station.control.roster, station.control.wanted()
        at_home = all(wanted[d.device_id] == set(d.ready) == set(d.placed) for d in roster.live())
        quiet = quiet + 1 if at_home and len(roster.live()) == devices else 0
        await asyncio.sleep(0.1)


def pin_apart(fleet: list[Device]) -> None:
    """Give the model thread of this process the first core to itself, and the devices the others."""
    first, *others = sorted(os.sched_getaffinity(0))
    for thread in threading.enumerate():
        if thread.name == "wdmoe-model" and thread.native_id is not None:
            os.sched_setaffinity(thread.native_id, {first})
    for device in fleet:
        for task in os.listdir(f"/proc/{device.process.pid}/task"):
            os.sched_setaffinity(int(task), set(others) or {first})


def spread(values: list[float], scale: float = 1.0) -> dict[str, float]:
    """Median, 5th and 95th percentile, and how many."""
    low, middle, high = np.percentile(np.array(values) * scale, [5, 50, 95])
    return {"median": round(middle, 4), "p5": round(low, 4), "p95": round(high, 4), "n": len(values)}


def versions() -> dict[str, Any]:
    """Everything a figure depends on that has a version."""
    from importlib.metadata import version

    names = ("wdmoe", "torch", "transformers", "onnxruntime", "pyzmq", "numpy", "msgpack", "greenlet")
    import zmq

    return {
        "seed": SEED,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "libzmq": zmq.zmq_version(),
        **{name: version(name) for name in names},
    }


def show(title: str, rows: list[tuple[str, str]]) -> None:
    print(f"\n{title}")
    for label, value in rows:
        print(f"  {label:<44} {value}")


def line(figure: dict[str, float], unit: str) -> str:
    return f"{figure['median']:.3f} {unit}   (5 to 95 %: {figure['p5']:.3f} to {figure['p95']:.3f}, n={figure['n']})"
