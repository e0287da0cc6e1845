"""What somebody who can reach the ports, or the state folder, can do to everybody else."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tools.bench.catalogue.checker import Expected
from tools.bench.catalogue.client import fetch
from tools.bench.catalogue.cluster import Cluster
from tools.bench.catalogue.fault import Fault, Scene
from tools.bench.catalogue.processes import ROOT
from tools.bench.catalogue.records import ClusterSpec

FLOOD_S = 2.0
STRANGER = "127.0.0.9"  # the address that attackers come from; clients come from 127.0.0.1


class Flood(Fault):
    id = "I1"
    title = "a peer with a valid key floods the base station for 2 s and vanishes"
    passes = "the base station lives; answers are exact"
    cost_s = 4.0
    copies = (2,)
    planes = ("control", "data")
    memory_bytes = 400 << 20  # what was unread at once stays with the allocator; tools/bench/floods says how much

    def inject(self, scene: Scene) -> None:
        cluster = scene.cluster
        plane = scene.choose(self.planes)
        before = cluster.station.worker()
        endpoint = f"tcp://{cluster.host}:{cluster.port + (plane == 'data')}"
        words = [sys.executable, str(Path(__file__).parents[1] / "flood.py"), endpoint, plane, str(FLOOD_S)]
        words.append("-" if cluster.spec.insecure else str(stolen_keys(cluster)))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
        scene.require(done.returncode == 0, f"the flood itself failed: {done.stderr[-200:]}")
        time.sleep(1.3)  # libzmq meets the end of the connection when it writes
        alive = cluster.station.alive and cluster.station.worker() == before
        scene.require(alive, "the base station, or its worker, was ended by the flood")

    def heal(self, scene: Scene) -> None:
        if not scene.cluster.station.alive:
            scene.cluster.station.start()

    def expected(self, scene: Scene) -> Expected:
        return Expected(exact=True, stall_s=scene.bounds.stall_s + FLOOD_S)


class OpenFlood(Flood):
    id = "I1b"
    title = "the same with --insecure, without any key"
    spec = ClusterSpec(insecure=True)


class UnreadableList(Fault):
    id = "I2"
    title = "the allow list cannot be read: descriptors used up, devices/ renamed for 1 s, one file gone for 1.5 s"
    passes = "nobody is revoked; every device goes on"
    kinds = ("descriptors used up", "devices/ renamed", "a file gone")
    cost_s = 5.0
    copies = (2,)
    spec = ClusterSpec(descriptors=256)

    def inject(self, scene: Scene) -> None:
        cluster = scene.cluster
        kind = scene.choose(self.kinds)
        folder = cluster.state / "devices"
        if kind == "devices/ renamed":
            away = folder.with_name("devices-away")
            folder.rename(away)
            time.sleep(1.0)
            away.rename(folder)
        elif kind == "a file gone":
            file = scene.rng.choice(sorted(folder.glob("*.json")))
            text = file.read_bytes()
            file.unlink()
            time.sleep(1.5)
            file.touch(mode=0o600)
            file.write_bytes(text)
        else:
            with raw_connections(cluster.host, cluster.port, 400):
                time.sleep(0.7)
                (folder / "touched").touch()
                time.sleep(0.7)
                (folder / "touched").unlink()
                time.sleep(1.0)

    def expected(self, scene: Scene) -> Expected:
        """A file that is gone does revoke its device for that time: its copies serve."""
        return Expected(exact=True, stall_s=scene.bounds.stall_s)


class SilentConnections(Fault):
    id = "I7"
    title = "300 connections to the HTTP port that say nothing, or send a header or a body slowly"
    passes = "/health and /metrics answer; another client's answers are exact and not late"
    kinds = ("silent", "slow header", "slow body")
    copies = (2,)
    cost_s = 4.0

    def inject(self, scene: Scene) -> None:
        cluster, kind = scene.cluster, scene.choose(self.kinds)
        begin = {"silent": b"", "slow header": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-A: "}
        body = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        body += b"Content-Length: 999\r\n\r\n{"
        with raw_connections("127.0.0.1", cluster.http, 300, begin.get(kind, body)):
            time.sleep(0.3)
            for path in ("/health", "/metrics"):
                scene.require(fetch(cluster.http, path), f"{path} does not answer beside 300 {kind} connections")
            for complaint in self._not_whole(scene):
                scene.violations.append(f"beside 300 {kind} connections: {complaint}")


class Shutdown(Fault):
    id = "I6"
    title = "SIGTERM or SIGINT to the base station in the middle of answers"
    passes = "answers that take less than 5 s are finished; the process ends within 1 s of the last one"
    kinds = ("SIGTERM", "SIGINT")
    copies = (2,)
    cost_s = 8.0

    def inject(self, scene: Scene) -> None:
        scene.cluster.station.send(signal.Signals[scene.choose(self.kinds)])

    def judge(self, scene: Scene) -> None:
        process = scene.cluster.station.process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        late_s = time.monotonic() - max(answer.ended_s for answer in scene.answers)
        scene.notes.append(f"ended {late_s:.1f} s after the last answer")
        scene.require(process.poll() == 0, f"exit code {process.poll()}")
        scene.require(late_s <= scene.bounds.exit_s, f"S4: ended {late_s:.1f} s after the last answer")
        for answer in scene.answers:
            scene.require("OpenAI" not in answer.error, f"an error not in OpenAI's shape: {answer.error}")

    def heal(self, scene: Scene) -> None:
        scene.cluster.station.kill()
        scene.cluster.station.start()
        scene.cluster.wait_for(lambda: scene.cluster.status() is not None, 60, "the base station does not come back")


@contextlib.contextmanager
def raw_connections(host: str, port: int, count: int, begin: bytes = b"") -> Iterator[None]:
    """So many TCP connections from a stranger's address, as many as the other side lets in."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 512)), hard))
    source = (STRANGER, 0) if host.startswith("127.") else None
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):
                held.append(socket.create_connection((host, port), 2, source))
                held[-1].sendall(begin)
        yield
    finally:
        for each in held:
            each.close()


def stolen_keys(cluster: Cluster) -> Path:
    """The keys of an admitted device, as a file that the flood reads."""
    from wdmoe.transport.security.join_tokens import parse_token
    from wdmoe.transport.security.keys import device_keys

    token = parse_token(cluster.token(f"tcp://{cluster.host}:{cluster.port}").read_text())
    pair = device_keys(cluster.folder / cluster.devices[0].name)
    file = cluster.folder / "stolen"
    file.touch(mode=0o600)
    file.write_text(json.dumps({"server": token.server_key, "public": pair.public, "secret": pair.secret}))
    return file


FAULTS: tuple[type[Fault], ...] = (Flood, OpenFlood, UnreadableList, Shutdown, SilentConnections)
