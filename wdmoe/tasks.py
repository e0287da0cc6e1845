"""Coroutines that live and end together, and programs that open step by step.

`asyncio.TaskGroup` needs Python 3.11, boards have 3.10.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
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


async def run_until_first(*parts: Coroutine[Any, Any, object]) -> None:
    """Run all parts until one of them has returned or raised: then the others are cancelled and awaited.

    Raises:
        Exception: what that part raised.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
