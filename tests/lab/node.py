"""`wdmoe-node` processes that run until they are stopped, and a base station with its devices as people start them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.lab.fleet import NODE
from tests.lab.waiting import PATIENCE_S, free_ports

# Without the certificates that httpx would read for each request: looks that take 50 ms miss what happens meanwhile.
PLAIN: dict[str, Any] = {"timeout": PATIENCE_S, "verify": False}


class Node:
    """A `wdmoe-node` process that runs until it is stopped."""

    def __init__(self, folder: Path, name: str, *words: str, command: Sequence[str] = NODE) -> None:
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen([*command, *words], stdout=out, stderr=err, env=environment)

    def wait_for(self, pattern: str) -> str:
        """The first group of `pattern` once standard output has it."""
        limit = time.monotonic() + PATIENCE_S
        while time.monotonic() < limit and self.process.poll() is None:
            if found := re.search(pattern, self.out.read_text()):
                return found[1]
            time.sleep(0.05)
        raise TimeoutError(f"no {pattern} in {self.out.read_text()} {self.err.read_text()}")

    def stop(self, number: signal.Signals) -> str:
        """End it as a person or a service manager would; gives what it logged."""
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE_S) == 0, self.err.read_text()
        log = self.err.read_text()
        assert "Traceback" not in log
        return log

    def close(self) -> None:
        """End it whatever it does."""
        self.process.kill()
        self.process.wait(PATIENCE_S)


@dataclass
class Answer:
    """What one request was told, and when its last byte came."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)  # of a stream; or the one body
    cut: str = ""  # how the connection broke, if it did
    done: bool = False  # "[DONE]" was seen, or the body was whole
    ended_s: float = 0.0  # monotonic

    @property
    def tokens(self) -> list[int]:
        """Token ids of a stream."""
        return [each["wdmoe"]["token_id"] for each in self.events if "token_id" in each.get("wdmoe", {})]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(each["choices"][0]["text"] for each in self.events if each.get("choices"))

    @property
    def error(self) -> str:
        """The code of the error that ended it; "" for none."""
        last = self.events[-1] if self.events else {}
        return str(last["error"]["code"]) if "error" in last else ""

    @property
    def receipt(self) -> dict[str, Any]:
        """Of a whole answer."""
        receipt: dict[str, Any] = self.events[-1]["wdmoe"]
        return receipt


class Asking:
    """A request that runs in a thread beside the test."""

    def __init__(self, url: str, **body: Any) -> None:
        self.answer = Answer()
        self._url, self._body = url, {"prompt": "hello", "temperature": 0, "ignore_eos": True, **body}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait(self) -> Answer:
        """Its end."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.answer

    def wait_for_tokens(self, count: int) -> None:
        """Until so many came; a request that is not streamed: until it is in work, more or less."""
        until(lambda: len(self.answer.tokens) >= count or bool(self.answer.ended_s))
        assert not self.answer.ended_s, self.answer

    def _run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, **PLAIN) as response:
                self.answer.status, self.answer.headers = response.status_code, response.headers
                if self._body.get("stream") and response.status_code == 200:
                    self._read_events(response)
                else:
                    self.answer.events.append(json.loads(response.read()))
                    self.answer.done = True
        except httpx.HTTPError as error:
            self.answer.cut = repr(error)
        self.answer.ended_s = time.monotonic()

    def _read_events(self, response: httpx.Response) -> None:
        for line in response.iter_lines():
            if line == "data: [DONE]":
                self.answer.done = True
            elif line.startswith("data: "):
                self.answer.events.append(json.loads(line[6:]))


class Station:
    """`wdmoe-node bs` and its devices, as processes."""

    def __init__(self, folder: Path, bundle: Path, *words: str) -> None:
        self._folder = folder
        bind = f"tcp://127.0.0.1:{free_ports(2)}"
        flags = ("--bind", bind, "--http", "127.0.0.1:0", "--state", str(folder / "bs"), "--print-token")
        self.node = Node(folder, "station", "bs", str(bundle), *flags, *words)
        self.devices: list[Node] = []
        self.url = self.node.wait_for(r"HTTP: (http://\S+)/v1")
        kept = folder / "bs" / "join-token"
        self.token = kept.read_text().strip() if kept.exists() else self.node.wait_for(r"Join token.*: (\S+)")

    def add_devices(self, *flags: str, count: int = 2) -> None:
        """Start them, and wait until every expert is served by two."""
        for number in range(count):
            self.add_device(f"device{number}", *flags)
        until(lambda: self.is_served(count))

    def add_device(self, name: str, *flags: str, command: Sequence[str] = NODE) -> None:
        """Start one, and do not wait."""
        words: tuple[str, ...] = ("device", "--join", self.token, "--name", name, "--state", str(self._folder / name))
        words += ("--cache", str(self._folder / "cache"), "--threads", "1", *flags)
        self.devices.append(Node(self._folder, name, *words, command=command))

    def is_served(self, devices: int) -> bool:
        """Whether so many devices hold all they shall hold."""
        state = self.status()
        placed = [each for each in state["devices"] if each["attached"] and each["ready"] >= each["experts"] > 0]
        return state["state"] == "ok" and len(placed) >= devices

    def status(self) -> dict[str, Any]:
        """What /wdmoe/status says."""
        status: dict[str, Any] = httpx.get(f"{self.url}/wdmoe/status", **PLAIN).json()
        return status

    def health(self) -> tuple[int, str]:
        """Code and word."""
        said = httpx.get(f"{self.url}/health", **PLAIN)
        return said.status_code, said.json()["status"]

    def ask(self, **body: Any) -> Asking:
        """A request in a thread of its own."""
        return Asking(self.url, **body)

    @property
    def engine_pid(self) -> int:
        """The process of the model."""
        return int(self.status()["engine"]["pid"])

    def family(self) -> list[psutil.Process]:
        """The station's process and all below it."""
        own = psutil.Process(self.node.process.pid)
        return [own, *own.children(recursive=True)]

    def close(self) -> None:
        """End everything."""
        for node in (*self.devices, self.node):
            node.close()


@contextmanager
def station(folder: Path, bundle: Path, *words: str) -> Iterator[Station]:
    """A station that is gone when the block ends."""
    made = Station(folder, bundle, *words)
    try:
        yield made
    finally:
        made.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.05)
