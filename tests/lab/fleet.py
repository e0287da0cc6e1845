"""A base station in a thread of the test and devices as real processes, over CURVE on the loopback interface."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout  # its own class before Python 3.11
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tests.lab.liar import Lie
from tests.lab.waiting import PATIENCE_S, free_ports
from wdmoe.config import StationSettings
from wdmoe.errors import WdmoeError
from wdmoe.nodes.base_station.base_station import BaseStation

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
NODE = [sys.executable, "-c", "from wdmoe.cli.main import main; main()"]


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-loop")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = PATIENCE_S) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        finally:
            future.cancel()  # what took too long must not run on beside the next test

    def close(self) -> None:
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Device:
    """One `wdmoe-node device` process, its output in a file."""

    def __init__(
        self, folder: Path, name: str, token: str, *flags: str, node: Sequence[str] = NODE, lie: Lie | None = None
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        node = node if lie is None else [sys.executable, "-m", "tests.lab.liar", *lie.words()]
        self._command = [*node, "-v", "device", "--join", token, "--name", name]
        self._command += ["--state", str(folder / name), "--cache", str(folder / "cache"), *flags]
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def said(self) -> str:
        return self.log.read_text(errors="replace")


class Fleet:
    """One base station state and address that outlives the station itself, and the devices that joined it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bind = f"tcp://127.0.0.1:{free_ports(2)}"
        self.loop = Loop()
        self.devices: list[Device] = []
        self.token = ""

    @contextmanager
    def serve(self, bundle: Path, devices: int = 3, **settings: Any) -> Iterator[BaseStation]:
        """Run a station; with enough devices, wait until it is served by all of them."""
        defaults = {"bind": self.bind, "state": self.folder / "bs", "deadline_s": 30.0, "threads": 1, "join_uses": None}
        station = BaseStation(StationSettings(bundle=bundle, **{**defaults, **settings}))
        self.loop.run(station.__aenter__())
        try:
            self.token = self.token or station.join_text
            while len(self.devices) < devices:
                self.add_device()
            if devices:
                self.wait(station, devices)
            yield station
        finally:
            self.loop.run(station.__aexit__(None, None, None))

    def add_device(self, *flags: str, node: Sequence[str] = NODE, lie: Lie | None = None) -> Device:
        """`node` is the program that it runs, `wdmoe-node` or one that behaves worse; with `lie`, one that lies."""
        name = f"device{len(self.devices)}"
        self.devices.append(Device(self.folder, name, self.token, *flags, node=node, lie=lie))
        return self.devices[-1]

    def wait(self, station: BaseStation, devices: int) -> None:
        """Until so many devices serve, and every expert is served."""

        def serving() -> set[str]:
            return {d.report.name for ds in station.control.roster.serving().values() for d in ds}

        async def settled() -> None:
            await station.wait_until_served(PATIENCE_S)
            while len(serving()) < devices:
                await asyncio.sleep(0.05)

        try:
            self.loop.run(settled(), PATIENCE_S + 5)
        except (TimeoutError, FutureTimeout, WdmoeError) as error:
            said = "\n".join(f"--- {each.name} ({each.process.poll()})\n{each.said()}" for each in self.devices)
            raise AssertionError(f"waited for {devices} devices, {serving()} serve\n{said}") from error

    def close(self) -> None:
        for device in self.devices:
            device.signal(signal.SIGCONT)
            device.process.terminate()
        for device in self.devices:
            device.process.wait(PATIENCE_S)
        self.loop.close()
