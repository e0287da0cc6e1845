"""Peers that flood a station and vanish, or open connections without end: real sockets in a process of their own.

Each of these ended the station, or shut others out, before `wdmoe.transport.zmq.gate` stood there. 200 floods of each
kind are the business of tools/bench/floods.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.lab.flooded_station import FloodedStation, flooded_station
from tests.lab.waiting import PATIENCE_S

FLOODS = 12


def flood(station: FloodedStation, plane: str, kind: str) -> list[float]:
    """Let hostile peers flood a plane. Returns how long honest peers waited meanwhile."""
    order = station.order(plane, kind, floods=FLOODS, at_once=4, seconds=0.3)
    waits = []
    with subprocess.Popen([sys.executable, "-m", "tests.lab.hostile_peer", order]) as flooding:
        while flooding.poll() is None and station.is_alive:
            waits.append(station.seconds_to_answer(plane, PATIENCE_S))
            time.sleep(0.05)
        flooding.kill()
    return waits


@pytest.mark.parametrize("words", [(), ("--insecure",)], ids=["curve", "insecure"])
@pytest.mark.parametrize(
    ("plane", "kind"),
    [("control", "pings"), ("data", "deaf"), ("data", "reset"), ("control", "endless"), ("broadcast", "prefixes")],
)
def test_z22_a_peer_that_floods_and_vanishes_ends_nothing(
    tmp_path: Path, plane: str, kind: str, words: tuple[str, ...]
) -> None:
    with flooded_station(tmp_path, *words) as station:
        waits = flood(station, plane, kind)
        assert station.is_alive, "the station was aborted"
        assert all(wait < PATIENCE_S for wait in waits), "others are served meanwhile"
        assert station.seconds_to_answer(plane, PATIENCE_S) < PATIENCE_S
        assert station.peak_mib < 1500


def test_the_memory_of_a_flood_goes_back_to_the_system(tmp_path: Path) -> None:
    """glibc keeps what was freed: a station under many floods looked as if it leaked."""
    with flooded_station(tmp_path) as station:
        calm_mib = station.mib
        limit_s = time.monotonic() + PATIENCE_S
        while station.peak_mib < calm_mib + 20:  # else this would prove nothing
            assert time.monotonic() < limit_s, f"a flood took no memory: {station.peak_mib:.0f} MiB"
            flood(station, "data", "deaf")
        limit_s = time.monotonic() + PATIENCE_S
        while station.mib > calm_mib + 15:
            assert time.monotonic() < limit_s, f"{station.mib:.0f} MiB, before it {calm_mib:.0f}"
            station.seconds_to_answer("data", PATIENCE_S)
            time.sleep(0.2)


def test_the_memory_of_many_short_queues_goes_back_too(tmp_path: Path) -> None:
    """None of them was long, so nothing was handed back: 60 MiB stayed after 20 floods of a busy machine."""
    code = """
        import time, zmq
        from pathlib import Path
        from wdmoe.transport.zmq.channels import open_data_station
        from wdmoe.transport.zmq.sockets import new_context
        station = open_data_station(new_context(), "tcp://127.0.0.1:*", None)  # its owner computes
        peers = zmq.Context()
        def mib():
            status = Path("/proc/self/status").read_text().partition("VmRSS:")[2]
            return int(status.split()[0]) / 1024
        calm = mib()
        for _ in range(100):
            peer = peers.socket(zmq.DEALER)
            peer.connect(station.endpoint)
            for _ in range(4000):
                peer.send(bytes(60))
            peer.close(-1)
        peers.term()
        time.sleep(1)
        full = mib()
        assert full > calm + 40, (calm, full)
        until = time.monotonic() + PATIENCE
        while mib() > calm + 12:
            station.receive(0.2)
            assert time.monotonic() < until, (calm, full, mib())
        import os
        os._exit(0)
    """
    program = textwrap.dedent(code).replace("PATIENCE", str(PATIENCE_S / 2))
    done = subprocess.run([sys.executable, "-c", program], timeout=PATIENCE_S, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("plane", ["control", "data", "broadcast"])
def test_z23_a_thousand_connections_shut_nobody_out(tmp_path: Path, plane: str) -> None:
    """No key is needed to open them. There are fewer descriptors than that, too."""
    with flooded_station(tmp_path, prefix=("prlimit", "--nofile=512:512")) as station:
        port = int(station.endpoints[plane].rsplit(":", 1)[1])
        crowd: list[socket.socket] = []
        try:
            for _ in range(1000):
                with contextlib.suppress(OSError):
                    crowd.append(socket.create_connection(("127.0.0.1", port), 5, source_address=("127.0.0.9", 0)))
            for each in ("control", "data", "broadcast"):
                assert station.seconds_to_answer(each, PATIENCE_S) < PATIENCE_S
            assert station.descriptors < 512
            assert station.is_alive
        finally:
            for each_socket in crowd:
                each_socket.close()


def test_z24_strangers_that_come_and_go_hold_up_nobody(tmp_path: Path) -> None:
    """libzmq's I/O thread waits for whoever should read its monitor: 2,000 events unread stopped every plane."""
    code = """
        import socket
        from wdmoe.transport.codec.messages import Attach
        from wdmoe.transport.zmq.channels import open_data_link, open_data_station
        from wdmoe.transport.zmq.sockets import new_context
        station = open_data_station(new_context(), "tcp://127.0.0.1:*", None)  # its owner computes
        port = int(station.endpoint.rsplit(":", 1)[1])
        for _ in range(3500):
            socket.create_connection(("127.0.0.1", port), 20).close()
        link = open_data_link(new_context(), station.endpoint, None)
        while True:
            try:
                link.send(Attach(session=1))
                break
            except Exception:
                link.receive(0.05)
        assert station.receive(30) is not None or station.receive(30) is not None
        import os
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=PATIENCE_S, check=False)
    assert done.returncode == 0
