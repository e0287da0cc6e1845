"""What a device holds: loads what its placement wants, from the cache or by download."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from wdmoe.errors import ExpertError
from wdmoe.heap import return_memory
from wdmoe.moe.expert import ExpertRunner
from wdmoe.nodes.device.expert_cache import ExpertCache
from wdmoe.nodes.device.rules import Changes, WantedExpert, changes, wanted_experts
from wdmoe.records import ExpertId
from wdmoe.tasks import in_thread, run_together
from wdmoe.transport.codec.messages import Place

log = logging.getLogger(__name__)

AT_ONCE = 3  # experts on their way from disk or air into memory
DRAIN_S = 1.0  # before experts go: orders that left before the base station's new table came still want them
RETRY_S = 5.0  # before what couldn't be loaded is tried again, doubling
LONGEST_RETRY_S = 60.0

FetchExpert = Callable[[WantedExpert], Awaitable[bytes]]


@dataclass(slots=True)
class _Tally:
    """How one round of loading went."""

    cached: int = 0
    fetched: int = 0
    failed: list[str] = field(default_factory=list)


class ExpertStore:
    """The experts of this device. They outlive sessions: what is still wanted after one is ready at once."""

    def __init__(self, runner: ExpertRunner, cache: ExpertCache, memory_bytes: int) -> None:
        self._runner = runner
        self._cache = cache
        self._memory_bytes = memory_bytes

    def ready(self, place: Place) -> list[ExpertId]:
        """Experts of a placement that can be run now, in the very version it wants."""
        loaded = self._runner.loaded()
        return [item.expert for item in wanted_experts(place) if loaded.get(item.expert) == item.sha256]

    async def follow(
        self, place: Place, fetch: FetchExpert, progress: Callable[[], None], complain: Callable[[str], None]
    ) -> None:
        """Hold what a placement wants, and nothing else. Returns when that is reached or can't be.

        Args:
            place: checked by `wanted_experts`.
            fetch: downloads a file and verifies it; raises ExpertError.
            progress: called whenever `ready` has grown or shrunk.
            complain: called with a line for the base station.
        Cancelling leaves whole experts only.
        """
        delay_s = RETRY_S
        while True:
            todo = changes(wanted_experts(place), self._runner.loaded(), self._memory_bytes)
            progress()
            if todo.unload:
                await asyncio.sleep(DRAIN_S)
            for expert in todo.unload:
                self._runner.unload(expert)
            tally = await self._load(todo, place, fetch, progress)
            self._report(place, todo, tally)
            if todo.too_much:
                complain(f"no memory for {len(todo.too_much)} of {len(place.experts)} experts")
            if not tally.failed:
                return
            complain(f"can't load {len(tally.failed)} experts: {tally.failed[0]}")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)

    async def _load(self, todo: Changes, place: Place, fetch: FetchExpert, progress: Callable[[], None]) -> _Tally:
        tally = _Tally()
        in_use = {item.sha256 for item in wanted_experts(place)}
        queue = iter(todo.load)

        async def work(items: Iterator[WantedExpert]) -> None:
            for item in items:
                try:
                    data = await self._obtain(item, in_use, fetch, tally)
                    await in_thread(lambda: self._runner.load(item.expert, data, item.sha256, place.hidden))  # noqa: B023
                except ExpertError as error:
                    log.warning("%s", error)
                    tally.failed.append(str(error))
                else:
                    progress()

        await run_together(*(work(queue) for _ in range(AT_ONCE)))
        if todo.load or todo.unload:
            await in_thread(return_memory)
        return tally

    async def _obtain(self, item: WantedExpert, in_use: set[str], fetch: FetchExpert, tally: _Tally) -> bytes:
        data = await in_thread(lambda: self._cache.get(item.sha256))
        if data is not None:
            tally.cached += 1
            return data
        data = await fetch(item)
        tally.fetched += 1
        await in_thread(lambda: self._cache.put(item.sha256, data, in_use))
        return data

    def _report(self, place: Place, todo: Changes, tally: _Tally) -> None:
        held = set(self.ready(place))
        size = sum(item.size for item in wanted_experts(place) if item.expert in held)
        log.info(
            "holding %d of %d experts (%.1f MB): %d kept, %d from cache, %d fetched, %d unloaded",
            *(len(held), len(place.experts), size / 1e6),
            *(len(todo.kept), tally.cached, tally.fetched, len(todo.unload)),
        )
