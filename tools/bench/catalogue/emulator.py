"""Forwards Ethernet frames between pairs of TAP devices and spoils them on the way, until its input ends.

    emulator.py SEED A0 B0 A1 B1 ...

Orders come as lines of JSON, `{"link": 0, "down": {...}, "up": {...}}`, with the fields of `air.Way`; each is answered
with "done". Down is from A to B. Frames wait in a heap, ordered by the time at which they are due.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time
from typing import Any

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 2, 0x1000
_HEADER = 14
_QUEUE_S = 0.2  # what a radio's queue holds; more is dropped
_MOST_BYTES = 1 << 16


class Direction:
    """One way of one link."""

    def __init__(self, sink: int) -> None:
        self.sink = sink
        self.way: dict[str, Any] = {}
        self.busy_s = 0.0

    def due(self, frame: bytes, now_s: float, rng: random.Random) -> list[tuple[float, bytes]]:
        """When which frames come out; none where it is lost."""
        way = self.way
        if not way:
            return [(now_s, frame)]
        if way["cut"] or rng.random() < way["loss"]:
            return []
        out = []
        for _ in range(2 if rng.random() < way["duplicate"] else 1):
            start_s = max(now_s, self.busy_s)
            if start_s - now_s > _QUEUE_S:
                continue
            at_s = start_s + (len(frame) * 8 / way["rate_bps"] if way["rate_bps"] else 0.0)
            self.busy_s = at_s
            late_s = max(0.0, way["delay_s"] + rng.uniform(-1, 1) * way["jitter_s"])
            out.append((at_s + (0.0 if rng.random() < way["reorder"] else late_s), _flipped(frame, way, rng)))
        return out


def _flipped(frame: bytes, way: dict[str, Any], rng: random.Random) -> bytes:
    """One bit behind the Ethernet header, now and then."""
    if rng.random() >= way["corrupt"] or len(frame) <= _HEADER:
        return frame
    spoilt = bytearray(frame)
    spoilt[rng.randrange(_HEADER, len(frame))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def main() -> None:
    rng = random.Random(int(sys.argv[1]))
    taps = [open_tap(name) for name in sys.argv[2:]]
    ways = {tap: Direction(taps[index ^ 1]) for index, tap in enumerate(taps)}
    print("ready", flush=True)
    heap: list[tuple[float, int, int, bytes]] = []
    count = 0
    poll = select.poll()
    for fd in (0, *taps):
        poll.register(fd, select.POLLIN)
    while True:
        wait_ms = max(0.0, heap[0][0] - time.monotonic()) * 1000 if heap else 1000.0
        for fd, _ in poll.poll(wait_ms):
            if fd == 0:
                if not obey(taps, ways):
                    return
                continue
            for at_s, frame in _read(fd, ways[fd], rng):
                count += 1
                heapq.heappush(heap, (at_s, count, ways[fd].sink, frame))
        now_s = time.monotonic()
        while heap and heap[0][0] <= now_s:
            _, _, sink, frame = heapq.heappop(heap)
            _write(sink, frame)


def obey(taps: list[int], ways: dict[int, Direction]) -> bool:
    line = sys.stdin.readline()
    if not line:
        return False
    order = json.loads(line)
    near, far = taps[2 * order["link"]], taps[2 * order["link"] + 1]
    ways[near].way, ways[far].way = (way if any(way.values()) else {} for way in (order["down"], order["up"]))
    print("done", flush=True)
    return True


def _read(tap: int, direction: Direction, rng: random.Random) -> list[tuple[float, bytes]]:
    found: list[tuple[float, bytes]] = []
    try:
        for _ in range(64):
            found += direction.due(os.read(tap, _MOST_BYTES), time.monotonic(), rng)
    except OSError:  # nothing more, or the interface is not up
        return found
    return found


def _write(tap: int, frame: bytes) -> None:
    try:
        os.write(tap, frame)
    except OSError:  # not up, or full: the frame is lost, as on a cable
        return


if __name__ == "__main__":
    main()
