"""A cancel that comes at the same moment as what was waited for: if it gets lost, a node never ends."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lab.waiting import PATIENCE_S
from wdmoe.config import LinkEmulation
from wdmoe.errors import TransportError
from wdmoe.moe.expert import ExpertRunner
from wdmoe.moe.providers import OnnxExpert, cpu_chain
from wdmoe.nodes.device.broadcast_receiver import RadioSite
from wdmoe.nodes.device.compute_thread import ComputeThread
from wdmoe.nodes.device.expert_cache import ExpertCache
from wdmoe.nodes.device.expert_fetch import CHUNK_BYTES, OUTSTANDING, ExpertFetcher
from wdmoe.nodes.device.expert_store import ExpertStore
from wdmoe.nodes.device.join import introduce
from wdmoe.nodes.device.rules import WantedExpert
from wdmoe.nodes.device.session import DeviceSession
from wdmoe.records import DeviceReport, ExpertId
from wdmoe.tasks import run_together, within
from wdmoe.transport.codec.messages import Chunk, Fetch, Hello, Place, Welcome
from wdmoe.transport.memory import MemoryControlStation

# Of the event loop, between what is waited for and the cancel: one of them meets each step on the way.
TURNS = range(24)
Waiting = tuple["asyncio.Task[Any]", Callable[[], Awaitable[None]]]


def never_lost(begin: Callable[[], Awaitable[Waiting]]) -> None:
    """`begin` gives what waits, and what ends the wait. Cancelled at any moment after that, it must end cancelled."""

    async def scene() -> None:
        for turns in TURNS:
            task, happen = await begin()
            await asyncio.sleep(0.005)
            await happen()
            for _ in range(turns):
                await asyncio.sleep(0)
            if task.cancel():
                await asyncio.wait([task], timeout=5)
                assert task.cancelled(), f"cancelled after {turns} turns, it goes on: {task}"

    asyncio.run(asyncio.wait_for(scene(), PATIENCE_S))


def test_of_a_bounded_wait() -> None:
    async def begin() -> Waiting:
        event = asyncio.Event()

        async def beats() -> None:
            while True:
                await within(60, event.wait())
                event.clear()

        async def happen() -> None:
            event.set()

        return asyncio.create_task(beats()), happen

    never_lost(begin)


def test_of_parts_one_of_which_fails_at_that_moment() -> None:
    """A base station and its devices are told to stop together: the device went on and tried to join again."""

    async def begin() -> Waiting:
        event = asyncio.Event()

        async def fails() -> None:
            await event.wait()
            raise TransportError("the base station stops")

        async def joins_again() -> None:
            while True:
                try:
                    await run_together(fails(), asyncio.sleep(1000))
                except TransportError:
                    await asyncio.sleep(1000)

        async def happen() -> None:
            event.set()

        return asyncio.create_task(joins_again()), happen

    never_lost(begin)


def test_a_bounded_wait_ends_what_it_waited_for() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(True)

    async def scene() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, work())
        assert ended == [True]
        with pytest.raises(TransportError):
            await within(60, failing())

    async def failing() -> None:
        raise TransportError("at once")

    asyncio.run(scene())


def test_of_a_device_that_is_being_welcomed() -> None:
    async def begin() -> Waiting:
        station = MemoryControlStation()
        link = station.connect("key")

        async def happen() -> None:
            await station.send(link.route, Welcome(session=1))

        return asyncio.create_task(introduce(link, Hello(session=1, report=report()))), happen

    never_lost(begin)


def test_of_a_download() -> None:
    """The first chunk of many comes; the others never would, once nobody listens."""
    data = np.zeros(2 * OUTSTANDING * CHUNK_BYTES, np.uint8)

    async def begin() -> Waiting:
        async def send(fetch: Fetch) -> None:
            await asyncio.sleep(0)

        fetcher = ExpertFetcher(send)
        wanted = WantedExpert(ExpertId(0, 0), hashlib.sha256(data.tobytes()).hexdigest(), len(data))

        async def happen() -> None:
            fetcher.accept(Chunk(layer=0, expert=0, offset=0, total=len(data), data=data[:CHUNK_BYTES]))

        return asyncio.create_task(fetcher.fetch(wanted)), happen

    never_lost(begin)


def test_of_a_session_that_has_news(tmp_path: Path) -> None:
    """One of 72 devices did not end on SIGTERM: it was about to tell what it had loaded, and went on beating."""

    async def begin() -> Waiting:
        station = MemoryControlStation()
        link = station.connect("key")
        runner = ExpertRunner(lambda file, _: OnnxExpert(file, 1, cpu_chain()))
        cache = ExpertCache(tmp_path, 1 << 20)
        session = DeviceSession(
            link,
            Welcome(session=1, lease_s=60.0),
            ExpertStore(runner, cache, 1 << 20),
            ComputeThread(runner, LinkEmulation(), lambda error: None),
            None,
            lambda place: None,
            RadioSite(open_tuner=lambda port: None, cache=cache, threads=1, save=None),  # type: ignore[arg-type]
        )

        async def happen() -> None:
            await station.send(link.route, an_empty_place())

        return asyncio.create_task(session.run()), happen

    never_lost(begin)


def test_nothing_waits_in_the_way_that_loses_a_cancel() -> None:
    """`asyncio.wait_for`, and `asyncio.gather` that hands on an error in place of the cancel."""
    root = Path(__file__).resolve().parents[1] / "wdmoe"
    lines = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "asyncio.wait_for(" in line or ("asyncio.gather(" in line and "return_exceptions=True" not in line)
    ]
    assert not lines


def report() -> DeviceReport:
    return DeviceReport(name="kit", hardware="", system="", provider="cpu", threads=1, memory_bytes=1, flops=1.0)


def an_empty_place() -> Place:
    return Place(
        generation=1,
        experts=np.zeros((0, 2), np.int32),
        sha256=np.zeros((0, 32), np.uint8),
        size=np.zeros(0, np.int64),
        hidden=16,
    )
