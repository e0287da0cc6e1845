"""Coroutines that live and end together, and programs that open step by step.

`asyncio.TaskGroup` needs Python 3.11, boards have 3.10.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, TypeVar

Value = TypeVar("Value")
Self = TypeVar("Self", bound="OpenedInSteps")


class OpenedInSteps(ABC):
    """An async context manager that opens onto a stack: what is open when a step fails is closed again."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()

    @abstractmethod
    async def _open(self) -> None:
        """Open everything; push onto `_stack` what closes each part."""

    async def __aenter__(self: Self) -> Self:
        """Open everything; errors are those of the parts."""
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close everything, the last part first."""
        await self._stack.aclose()


async def within(timeout_s: float, work: Awaitable[Value]) -> Value:
    """What `work` gives, if it gives it in time. A cancel always goes on.

    Not `asyncio.wait_for`: before Python 3.12 that returns the result, and forgets the cancel, where both come at the
    same time. A device that was told to stop in such a moment went on for ever.

    Raises:
        asyncio.TimeoutError: not in time; `work` was cancelled and has ended.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=max(timeout_s, 0.0))
    finally:
        await end_tasks([task])
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


async def run_together(*parts: Coroutine[Any, Any, None]) -> None:
    """Run all parts until each has returned. If one raises, the others are cancelled and awaited first.

    A cancel from outside reaches every part once, however long the others take to end: a part may use its first
    cancel to finish what it has begun, and take a second one as "at once".

    Raises:
        Exception: the first one that any part raised.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        running = set(tasks)
        while running:
            ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
    finally:
        await end_tasks(tasks)


async def run_until_first(*parts: Coroutine[Any, Any, object]) -> None:
    """Run all parts until one of them has returned or raised: then the others are cancelled and awaited.

    A cancel from outside reaches every part once, as in `run_together`.

    Raises:
        Exception: what that part raised.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        await end_tasks(tasks)


async def end_tasks(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what still runs, once, and wait until all of it has ended; what it raises then is dropped.

    Not `asyncio.gather`: its result is there as soon as the first task was cancelled, while the others still clean
    up, and a cancel of it is one more cancel for each of them.

    Raises:
        CancelledError: a cancel came from outside while this waited. It was handed on, and everything has ended.
    """
    running = {task for task in tasks if not task.done()}
    again = False
    while running:
        for task in running:
            task.cancel()
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError:
            again = True
        running = {task for task in running if not task.done()}
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen: what counts is why they were ended
    if again:
        raise asyncio.CancelledError


async def in_thread(work: Callable[[], Value]) -> Value:
    """Run blocking work in a worker thread. A cancel waits for the thread, a second one too: nothing goes on alone."""
    future = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: the cancel is what counts
        raise
