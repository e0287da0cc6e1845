"""A base station and devices on this machine: real processes, real keys, the loopback interface.

with Fleet(plan, folder) as fleet:
    fleet.wait(print)
    fleet.client.stream(...)
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from wdmoe.config import LinkEmulation, ServingRules
from wdmoe.errors import TransportError
from wdmoe.nodes.local.process import Child, end_all
from wdmoe.nodes.local.station_client import StationClient

DEADLINE = "5s"  # for one layer: a full prefill chunk over a slow link takes a second, and nothing shall be lost
LEASE = "15s"  # ten processes may share two cores, and starting them is the busiest time
PREFILL_CHUNK = 64
STUCK_S = 300.0  # without any progress
FAREWELL_S = 5.0
LAST_WORDS_S = 1.0  # from when a process cannot be reached until it has surely ended
_POLL_S = 0.1
_SILENCE_S = 120.0
_DONE = re.compile(r"^Done: (.+)\n", re.MULTILINE)
_URL = re.compile(r"^HTTP: (http://\S+)/v1 ", re.MULTILINE)

T = TypeVar("T")
Tell = Callable[[str, float], None]  # (what is going on, fraction done)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """One device process."""

    name: str
    link: LinkEmulation
    memory_bytes: int  # offered to experts: its share and no more, or the first one would be given all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """One base station and its devices."""

    bundle: Path
    placement: str
    rules: ServingRules  # to begin with
    bandwidth_hz: float  # that the devices share, else 0
    cache: Path
    devices: tuple[DevicePlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowReading:
    """How likely one window of held-out text is to the model."""

    nats: float  # negative log-likelihood, summed over `tokens`
    tokens: int
    dropped_weight: float  # as in a receipt


class Fleet:
    """While it is open its processes run; afterwards none is left, however it was left."""

    client: StationClient
    _station: Child

    def __init__(self, plan: FleetPlan, folder: Path) -> None:
        """`folder` belongs to the fleet: keys, tokens and logs."""
        self._plan = plan
        self._folder = folder
        self._children: list[Child] = []
        self._commands = 0

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _undisturbed():
            end_all(self._children, FAREWELL_S)

    def start(self, tell: Tell) -> None:
        """Start everything and wait until every expert is served.

        Raises:
            ChildError: a process ended.
            TransportError: nothing moved for too long.
        """
        self._folder.mkdir(mode=0o700)
        self._station = self._start_station()
        self.client = StationClient(self._read(_URL, tell), _SILENCE_S)
        for device in self._plan.devices:
            self._start_device(device, self._folder / "state" / "join-token")  # it lies there before the URL is told
        self._wait_for(self._joined, tell)

    def serve_by(self, rules: ServingRules, *, rehearsal: bool = False) -> None:
        """Have the base station serve by other rules from now on.

        Args:
            rehearsal: decide on each token alone, as in an answer, and let no emulated link wait.
        Raises:
            ChildError: a process ended.
            TransportError: the base station refuses them.
        """
        self._command({"command": "serve", "rules": asdict(rules), "rehearsal": rehearsal}, "changing the rules")

    def read(self, window: int, length: int) -> WindowReading:
        """Have the model read a window of the held-out text that is shipped, by the rules of the moment.

        Args:
            window: which one, from 0.
            length: its tokens.
        Raises: as `serve_by`.
        """
        found = self._command({"command": "read", "window": window, "length": length}, f"reading window {window}")
        return WindowReading(
            nats=float(found["nats"]), tokens=int(found["tokens"]), dropped_weight=float(found["dropped_weight"])
        )

    def check(self, patience_s: float = 0.0) -> None:
        """Raises ChildError if one of the processes has ended, or does so within `patience_s`."""
        until_s = time.monotonic() + patience_s
        while True:
            for child in self._children:
                child.check()
            if time.monotonic() >= until_s:
                return
            time.sleep(_POLL_S)

    def _start_station(self) -> Child:
        placement = self._folder / "placement.json"
        placement.write_text(self._plan.placement)
        words = ["-v", "bs", str(self._plan.bundle.resolve()), "--bind", "tcp://127.0.0.1:*", "--http", "127.0.0.1:0"]
        words += ["--placement", str(placement), "--state", str(self._folder / "state"), *self._rules()]
        words += ["--deadline", DEADLINE, "--lease", LEASE, "--prefill-chunk", str(PREFILL_CHUNK), "--threads", "1"]
        words += ["--join-uses", str(len(self._plan.devices))]
        return self._start("base-station", [*words, "--commands"], listens=True)

    def _rules(self) -> list[str]:
        rules, band_hz = self._plan.rules, self._plan.bandwidth_hz
        words = ["--policy", rules.policy, "--rank", rules.rank, "--whole-layers", str(rules.whole_layers)]
        words += ["--budget", f"{rules.budget_s!r}s"] if rules.budget_s else []
        words += ["--budget-per-token", f"{rules.budget_per_token_s!r}s"] if rules.budget_per_token_s else []
        words += ["--max-dropped", repr(rules.max_dropped)] if rules.max_dropped else []
        return words + (["--bandwidth", f"{band_hz!r}Hz", "--allocation", rules.allocation] if band_hz else [])

    def _start_device(self, device: DevicePlan, token: Path) -> None:
        words = ["-v", "device", "--join", f"@{token}", "--name", device.name, "--threads", "1"]
        words += ["--state", str(self._folder / device.name), "--cache", str(self._plan.cache.resolve())]
        words += ["--memory", f"{device.memory_bytes}B", "--provider", "cpu"]
        words += [
            "--downlink",
            f"{device.link.downlink_bps:.0f}bit/s",
            "--uplink",
            f"{device.link.uplink_bps:.0f}bit/s",
        ]
        if device.link.downlink_snr_hz:
            words += ["--link-snr", f"{device.link.downlink_snr_hz!r}Hz/{device.link.uplink_snr_hz!r}Hz"]
        self._start(device.name, words)

    def _start(self, name: str, words: list[str], *, listens: bool = False) -> Child:
        child = Child(name, words, self._folder, listens=listens)
        self._children.append(child)
        return child

    def _command(self, message: Mapping[str, Any], words: str) -> Mapping[str, Any]:
        """Send the base station a command (`wdmoe.nodes.base_station.commands`) and wait for its answer."""
        self._station.tell(json.dumps(message))
        self._commands += 1

        def look() -> tuple[str | None, str, float]:
            done = _DONE.findall(self._station.out.read_text())
            return (done[-1] if len(done) == self._commands else None), words, 0.0

        answer: Mapping[str, Any] = json.loads(self._wait_for(look, lambda words, done: None))
        if "error" in answer:
            raise TransportError(f"the base station did not obey ({words}): {answer['error']}")
        return answer

    def _read(self, pattern: re.Pattern[str], tell: Tell) -> str:
        def look() -> tuple[str | None, str, float]:
            found = pattern.search(self._station.out.read_text())
            return (found[1] if found else None), "starting the base station", 0.0

        return self._wait_for(look, tell)

    def _joined(self) -> tuple[bool | None, str, float]:
        state = self.client.status()
        devices = [each for each in state["devices"] if each["attached"]]
        ready, experts, wanted = sum(each["ready"] for each in devices), int(state["experts"]), len(self._plan.devices)
        whole = state["state"] == "ok" and len(devices) == wanted and ready >= experts
        words = f"{len(devices)} of {wanted} devices joined, {min(ready, experts)} of {experts} experts loaded"
        return whole or None, words, min(ready / max(experts, 1), 1.0)

    def _wait_for(self, look: Callable[[], tuple[T | None, str, float]], tell: Tell) -> T:
        """Look again and again until there is something to be seen, and whether all processes are still there."""
        before, since_s = "", time.monotonic()
        while True:
            self.check()
            try:
                found, words, done = look()
            except TransportError:
                self.check(LAST_WORDS_S)  # why it ended says more than that it cannot be reached
                raise
            if found is not None:
                return found
            if words != before:
                before, since_s = words, time.monotonic()
                tell(words, done)
            elif time.monotonic() - since_s > STUCK_S:
                raise TransportError(f"nothing happened for {STUCK_S:.0f} s: {words}")
            time.sleep(_POLL_S)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not break off the clean-up that the first one began. It is short."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def held_experts(state: Mapping[str, Any]) -> dict[str, int]:
    """Device name -> experts it can run, from a status."""
    return {str(device["name"]): int(device["ready"]) for device in state["devices"]}
