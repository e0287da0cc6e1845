"""Runs the generations of one HTTP request and hands their events on as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from wdmoe.records import AnswerEvent, GenerationRequest, TextEngine
from wdmoe.tasks import end_tasks, run_together


@dataclass(frozen=True, slots=True)
class Step:
    """An event of one of the generations."""

    index: int
    event: AnswerEvent


async def run(
    engine: TextEngine, generations: Sequence[GenerationRequest], parallel: int
) -> AsyncGenerator[Step, None]:
    """Events of all generations, each in its own order, interleaved as they come.

    Closing or cancelling ends all of them. The first one to fail ends the others and its error is raised.
    """
    if len(generations) == 1:  # the usual case, without a task and a queue in between
        async with _closing(engine.stream(generations[0])) as events:
            async for event in events:
                yield Step(0, event)
        return
    steps: asyncio.Queue[Step | None] = asyncio.Queue()
    work = asyncio.create_task(_run_all(engine, generations, parallel, steps))
    try:
        while (step := await steps.get()) is not None:
            yield step
        await work
    finally:
        await end_tasks([work])


async def _run_all(
    engine: TextEngine,
    generations: Sequence[GenerationRequest],
    parallel: int,
    steps: asyncio.Queue[Step | None],
) -> None:
    """Put every step into the queue, and None last, whatever happens."""
    places = asyncio.Semaphore(parallel)

    async def run_one(index: int, generation: GenerationRequest) -> None:
        async with places, _closing(engine.stream(generation)) as events:
            async for event in events:
                steps.put_nowait(Step(index, event))

    try:
        await run_together(*(run_one(index, each) for index, each in enumerate(generations)))
    finally:
        steps.put_nowait(None)


@asynccontextmanager
async def _closing(
    events: AsyncIterator[AnswerEvent],
) -> AsyncIterator[AsyncIterator[AnswerEvent]]:
    """Close the engine's iterator at the end: only that frees its place when a client goes in mid-answer."""
    try:
        yield events
    finally:
        close = getattr(events, "aclose", None)  # the protocol asks for an iterator only
        if close is not None:
            await close()
