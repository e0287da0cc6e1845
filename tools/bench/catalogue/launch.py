"""Starts `wdmoe-node WORDS` for the catalogue: it ends with its parent, and may be told to misbehave.

The environment says what is special about this process:

    CATALOGUE_PARENT       end when this process ends
    CATALOGUE_DESCRIPTORS  hard limit of open descriptors
    CATALOGUE_PROTOCOL     protocol version to speak in place of the real one
    CATALOGUE_ORDERS       file of orders, read again when it changes: {"lie": KIND, "delay_s": S, "hog_bytes": N}

A device that lies is a real one whose sums are spoilt on their way out: keys, wire and sessions are the real ones.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

LIES = ("nan", "inf", "zeros", "shape", "huge", "foreign", "stale", "noise", "factor")
_PR_SET_PDEATHSIG = 1


class Orders:
    """The newest orders; a file that is not there orders nothing."""

    def __init__(self, path: str) -> None:
        self._path, self._seen_ns = path, -1
        self._orders: dict[str, Any] = {}
        self._hoard: list[bytearray] = []

    def hoard(self) -> None:
        """Take memory when told to, and keep it; on a thread of its own."""
        while True:
            time.sleep(0.05)
            if size := int(self.now().get("hog_bytes", 0)):
                self._hoard.append(bytearray(b"\1") * size)

    def now(self) -> dict[str, Any]:
        try:
            changed_ns = os.stat(self._path).st_mtime_ns
            if changed_ns != self._seen_ns:
                with open(self._path, encoding="utf-8") as file:
                    self._orders = json.load(file)
                self._seen_ns = changed_ns
        except (OSError, ValueError):
            self._orders, self._seen_ns = {}, -1
        return self._orders


def main() -> None:
    _end_with(int(os.environ.pop("CATALOGUE_PARENT", "0")))
    if limit := int(os.environ.pop("CATALOGUE_DESCRIPTORS", "0")):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 256), limit))
    if version := int(os.environ.pop("CATALOGUE_PROTOCOL", "0")):
        _speak(version)
    if path := os.environ.pop("CATALOGUE_ORDERS", ""):
        _obey(Orders(path))
    from wdmoe.cli.main import main as node

    node()


def _end_with(parent: int) -> None:
    if parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)


def _speak(version: int) -> None:
    """Another version in the first byte of everything, both ways."""
    from wdmoe.transport.codec import framing, messages, wire

    for module in (messages, wire, framing):
        if hasattr(module, "PROTOCOL_VERSION"):
            vars(module)["PROTOCOL_VERSION"] = version
    wire._START.update({number: bytes((version, number)) for number in wire._START})


def _obey(orders: Orders) -> None:
    """Put the orders between the real experts and the real wire."""
    from wdmoe.moe.expert import ExpertRunner

    honest = ExpertRunner.run
    last: dict[Any, Any] = {}

    def run(self: Any, run: Any) -> Any:
        now = orders.now()
        kind = now.get("lie", "")
        partial = honest(self, _of_others(run, self) if kind == "foreign" else run)
        if delay_s := float(now.get("delay_s", 0.0)):
            time.sleep(delay_s)
        before = last.get((run.layer, partial.shape), partial)
        last[run.layer, partial.shape] = partial
        return _spoilt(kind, partial, before)

    setattr(ExpertRunner, "run", run)  # noqa: B010 - mypy takes an assignment for a mistake
    threading.Thread(target=orders.hoard, daemon=True, name="hoard").start()


def _of_others(run: Any, runner: Any) -> Any:
    """The same work by other experts of the layer than were asked for."""
    from dataclasses import replace

    others = [each.expert for each in runner.loaded() if each.layer == run.layer and each.expert not in run.experts]
    experts = (*others, *run.experts)[: len(run.experts)]
    return replace(run, experts=tuple(experts))


def _spoilt(kind: str, partial: Any, before: Any) -> Any:
    import numpy as np

    if kind in ("nan", "inf"):
        return np.full_like(partial, np.nan if kind == "nan" else np.inf)
    if kind == "zeros":
        return np.zeros_like(partial)
    if kind == "shape":
        return np.ascontiguousarray(partial[:, :-1])
    if kind == "huge":
        return np.full_like(partial, 1e30)
    if kind == "stale":
        return before
    if kind == "noise":
        noise = np.random.default_rng(time.time_ns()).standard_normal(partial.shape)
        scale = np.linalg.norm(partial) / max(float(np.linalg.norm(noise)), 1e-9)
        return (noise * scale).astype(partial.dtype)
    return (partial * 1.5).astype(partial.dtype) if kind == "factor" else partial


if __name__ == "__main__":
    main()
