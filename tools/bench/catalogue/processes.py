"""Processes of a cluster, and what they hold: descriptors, threads, children, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = Path(__file__).with_name("launch.py")


class Node:
    """A `wdmoe-node` process that can be signalled, killed and started again. Its output is appended to files."""

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix`: a command that runs the rest of its words, as `ip netns exec NAME` does."""
        self.name, self.words = name, list(words)
        self.out, self.log = folder / f"{name}.out", folder / f"{name}.log"
        self.environment, self.prefix = dict(environment or {}), list(prefix)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Node:
        """Call on the main thread: the process ends with the thread that started it."""
        own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        own |= {"TOKENIZERS_PARALLELISM": "false", "CATALOGUE_PARENT": str(os.getpid()), **self.environment}
        with self.out.open("ab") as out, self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, str(LAUNCH), *self.words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=own,
                start_new_session=True,
            )
        return self

    @property
    def alive(self) -> bool:
        """It was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id, 0 before the first start."""
        return self.process.pid if self.process is not None else 0

    def tree(self) -> list[psutil.Process]:
        """Itself and everything below it that lives."""
        try:
            own = psutil.Process(self.pid)
            return [own, *own.children(recursive=True)] if self.alive else []
        except psutil.Error:
            return []

    def worker(self) -> int:
        """The process that does the work: of a base station the one that was started last, by the others."""
        return max(self.tree(), key=_depth, default=psutil.Process()).pid if self.alive else self.pid

    def send(self, number: signal.Signals) -> None:
        """Send it to the process itself."""
        if self.alive:
            os.kill(self.pid, number)

    def send_all(self, number: signal.Signals) -> None:
        """Send it to the whole tree."""
        for each in self.tree():
            _send(each.pid, number)

    def kill(self) -> None:
        """kill -9, and wait for its end."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)

    def end(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 15.0) -> float | None:
        """Ask it to end. Seconds until it had; None where it had to be killed."""
        begun_s = time.monotonic()
        children = self.tree()
        self.send_all(signal.SIGCONT)
        self.send(number)
        try:
            if self.process is not None:
                self.process.wait(timeout_s)
            return time.monotonic() - begun_s
        except subprocess.TimeoutExpired:
            for each in children:
                _send(each.pid, signal.SIGKILL)
            self.kill()
            return None

    def said(self) -> str:
        """All that it logged and printed, over all its starts."""
        return "".join(each.read_text(errors="replace") for each in (self.log, self.out) if each.exists())


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a tree of processes holds."""

    processes: int = 0
    descriptors: int = 0
    threads: int = 0
    rss_bytes: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.processes + other.processes,
            self.descriptors + other.descriptors,
            self.threads + other.threads,
            self.rss_bytes + other.rss_bytes,
        )


def footprint(nodes: Iterable[Node]) -> Footprint:
    """Of all of them together. Processes that end meanwhile are left out."""
    total = Footprint()
    for process in (each for node in nodes for each in node.tree()):
        try:
            with process.oneshot():
                total += Footprint(1, process.num_fds(), process.num_threads(), process.memory_info().rss)
        except psutil.Error:
            continue
    return total


def _depth(process: psutil.Process) -> tuple[int, int]:
    try:
        return len(process.parents()), process.pid
    except psutil.Error:
        return 0, process.pid


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
