"""Coroutines that live and end together. `asyncio.TaskGroup` needs Python 3.11, boards have 3.10."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Value = TypeVar("Value")


async def run_together(*parts: Coroutine[Any, Any, None]) -> None:
    """Run all parts until each has returned. If one raises, the others are cancelled and awaited first.

    Raises:
        Exception: the first one that any part raised.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run_unless(replaced: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Run work to its end, or until `replaced` is set: then it is cancelled and awaited.

    Raises:
        Exception: what the work raised.
    """
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(replaced.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def in_thread(work: Callable[[], Value]) -> Value:
    """Run blocking work in a worker thread. A cancel waits for the thread: nothing goes on alone."""
    future = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: the cancel is what counts
        raise
