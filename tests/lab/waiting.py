"""How long a test waits for what must happen, and ports for stations that come back where they were."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

# Ends what hangs, just before pytest's own limit does. No passing test waits for it, however busy the machine is.
PATIENCE_S = 240.0

_CHANCE = random.SystemRandom()  # tests seed the usual one, in every worker alike
_FIRST, _END = 10_240, 32_000  # below the ports that a system hands out by itself: no stranger takes one meanwhile


def free_ports(count: int) -> int:
    """The first of so many neighbouring TCP ports that are free. Where a server can bind port 0, do that instead."""
    while True:
        first = _CHANCE.randrange(_FIRST, _END - count)
        with ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
