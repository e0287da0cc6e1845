"""A link for each device that can be spoilt. Two back ends; the results say which one ran.

`tap`: each device in a network namespace of its own, on a bridge, behind an emulator of frames (`emulator.py`). Needs
root, /dev/net/tun and the package iproute2. It can do everything.
`relay`: a TCP relay in this process for each device. It needs nothing, but it cannot lose or double frames: TCP would
repair that below it, so a lost frame is a stall here, and no device can move to another address.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from tools.bench.catalogue.relay import Relay


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One direction of a link. Shares are of frames."""

    cut: bool = False
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    rate_bps: float = 0.0  # 0: no limit


CLEAR = Way()


class Air(Protocol):
    """The links of all devices, by number."""

    name: str
    station_host: str

    def dial_host(self, number: int) -> str:
        """Where this device finds the base station."""
        ...

    def prefix(self, number: int) -> Sequence[str]:
        """What to run the device's command with."""
        ...

    def set(self, number: int, down: Way, up: Way) -> None:
        """From now on."""
        ...

    def flap(self, number: int, up: bool) -> None:
        """Take the carrier away, or give it back."""
        ...

    def move(self, number: int) -> str:
        """Give the device another address; "" where that cannot be done."""
        ...

    def close(self) -> None:
        """Take everything down. The processes must have ended."""
        ...


def why_no_tap() -> str:
    """What is missing for the back end `tap`; "" for nothing."""
    if os.geteuid() != 0:
        return "not root"
    if shutil.which("ip") is None:
        return "no ip: install the package iproute2"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun"
    tried = subprocess.run(["ip", "netns", "add", f"wdtry{os.getpid()}"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespaces: {tried.stderr.strip()}"
    _ip("netns", "del", f"wdtry{os.getpid()}")
    return ""


def open_air(devices: int, port: int, seed: int, *, relay: bool = False) -> Air:
    """The best back end that works here; which one, and why, goes to stderr."""
    missing = "asked for" if relay else why_no_tap()
    print(f"links: {'relay (' + missing + ')' if missing else 'tap'}", file=sys.stderr)
    return RelayAir(devices, port) if missing else TapAir(devices, seed)


class TapAir:
    """Namespaces, a bridge, and the emulator."""

    name = "tap"

    def __init__(self, devices: int, seed: int) -> None:
        self._run = f"wd{os.getpid() % 10000}"
        self._net = f"10.{random.SystemRandom().randrange(64, 128)}.{os.getpid() % 250}"
        self._moves = [0] * devices
        self.station_host = f"{self._net}.1"
        self._bridge = f"{self._run}br"
        taps = [f"{self._run}{side}{n}" for n in range(devices) for side in "ab"]
        words = [sys.executable, str(Path(__file__).with_name("emulator.py")), str(seed), *taps]
        self._emulator = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self._await("ready")
            self._wire(devices)
        except BaseException:
            self.close()
            raise

    def _wire(self, devices: int) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.station_host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for number in range(devices):
            near, far, space = f"{self._run}a{number}", f"{self._run}b{number}", self._space(number)
            _ip("netns", "add", space)
            _ip("link", "set", near, "master", self._bridge, "up")
            _ip("link", "set", far, "netns", space)
            _ip("-n", space, "link", "set", far, "name", "eth0")
            _ip("-n", space, "addr", "add", f"{self._address(number)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")

    def dial_host(self, number: int) -> str:
        return self.station_host

    def prefix(self, number: int) -> Sequence[str]:
        return ("ip", "netns", "exec", self._space(number))

    def set(self, number: int, down: Way, up: Way) -> None:
        order = {"link": number, "down": asdict(down), "up": asdict(up)}
        self._tell(json.dumps(order))
        self._await("done")

    def flap(self, number: int, up: bool) -> None:
        _ip("-n", self._space(number), "link", "set", "eth0", "up" if up else "down")

    def move(self, number: int) -> str:
        before = self._address(number)
        self._moves[number] += 1
        after = self._address(number)
        _ip("-n", self._space(number), "addr", "del", f"{before}/24", "dev", "eth0")  # it would take the new one along
        _ip("-n", self._space(number), "addr", "add", f"{after}/24", "dev", "eth0")
        return after

    def close(self) -> None:
        self._emulator.terminate()
        self._emulator.wait(10)
        for stream in (self._emulator.stdin, self._emulator.stdout):
            if stream is not None:
                stream.close()
        for number in range(len(self._moves)):
            subprocess.run(["ip", "netns", "del", self._space(number)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)

    def _space(self, number: int) -> str:
        return f"{self._run}n{number}"

    def _address(self, number: int) -> str:
        return f"{self._net}.{10 + number + 40 * (self._moves[number] % 5)}"

    def _tell(self, line: str) -> None:
        assert self._emulator.stdin is not None
        print(line, file=self._emulator.stdin, flush=True)

    def _await(self, word: str) -> None:
        assert self._emulator.stdout is not None
        heard = self._emulator.stdout.readline().strip()
        if heard != word:
            raise OSError(f"the emulator of links said {heard!r}, not {word!r}")


class RelayAir:
    """A relay for each device, at an address of its own of the loopback interface."""

    name = "relay"

    def __init__(self, devices: int, port: int) -> None:
        self.station_host = "127.0.0.1"
        self._relays = [
            [Relay(self.dial_host(number), each, ("127.0.0.1", each)) for each in (port, port + 1)]
            for number in range(devices)
        ]
        self._ways = [(CLEAR, CLEAR)] * devices

    def dial_host(self, number: int) -> str:
        return f"127.0.1.{10 + number}"

    def prefix(self, number: int) -> Sequence[str]:
        return ()

    def set(self, number: int, down: Way, up: Way) -> None:
        self._ways[number] = (down, up)
        for relay in self._relays[number]:
            relay.set(down, up)

    def flap(self, number: int, up: bool) -> None:
        """A carrier that is gone is a cut; one that comes back also ends the old connections."""
        down, back = self._ways[number]
        for relay in self._relays[number]:
            relay.set(replace(down, cut=not up), replace(back, cut=not up))
            if up:
                relay.reset()

    def flip(self, number: int, pieces: int) -> None:
        """Flip one bit in each of the next pieces on the device's data connection."""
        self._relays[number][1].flip = pieces

    def move(self, number: int) -> str:
        for relay in self._relays[number]:
            relay.reset()
        return ""

    def close(self) -> None:
        for relay in (each for pair in self._relays for each in pair):
            relay.close()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
