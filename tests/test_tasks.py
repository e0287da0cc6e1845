"""Coroutines that live and end together: one cancel from outside is one cancel for each of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from wdmoe.errors import ExpertError
from wdmoe.tasks import end_tasks, in_thread, run_together, run_until_first

Together = Callable[..., Coroutine[Any, Any, None]]
BOTH = pytest.mark.parametrize("together", [run_together, run_until_first])


async def forever() -> None:
    await asyncio.sleep(1000)


class Draining:
    """A part that uses its first cancel to finish what it has begun."""

    def __init__(self, drain_s: float = 0.1) -> None:
        self.drain_s = drain_s
        self.cancels = 0
        self.finished = False

    async def run(self) -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            self.cancels += 1
            try:
                await asyncio.sleep(self.drain_s)
                self.finished = True
            except asyncio.CancelledError:
                self.cancels += 1
                raise
            raise


async def _cancelled(work: Coroutine[Any, Any, object], times: int = 1) -> None:
    task = asyncio.ensure_future(work)
    for _ in range(times):
        await asyncio.sleep(0.02)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@BOTH
def test_a_part_may_use_its_one_cancel_to_finish(together: Together) -> None:
    part = Draining()
    asyncio.run(_cancelled(together(forever(), part.run(), forever())))
    assert (part.cancels, part.finished) == (1, True)


@BOTH
def test_a_second_cancel_reaches_every_part_too_and_still_none_is_left(together: Together) -> None:
    part, other = Draining(drain_s=1000), Draining(drain_s=1000)
    asyncio.run(_cancelled(together(forever(), part.run(), other.run()), times=2))
    assert (part.cancels, other.cancels) == (2, 2)


@BOTH
def test_a_failure_cancels_the_others_once(together: Together) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise ExpertError("first")

    part = Draining()
    with pytest.raises(ExpertError, match="first"):
        asyncio.run(together(part.run(), fails(), forever()))
    assert (part.cancels, part.finished) == (1, True)


def test_a_part_that_is_cancelled_from_inside_ends_the_others() -> None:
    async def gives_up() -> None:
        raise asyncio.CancelledError

    async def main() -> None:
        part = Draining()
        with pytest.raises(asyncio.CancelledError):
            await run_together(part.run(), gives_up())
        assert part.finished

    asyncio.run(main())


def test_ending_waits_for_the_slowest() -> None:
    async def main() -> None:
        part = Draining()
        tasks = [asyncio.ensure_future(each) for each in (forever(), part.run())]
        await asyncio.sleep(0)
        await end_tasks(tasks)
        assert part.finished

    asyncio.run(main())


@pytest.mark.parametrize("times", [1, 2])
def test_a_cancel_waits_for_the_thread_however_often_it_comes(times: int) -> None:
    go, done = threading.Event(), []

    def work() -> None:
        go.wait()
        done.append(True)

    async def main() -> None:
        task = asyncio.create_task(in_thread(work))
        for _ in range(times):
            await asyncio.sleep(0.01)
            task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done

    asyncio.run(main())
