"""What is compared: llama.cpp in one process or with servers, and wdmoe. Each measures itself when its turn comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tools.bench.lab import SEED
from tools.bench.rivals.orders import Work, batched_words, bench_words, read_batched, read_bench
from tools.bench.rivals.programs import PeerError, Programs, run
from tools.bench.rivals.servers import RpcServers


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What each of them is given to do, and how long it may take."""

    prompt: int  # tokens
    clients: tuple[int, ...]  # so many at once, one number after another
    many_tokens: int  # of each of their answers
    timeout_s: float  # of one answer, of all answers to clients at once, of one program


class Contestant(Protocol):
    """What takes part. Turn 0 is a trial; a prompt is never that of another turn."""

    async def one(self, turn: int, tokens: int) -> float:
        """Tokens per second of one client who gets so many."""

    async def many(self, turn: int) -> dict[int, float]:
        """Tokens per second of so many clients together, prompts included."""


@dataclass
class LlamaCpp:
    """In one process, or with servers."""

    programs: Programs
    work: Work
    load: Load
    servers: RpcServers | None = None
    said: dict[str, str] = field(default_factory=dict)  # its build and its name for the model, once it has run

    async def one(self, turn: int, tokens: int) -> float:
        words = bench_words(self.programs.bench, self.work, self.load.prompt, tokens)
        rate = read_bench(await self._run(words))
        self.said.update(build=rate.build, model=rate.model)
        return rate.tokens_per_s

    async def many(self, turn: int) -> dict[int, float]:
        if self.programs.batched is None:
            return {}
        load = self.load
        words = batched_words(self.programs.batched, self.work, load.prompt, load.many_tokens, load.clients)
        return read_batched(await self._run(words), load.clients)

    async def _run(self, words: Sequence[str]) -> str:
        return await run(words, self.load.timeout_s, self.servers.lost() if self.servers else None)


@dataclass
class Wdmoe:
    """A base station and its devices."""

    station: Any
    load: Load
    degraded: int = 0  # answers that lacked experts

    async def one(self, turn: int, tokens: int) -> float:
        async with within(self.load.timeout_s, "wdmoe's answer"):
            stamps = await self._answer((turn, 0), tokens)
        return (len(stamps) - 1) / (stamps[-1] - stamps[0])

    async def many(self, turn: int) -> dict[int, float]:
        found, tokens = {}, self.load.many_tokens
        for clients in self.load.clients:
            begun_s = time.perf_counter()
            async with within(self.load.timeout_s, f"wdmoe's answers to {clients} clients"):
                await asyncio.gather(*(self._answer((turn, clients, each), tokens) for each in range(clients)))
            found[clients] = clients * tokens / (time.perf_counter() - begun_s)
        return found

    async def _answer(self, name: tuple[int, ...], tokens: int) -> list[float]:
        """When each token came. The name gives the prompt: none begins as a former one, which would be computed."""
        from wdmoe.records import Finished, GenerationRequest, Sampling

        most = min(self.station.bundle.manifest.vocabulary, 30000)
        ids = np.random.default_rng([SEED, *name]).integers(10, most, self.load.prompt)
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        label = "-".join(map(str, name))
        request = GenerationRequest(request_id=label, prompt=tuple(map(int, ids)), sampling=sampling)
        stamps = []
        async for event in self.station.engine.stream(request):
            if isinstance(event, Finished):
                self.degraded += event.receipt.degraded
            elif event.token_id >= 0:
                stamps.append(time.perf_counter())
        if len(stamps) != tokens:
            raise PeerError(f"wdmoe gave {len(stamps)} tokens of {tokens}")
        return stamps


@contextlib.asynccontextmanager
async def start_wdmoe(
    bundle: Path, precision: str, devices: int, device_threads: int, folder: Path, load: Load, **settings: Any
) -> AsyncIterator[Wdmoe]:
    """A base station in this process and devices in others, once they serve and nothing moves any more.

    Args:
        settings: further ones of the base station.
    Raises:
        PeerError: they are not ready in time.
    """
    from tools.bench.lab import served

    words = [["--threads", str(device_threads)]] * devices
    starting = served(bundle, devices, folder, words, engine="graphs", station_precision=precision, **settings)
    log = logging.getLogger("wdmoe")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(log.setLevel, log.level)
        async with within(load.timeout_s, "the start of wdmoe's base station and devices"):
            station, _ = await stack.enter_async_context(starting)
        stack.callback(log.setLevel, logging.ERROR)  # at the end devices leave, as they are told: no news
        yield Wdmoe(station, load)


@contextlib.asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """Raises PeerError where the block takes longer. asyncio.timeout needs Python 3.11."""
    task, late = asyncio.current_task(), False
    if task is None:
        raise RuntimeError("not in a task")

    def expire() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if not late:
            raise
        if sys.version_info >= (3, 11):
            task.uncancel()
        raise PeerError(f"{what} took more than {seconds:g} s; --timeout gives it longer") from None
    finally:
        timer.cancel()
