"""Runs a program of coroutines until it ends or is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_until_stopped(program: Coroutine[Any, Any, None]) -> None:
    """Run a program; the first SIGINT or SIGTERM cancels it and this returns once it has cleaned up.

    A second signal acts as it would by default, so that a clean-up that hangs can be ended by hand.
    """
    asyncio.run(_supervise(program))


async def _supervise(program: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    work = loop.create_task(program)
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if stopped:
            return
        stopped = True
        loop.remove_signal_handler(signal.SIGTERM)
        # By default, too; but the loop keeps its pipe, or a SIGINT that comes just before it sleeps would wake nobody.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work.cancel()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        await work
    except asyncio.CancelledError:
        if not stopped:
            raise
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)
