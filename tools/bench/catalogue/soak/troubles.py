"""Random trouble for a cluster that has to live with it. Each one begins, lasts for a moment, and is taken back."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.bench.catalogue.air import CLEAR, Way
from tools.bench.catalogue.cluster import Cluster
from tools.bench.catalogue.faults.outsiders import raw_connections, stolen_keys
from tools.bench.catalogue.launch import LIES
from tools.bench.catalogue.processes import ROOT

Trouble = Callable[[Cluster, random.Random], contextlib.AbstractContextManager[str]]


@contextlib.contextmanager
def kill(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """kill -9 of a device, which is started again."""
    node = cluster.victim(rng)
    node.kill()
    try:
        yield node.name
    finally:
        node.start()


@contextlib.contextmanager
def freeze(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """SIGSTOP, SIGCONT."""
    node = cluster.victim(rng)
    node.send_all(signal.SIGSTOP)
    try:
        yield node.name
    finally:
        node.send_all(signal.SIGCONT)


@contextlib.contextmanager
def cut(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """One or two cables, both ways or one."""
    assert cluster.air is not None
    numbers = rng.sample(range(cluster.spec.devices), rng.choice((1, 1, 2)))
    down, up = Way(cut=rng.random() < 0.8), Way(cut=True)
    for number in numbers:
        cluster.air.set(number, down, up)
    try:
        yield f"{numbers}{'' if down.cut else ' one way'}"
    finally:
        for number in numbers:
            cluster.air.set(number, CLEAR, CLEAR)


@contextlib.contextmanager
def bad_air(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """Loss, delay, disorder on all links."""
    assert cluster.air is not None
    way = Way(loss=rng.choice((0, 0.02)), delay_s=0.003, jitter_s=0.003, reorder=0.1, duplicate=0.05)
    for number in range(cluster.spec.devices):
        cluster.air.set(number, way, way)
    try:
        yield f"loss {way.loss:g}"
    finally:
        for number in range(cluster.spec.devices):
            cluster.air.set(number, CLEAR, CLEAR)


@contextlib.contextmanager
def slow(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """A device that takes its time."""
    node, delay_s = cluster.victim(rng), rng.choice((0.05, 0.2, 0.5))
    cluster.order(node.name, delay_s=delay_s)
    try:
        yield f"{node.name} {delay_s:g} s"
    finally:
        cluster.order(node.name)


@contextlib.contextmanager
def lie(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """A device that lies; an honest one takes its place."""
    node, kind = cluster.victim(rng), rng.choice(LIES)
    cluster.order(node.name, lie=kind)
    try:
        yield f"{node.name} {kind}"
    finally:
        cluster.renew(node)


@contextlib.contextmanager
def flood(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """Valid messages from an admitted key, for a second."""
    plane = rng.choice(("control", "data"))
    endpoint = f"tcp://{cluster.host}:{cluster.port + (plane == 'data')}"
    keys = str(stolen_keys(cluster))
    words = [sys.executable, str(Path(__file__).parents[1] / "flood.py"), endpoint, plane, "1.0", keys]
    subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False)
    yield plane


@contextlib.contextmanager
def raw(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """Silent TCP connections to one of the ports."""
    port, host = rng.choice(((cluster.port, cluster.host), (cluster.http, "127.0.0.1")))
    with raw_connections(host, port, rng.choice((20, 150))):
        yield "HTTP" if port == cluster.http else "control"


@contextlib.contextmanager
def guest(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """A device more, which leaves again."""
    node = cluster.device(f"guest{rng.randrange(4)}").start()
    cluster.devices.append(node)
    try:
        yield node.name
    finally:
        node.end()
        cluster.devices.remove(node)


@contextlib.contextmanager
def no_list(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """The allow list is away for a moment."""
    folder = cluster.state / "devices"
    away = folder.with_name("devices-away")
    folder.rename(away)
    try:
        time.sleep(rng.uniform(0.2, 1.0))
    finally:
        away.rename(folder)
    yield "devices/"


@contextlib.contextmanager
def garbage(cluster: Cluster, rng: random.Random) -> Iterator[str]:
    """Requests that are none, to the HTTP port."""
    pieces = (
        rng.randbytes(400),
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\n\r\n{{{{{",
    )
    for _ in range(10):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", cluster.http), 2) as connection:
            connection.sendall(rng.choice(pieces))
    yield ""


_ALL: tuple[Trouble, ...] = (kill, freeze, cut, bad_air, slow, lie, flood, raw, guest, no_list, garbage)
TROUBLES: dict[str, Trouble] = {trouble.__name__: trouble for trouble in _ALL}
