"""Python imports this first where the folder is on its path: SIGUSR2 blocks the main thread, and with it the loop.

In every process that a base station starts, however it starts them. Threads and sockets' own threads go on.
"""

import os
import signal
import time
from types import FrameType

STALL_S = float(os.environ.get("CATALOGUE_STALL_S", "0"))


def _stall(number: int, frame: "FrameType | None") -> None:
    time.sleep(STALL_S)


if STALL_S:
    signal.signal(signal.SIGUSR2, _stall)
