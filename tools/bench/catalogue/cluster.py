"""A base station and its devices as processes, CURVE on, and the questions they can be asked."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.lab.waiting import free_ports
from tools.bench.catalogue.air import Air, open_air
from tools.bench.catalogue.checker import Truth
from tools.bench.catalogue.client import Client, fetch
from tools.bench.catalogue.model import Model, Question
from tools.bench.catalogue.processes import LAUNCH, ROOT, Footprint, Node, footprint
from tools.bench.catalogue.records import Answer, Bounds, ClusterSpec

SITE = Path(__file__).with_name("site")  # what every process of the base station imports first
START_S = 120.0
LEASE = "2s"
PREFILL_CHUNK = 16  # so that a prompt takes as many passes as an answer of ten tokens
WHOLE_TOKENS = 24


class ClusterError(Exception):
    """The cluster does not come up, or not back."""


class Cluster:
    """Open it with `start`, close it with `close`. All methods are for the main thread."""

    def __init__(self, spec: ClusterSpec, model: Model, folder: Path, bounds: Bounds, seed: int) -> None:
        """`folder` is made: keys, caches and logs."""
        self.spec, self.model, self.folder, self.bounds = spec, model, folder, bounds
        folder.mkdir(parents=True)
        self.port = free_ports(3)  # control, data, HTTP
        self.http = self.port + 2
        self.air: Air | None = open_air(spec.devices, self.port, seed, relay=spec.relay) if spec.air else None
        self.host = self.air.station_host if self.air else "127.0.0.1"
        self.notes = self._unknown_flags()
        self.station = Node("bs", self._station_words(), folder, self._station_environment())
        self.devices: list[Node] = []
        self.texts: dict[tuple[Question, int], str] = {}
        self.prefill_s = 1.0
        self.token_s = 0.1
        self.start_s = 0.0
        self.busy: set[str] = set()  # devices that worked on the last whole answer
        self.base = Footprint()
        self.station_base = Footprint()

    # ---- up and down

    def start(self) -> Cluster:
        """Start all, wait until everything is served, learn how long things take, and measure the base line."""
        begun_s, patience_s = time.monotonic(), START_S + 5 * self.spec.devices
        self.station.start()
        self.wait_for(lambda: self.status() is not None, START_S, "the base station does not answer")
        for number in range(self.spec.devices):
            self.devices.append(self.device(f"device{number}", number).start())
        if self.settle(patience_s) is None:
            raise ClusterError(f"not every expert is served after {patience_s:.0f} s: {self.trouble()}")
        self.start_s = time.monotonic() - begun_s
        self._warm_up()
        return self

    def close(self) -> None:
        """End everything, devices first."""
        nodes = [*self.devices, self.station]
        for node in nodes:
            node.send_all(signal.SIGCONT)
            node.send(signal.SIGTERM)
        for node in nodes:
            node.end(signal.SIGCONT, timeout_s=5.0)
        if self.air:
            self.air.close()

    def device(self, name: str, number: int = 0, *words: str, host: str = "") -> Node:
        """A device that is not started yet. `host`: where it dials, in place of the usual address."""
        at = host or (self.air.dial_host(number) if self.air else self.host)
        endpoint = f"tcp://{at}:{self.port}"
        join = ["--join", endpoint, "--insecure"] if self.spec.insecure else ["--join", f"@{self.token(endpoint)}"]
        own = ["--state", str(self.folder / name), "--cache", str(self.folder / name / "cache")]
        environment = {"CATALOGUE_ORDERS": str(self.orders_file(name)), **self._clock(name)}
        prefix = self.air.prefix(number) if self.air and not host else ()
        line = ["-v", "device", *join, "--name", name, "--provider", "cpu", *own, *words]
        return Node(name, line, self.folder, environment, prefix)

    def token(self, endpoint: str) -> Path:
        """A file with a join token for devices that dial this address."""
        file = self.folder / f"token-{endpoint.rpartition('/')[2].replace(':', '-')}"
        if not file.exists():
            made = self.command("token", "create", "--state", str(self.state), "--endpoint", endpoint, "--uses", "999")
            if made.returncode:
                raise ClusterError(f"no join token: {made.stderr.strip()}")
            file.touch(mode=0o600)
            file.write_text(made.stdout.strip())
        return file

    @property
    def state(self) -> Path:
        """The station's folder of keys and lists."""
        return self.folder / "bs"

    def command(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run another `wdmoe-node` command to its end."""
        return run_command(*words, timeout_s=timeout_s)

    # ---- what is going on

    def status(self) -> Any:
        """Of the base station; None while it does not answer."""
        found = fetch(self.http, "/wdmoe/status")
        return found if isinstance(found, dict) else None

    def wanted_names(self) -> list[str]:
        """Devices that should take part: whose process lives."""
        return sorted(node.name for node in self.devices if node.alive)

    def trouble(self) -> str:
        """What is not as it should be; "" where all is."""
        state = self.status()
        if state is None:
            return "the base station does not answer"
        names = sorted(each["name"] for each in state["devices"])
        if names != self.wanted_names():
            return f"devices in status: {', '.join(names) or 'none'}; alive: {', '.join(self.wanted_names())}"
        if state["unserved"]:
            return f"{state['unserved']} experts are not served"
        busy = [each["name"] for each in state["devices"] if each["ready"] != each["experts"] or not each["attached"]]
        return f"not settled: {', '.join(busy)}" if busy else ""

    def settle(self, timeout_s: float) -> float | None:
        """Until all is as it should be, three times in a row. Seconds that took; None where it never was."""
        begun_s, good = time.monotonic(), 0
        while time.monotonic() - begun_s < timeout_s:
            good = 0 if self.trouble() else good + 1
            if good == 3:
                return max(time.monotonic() - begun_s - 0.3, 0.0)
            time.sleep(0.1)
        return None

    def wait_for(self, what: Callable[[], object], timeout_s: float, complaint: str) -> None:
        """Until it is true. Raises ClusterError with the last lines of the station's log."""
        until_s = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > until_s:
                raise ClusterError(f"{complaint}; its log ends: {self.station.said()[-600:]}")
            time.sleep(0.1)

    def holders(self) -> dict[str, set[tuple[int, int]]]:
        """Name of a device -> (layer, expert) that it holds."""
        from wdmoe.solver.placement.file import read_placement

        state = self.status() or {"placement": ""}
        return {
            name: {(layer, expert) for layer, expert in held}
            for name, held in read_placement(state["placement"]).items()
        }

    def leftovers(self) -> list[str]:
        """S5: what is there and was not before. Waits a little for what ends by itself."""
        until_s = time.monotonic() + 5.0
        while (found := self._more_than_before()) and time.monotonic() < until_s:
            time.sleep(0.25)
        return found

    def _more_than_before(self) -> list[str]:
        found = []
        for who, now, base in (
            ("base station", footprint([self.station]), self.station_base),
            ("all", footprint([self.station, *self.devices]), self.base),
        ):
            if now.descriptors > base.descriptors + self.bounds.descriptors:
                found.append(f"{who}: {now.descriptors - base.descriptors} descriptors more")
            if now.threads > base.threads + self.bounds.threads:
                found.append(f"{who}: {now.threads - base.threads} threads more")
            if now.processes > base.processes:
                found.append(f"{who}: {now.processes - base.processes} processes more")
        return found

    # ---- questions

    def ask(self, question: Question, tokens: int, *, streamed: bool = True) -> Client:
        """A client that has begun."""
        return Client(self.http, question, tokens, streamed=streamed).go()

    def heard(self, answer: Answer) -> None:
        """Remember who worked on it."""
        if answer.complete and answer.devices:
            self.busy = set(answer.devices)

    def victim(self, rng: random.Random) -> Node:
        """A device that works: one that only stands by would not be missed."""
        alive = [node for node in self.devices if node.alive]
        return rng.choice([node for node in alive if node.name in self.busy] or alive)

    def truth(self, question: Question, tokens: int) -> Truth:
        """What the right answer is."""
        return Truth(ids=question.answer[:tokens], text=self.texts.get((question, tokens), ""))

    def orders_file(self, name: str) -> Path:
        """Where a device reads how it shall misbehave."""
        return self.folder / f"{name}.orders"

    def order(self, name: str, **orders: Any) -> None:
        """Have a device misbehave; nothing: have it behave again."""
        file = self.orders_file(name)
        if not orders:
            file.unlink(missing_ok=True)
            return
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(orders))
        fresh.replace(file)

    def renew(self, node: Node) -> None:
        """An honest device in place of one that was told to lie, with another key: the old one may be in quarantine."""
        self.order(node.name)
        node.kill()
        shutil.rmtree(self.folder / node.name, ignore_errors=True)
        time.sleep(0.1)
        node.start()

    def measure_base(self) -> None:
        """From now on this is what nothing left over means."""
        self.station_base = footprint([self.station])
        self.base = footprint([self.station, *self.devices])

    # ---- inside

    def _warm_up(self) -> None:
        """Fill what is filled once: pools, caches, connections. Learn the texts of whole answers."""
        for question in self.model.questions:
            answer = self._calm(question, WHOLE_TOKENS)
            self.texts[question, WHOLE_TOKENS] = answer.text
            self.prefill_s = answer.times_s[0] - answer.asked_s
            self.token_s = (answer.times_s[-1] - answer.times_s[0]) / (len(answer.times_s) - 1)
            self.heard(answer)
        several = [self.ask(q, 8, streamed=s) for q in self.model.questions for s in (True, False)]
        for client in several:
            client.join(self.bounds.patience_s)
        time.sleep(0.5)
        self.measure_base()

    def _calm(self, question: Question, tokens: int) -> Answer:
        client = self.ask(question, tokens)
        client.join(self.bounds.patience_s)
        if tuple(client.answer.ids) != question.answer[:tokens]:
            raise ClusterError(f"without any fault the answer is not the undivided model's: {client.answer}")
        return client.answer

    def _station_words(self) -> list[str]:
        spec, host = self.spec, self.host
        words = ["-v", "bs", str(self.model.bundle), "--bind", f"tcp://{host}:{self.port}"]
        words += ["--http", f"127.0.0.1:{self.http}", "--state", str(self.folder / "bs"), "--threads", "1"]
        words += ["--copies", str(spec.copies), "--lease", LEASE, "--prefill-chunk", str(PREFILL_CHUNK)]
        words += ["--insecure"] if spec.insecure else []
        return [*words, *spec.flags, *self._known_flags()]

    def _known_flags(self) -> list[str]:
        pairs = zip(self.spec.optional[::2], self.spec.optional[1::2], strict=True)
        return [word for pair in pairs if pair[0] in help_of("bs") for word in pair]

    def _unknown_flags(self) -> list[str]:
        missing = [flag for flag in self.spec.optional[::2] if flag not in help_of("bs")]
        return [f"this `bs` has no {flag}" for flag in missing]

    def _station_environment(self) -> dict[str, str]:
        limit = {"CATALOGUE_DESCRIPTORS": str(self.spec.descriptors)} if self.spec.descriptors else {}
        stall = {"CATALOGUE_STALL_S": "1.0", "PYTHONPATH": f"{ROOT}{os.pathsep}{SITE}"}
        return {**limit, **stall, **self._clock("bs")}

    def set_clock(self, name: str, seconds: int) -> None:
        """Move the wall clock of this process so far from the right time, at once."""
        with self._clock_file(name).open("r+b") as file:
            file.write(struct.pack("q", seconds))

    def _clock_file(self, name: str) -> Path:
        return self.folder / f"{name}.clock"

    def _clock(self, name: str) -> dict[str, str]:
        if not self.spec.clocks:
            return {}
        self._clock_file(name).write_bytes(bytes(8))
        return {"LD_PRELOAD": str(clock_library(self.folder)), "CATALOGUE_CLOCK": str(self._clock_file(name))}


def run_command(*words: str, timeout_s: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a `wdmoe-node` command to its end."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    line = [sys.executable, str(LAUNCH), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, env=own, check=False)


@functools.cache
def help_of(command: str) -> str:
    """What `wdmoe-node COMMAND --help` says: which flags there are."""
    return run_command(command, "--help").stdout


def clock_library(folder: Path) -> Path:
    """`clock_shim.c`, compiled. Raises ClusterError where there is no C compiler."""
    library = folder / "clock_shim.so"
    if not library.exists():
        source = Path(__file__).with_name("clock_shim.c")
        words = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ClusterError(f"no clock that can be set: cc is needed ({error})") from error
    return library
