"""An attacker with a valid key: floods a base station with valid messages for some seconds and vanishes.

    flood.py ENDPOINT PLANE SECONDS KEYS

PLANE is control (Pings) or data (Attaches). KEYS is a file of JSON {"server", "public", "secret"}, or `-`: no
encryption.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import zmq

from wdmoe.transport.codec.framing import pack
from wdmoe.transport.codec.messages import Attach, Ping
from wdmoe.transport.codec.wire import Limits


def main() -> None:
    endpoint, plane, seconds, keys = sys.argv[1:]
    socket = zmq.Context().socket(zmq.DEALER)
    socket.set(zmq.SNDHWM, 1000)
    if keys != "-":
        pair = json.loads(Path(keys).read_text())
        socket.curve_serverkey = pair["server"].encode()
        socket.curve_publickey, socket.curve_secretkey = pair["public"].encode(), pair["secret"].encode()
    socket.connect(endpoint)
    limits = Limits(checksum=keys == "-")
    until_s, number = time.monotonic() + float(seconds), 0
    while time.monotonic() < until_s:
        number += 1
        message = Attach(session=1) if plane == "data" else Ping(sequence=number, done=0, queued=0, rss_bytes=1)
        try:
            socket.send(pack(message, limits), zmq.NOBLOCK)
        except zmq.Again:
            socket.poll(1, zmq.POLLOUT)
        try:
            while True:
                socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            continue
    os._exit(0)


if __name__ == "__main__":
    main()
