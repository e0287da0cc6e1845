"""A base station and devices by their commands, each a process, with HTTP."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from tests.lab.waiting import free_ports
from tools.bench.lab import NODE

START_S = 180.0


@contextlib.contextmanager
def cluster(
    folder: Path, source: Path, bundle: str, devices: int, words: Sequence[str] = ()
) -> Iterator[tuple[str, int]]:
    """A base station and its devices from these sources: its URL, once every expert is served, and its process.

    `words` are further flags of the base station.
    """
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    folder.mkdir()
    control, port = free_ports(2), free_ports(1)
    state = ["--state", str(folder / "bs")]
    station = ["-q", "bs", bundle, "--bind", f"tcp://127.0.0.1:{control}", "--http", f"127.0.0.1:{port}", *words]
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, words: Sequence[str]) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            processes.append(subprocess.Popen([*NODE, *words], env=environment, stdout=log, stderr=log))

    try:
        start("station", [*station, *state])
        url = f"http://127.0.0.1:{port}"
        wait_for(url, 0)
        made = [*NODE, "token", "create", *state]
        token = subprocess.run(made, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        for number in range(devices):
            own = ["--state", str(folder / f"d{number}"), "--cache", str(folder / "cache"), "--threads", "1"]
            start(f"d{number}", ["-q", "device", "--join", token, "--name", f"d{number}", *own])
        wait_for(url, devices)
        yield url, processes[0].pid
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)


def wait_for(url: str, devices: int) -> None:
    """Until so many devices serve everything; 0: until it answers at all."""
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s:
        with contextlib.suppress(httpx.HTTPError):
            health = httpx.get(f"{url}/health", timeout=5).json()
            if not devices or (health["status"] == "ok" and health["devices"] >= devices):
                return
        time.sleep(0.2)
    raise TimeoutError(f"{url} is not there after {START_S:.0f} s")
