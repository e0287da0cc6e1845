"""Peers that mean harm, each a process of its own: they flood a ZeroMQ socket of a station and vanish.

    python -m tests.lab.hostile_peer '{"endpoint": "tcp://127.0.0.1:5555", "kind": "pings", "seconds": 0.5,
                                       "floods": 20, "at_once": 4, "payload": "HEX"}'

Kinds
- `pings`: valid messages by libzmq, heartbeats between them; answers are read; then the process is gone.
- `deaf`: the same, but what is sent to it stays unread, so that it is owed answers when it goes.
- `reset`: messages and heartbeats written by hand, as fast as TCP takes them; ends with a RST.
- `endless`: one message of endlessly many frames, by hand.
- `prefixes`: subscriptions, each to another prefix, by hand or by libzmq.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import zmq

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
FROM = "127.0.0.9"  # bounds count by address, and honest peers of this machine have another
PING = b"\x04\x07\x04PING\x00\x00"  # a command that asks for a PONG, and for no time to live
KINDS = ("pings", "deaf", "reset", "endless", "prefixes")


def main() -> None:
    order = json.loads(sys.argv[1])
    running: set[int] = set()
    for _ in range(order["floods"]):
        if len(running) == order["at_once"]:
            running.discard(os.wait()[0])
        if not (child := os.fork()):
            flood(order)
        running.add(child)
    while running:
        running.discard(os.wait()[0])


def flood(order: dict[str, Any]) -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, order["seconds"] + 0.3)  # also where libzmq waits for a station that cuts it
    by_hand = order["kind"] in ("reset", "endless", "prefixes") and not order.get("server_key")
    try:
        (flood_by_hand if by_hand else flood_by_zmq)(order)
    except OSError:
        pass  # nobody is there any more, or too many are
    finally:
        os._exit(0)


def flood_by_zmq(order: dict[str, Any]) -> None:
    """A DEALER or SUB with heartbeats of a millisecond. Its process ends in mid-sentence."""
    kind, payload, end = order["kind"], bytes.fromhex(order.get("payload", "")), time.monotonic() + order["seconds"]
    peer = open_peer(order)
    number = 0
    while time.monotonic() < end:
        number += 1
        try:
            if kind == "prefixes":
                peer.set(zmq.SUBSCRIBE, b"%d" % number)
            elif kind == "endless":
                peer.send(payload, zmq.NOBLOCK | zmq.SNDMORE)
            else:
                peer.send(payload, zmq.NOBLOCK)
        except zmq.Again:
            peer.poll(1, zmq.POLLOUT)
        if kind == "pings" and number % 8 == 0:
            read_all(peer)
    if kind == "reset":
        reset_all()


def open_peer(order: dict[str, Any]) -> zmq.Socket[bytes]:
    peer: zmq.Socket[bytes] = zmq.Context().socket(zmq.SUB if order["kind"] == "prefixes" else zmq.DEALER)
    peer.set(zmq.HEARTBEAT_IVL, 1)
    peer.set(zmq.HEARTBEAT_TIMEOUT, 10_000)
    peer.set(zmq.RCVHWM, 1 if order["kind"] == "deaf" else 1000)
    if order.get("server_key"):
        peer.curve_serverkey = order["server_key"].encode()
        peer.curve_publickey = order["public"].encode()
        peer.curve_secretkey = order["secret"].encode()
    peer.connect(order["endpoint"].replace("tcp://", f"tcp://{FROM}:0;"))
    return peer


def read_all(peer: zmq.Socket[bytes]) -> None:
    try:
        while True:
            peer.recv(zmq.NOBLOCK)
    except zmq.Again:
        return


def reset_all() -> None:
    """End every connection of this process by a RST: libzmq's descriptors are among the first."""
    for descriptor in range(3, 64):
        try:
            with socket.socket(fileno=os.dup(descriptor)) as mine:
                if mine.family == socket.AF_INET:
                    mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            continue


def flood_by_hand(order: dict[str, Any]) -> None:
    """Speaks ZMTP 3.1 without encryption itself, so that it can say what libzmq never says."""
    host, port = order["endpoint"].removeprefix("tcp://").rsplit(":", 1)
    end = time.monotonic() + order["seconds"]
    with socket.create_connection((host, int(port)), timeout=5, source_address=(FROM, 0)) as wire:
        shake_hands(wire, b"SUB" if order["kind"] == "prefixes" else b"DEALER")
        wire.settimeout(0.2)
        for piece in pieces(order["kind"], bytes.fromhex(order.get("payload", ""))):
            try:
                wire.sendall(piece)
            except OSError:  # it was cut, or nobody reads
                break
            if time.monotonic() > end:
                break
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def shake_hands(wire: socket.socket, kind: bytes) -> None:
    wire.sendall(GREETING)
    got = 0
    while got < len(GREETING):
        if not (piece := wire.recv(1000)):
            raise ConnectionError("it hung up")
        got += len(piece)
    ready = b"\x05READY" + _property(b"Socket-Type", kind) + _property(b"Identity", b"")
    wire.sendall(b"\x04" + bytes([len(ready)]) + ready)
    time.sleep(0.02)


def pieces(kind: str, payload: bytes) -> Iterator[bytes]:
    """What to write, for ever: 64 KiB or so at once, with a heartbeat after every fifth message."""
    number = 0
    while True:
        if kind == "endless":
            yield b"\x01\x00" * 20_000
        elif kind == "prefixes":
            number += 1
            name = b"\x01" + os.urandom(200)
            yield b"\x00" + bytes([len(name)]) + name + PING
        else:
            yield (frame(payload) * 5 + PING) * 200


def frame(payload: bytes) -> bytes:
    if len(payload) < 256:
        return b"\x00" + bytes([len(payload)]) + payload
    return b"\x02" + struct.pack(">Q", len(payload)) + payload


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


if __name__ == "__main__":
    main()
