"""Trouble with the lists of a station that serves, and revocations in earnest: real devices, sockets and folders."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.lab.families import save_tiny
from tests.lab.fleet import NODE, Device
from tests.lab.waiting import PATIENCE_S, free_ports
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.transport.security.keys import new_key_pair
from wdmoe.transport.security.station_state import make_or_open_state, open_state

DESCRIPTORS = 160  # of the station: so few that raw connections use them up
CONNECTIONS = 1000
NAMES = ("kitchen", "attic")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export_bundle(save_tiny("mixtral", folder / "checkpoint"), folder / "bundle", ExportSettings())
    return folder / "bundle"


class Cell:
    """A `bs` process with few descriptors, and two device processes."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.state = folder / "bs"
        make_or_open_state(self.state)
        self.control, http = free_ports(2), free_ports(1)
        self.url = f"http://127.0.0.1:{http}"
        words = ["-v", "bs", str(bundle), "--bind", f"tcp://127.0.0.1:{self.control}", "--state", str(self.state)]
        words += ["--http", f"127.0.0.1:{http}", "--threads", "1", "--lease", "20s"]
        self.log = folder / "bs.log"
        with self.log.open("wb") as log:
            limit = f'ulimit -n {DESCRIPTORS}; exec "$@"'  # hard and soft, before it starts
            self.process = subprocess.Popen(["sh", "-c", limit, "sh", *NODE, *words], stdout=log, stderr=log)
        until(lambda: "HTTP: " in self.said())
        token = f"@{self.state / 'join-token'}"
        self.devices = [Device(folder, name, token, "--memory", "64MiB", "--provider", "cpu") for name in NAMES]
        until(lambda: self.joined() == 2)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/wdmoe/status", timeout=PATIENCE_S).json())

    def joined(self) -> int:
        return len(self.status()["devices"])

    def close(self) -> None:
        for process in (*(device.process for device in self.devices), self.process):
            process.send_signal(signal.SIGTERM)
        for process in (*(device.process for device in self.devices), self.process):
            process.wait(PATIENCE_S)


@pytest.fixture
def cell(tmp_path: Path, bundle: Path) -> Iterator[Cell]:
    cell = Cell(tmp_path, bundle)
    yield cell
    cell.close()


def until(condition: Callable[[], bool], tell: Callable[[], str] = str) -> None:
    limit_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit_s, tell()
        time.sleep(0.05)


def test_trouble_with_the_lists_sends_nobody_away_and_a_revocation_does(cell: Cell) -> None:
    """Each of these told every device that it was revoked; then each ended for good, and none came back."""
    devices, state = cell.state / "devices", cell.state
    devices.rename(state / "aside")
    time.sleep(1.0)
    assert cell.status()["allow_list_faults"] == 1
    shown = subprocess.run([*NODE, "status", "--url", cell.url], check=True, capture_output=True, text=True)
    assert "1 files of the allow list cannot be read" in shown.stdout
    (state / "aside").rename(devices)

    file = next(devices.iterdir())
    file.rename(state / "aside")
    time.sleep(1.5)
    (state / "aside").rename(file)

    with ExitStack() as flood:
        for _ in range(CONNECTIONS):
            raw = flood.enter_context(socket.socket())
            raw.setblocking(False)
            raw.connect_ex(("127.0.0.1", cell.control))
        used_up_within(cell.process.pid, 5.0)
        open_state(state).admission.admit(new_key_pair().public, "newcomer")  # any change: the list is read again
        time.sleep(1.0)
    assert all(device.process.poll() is None for device in cell.devices)
    assert not any("revoked" in device.said() for device in cell.devices)
    until(lambda: cell.joined() == 2)
    assert cell.said().count("devices cannot be read (No such file") == 1
    assert cell.said().count("it is gone. That revokes nothing") == 1
    assert "Traceback" not in cell.said()

    kitchen, attic = cell.devices
    subprocess.run([*NODE, "token", "revoke", "kitchen", "--state", str(state)], check=True, capture_output=True)
    until(lambda: cell.joined() == 1)
    until(lambda: "sent this device away: this device's key is revoked; trying again in" in kitchen.said())
    assert kitchen.process.poll() is attic.process.poll() is None

    # It goes on asking, so it is back when it is admitted again, without anybody going there.
    name = kitchen_file(state)
    name.rename(devices / name.name)
    until(lambda: cell.joined() == 2, lambda: f"{cell.said()}\n{kitchen.said()}")
    assert kitchen.process.poll() is None


def used_up_within(pid: int, limit_s: float) -> None:
    """Wait until a process has no descriptor left; a station that bounds its connections keeps some."""
    limit_s += time.monotonic()
    while len(os.listdir(f"/proc/{pid}/fd")) < DESCRIPTORS - 8 and time.monotonic() < limit_s:
        time.sleep(0.05)


def kitchen_file(state: Path) -> Path:
    return next(file for file in (state / "revoked").iterdir() if '"kitchen"' in file.read_text())
