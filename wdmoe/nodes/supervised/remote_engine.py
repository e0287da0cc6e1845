"""The engine that the HTTP face talks to: whichever process holds the model now, and the next one when that ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from wdmoe.errors import EngineLostError
from wdmoe.nodes.supervised.engine_link import EngineLink
from wdmoe.nodes.supervised.resume import Progress
from wdmoe.records import AnswerEvent, GenerationRequest
from wdmoe.tasks import within

_log = logging.getLogger(__name__)

_START_S = 20.0  # for a new engine to open
MOST_RESTARTS = 3  # of one request: it may be what ends the engines
_STATUS_S = 2.0  # an engine that says nothing for so long is told of as it was


class RemoteEngine:
    """A `TextEngine`. Requests outlive the process that works on them: the next one goes on where it ended."""

    def __init__(self, rejoin_s: float) -> None:
        """`rejoin_s`: for devices to come back to a new engine, before it serves without them."""
        self._wait_s = _START_S + rejoin_s
        self._link: EngineLink | None = None
        self._facts: Mapping[str, Any] = {}
        self._held = asyncio.Event()  # the engine of now has ended
        self._served = asyncio.Event()  # there is an engine, and it has its devices, or had its time to find them
        self._known: Mapping[str, object] = {}  # what its last status said
        self.restarts = 0

    def use(self, link: EngineLink, facts: Mapping[str, Any]) -> None:
        """Ask this engine from now on. Requests wait until `serve` is called."""
        self._link, self._facts, self._held = link, facts, asyncio.Event()

    def serve(self) -> None:
        """Let requests pass."""
        self._served.set()

    def hold(self) -> None:
        """There is no engine: requests wait for the next."""
        self._link = None
        self._served.clear()
        self._held.set()

    @property
    def state(self) -> str:
        """As the last status said; "" before any."""
        return str(self._known.get("state", ""))

    @property
    def model_name(self) -> str:
        """See `TextEngine.model_name`."""
        return str(self._facts["model_name"])

    @property
    def context_tokens(self) -> int:
        """See `TextEngine.context_tokens`."""
        return int(self._facts["context_tokens"])

    async def prepare(self, request: GenerationRequest) -> tuple[int, ...]:
        """See `TextEngine.prepare`. Raises also EngineLostError: there was no engine for long."""
        for _ in range(MOST_RESTARTS + 1):
            link = await self._ready()
            try:
                ids: tuple[int, ...] = await link.ask("prepare", request)
            except EngineLostError:
                await self._gone(link)
            else:
                return ids
        raise EngineLostError("the process of the model ended again and again while it read this request")

    async def stream(self, request: GenerationRequest) -> AsyncIterator[AnswerEvent]:
        """See `TextEngine.stream`. Raises also EngineLostError: there was no engine for long."""
        progress = Progress(request)
        while progress.restarts <= MOST_RESTARTS:
            link = await self._ready()
            try:
                async with aclosing(link.stream(progress.rest)) as events:  # type: ignore[type-var]
                    async for event in events:
                        yield progress.take(event)
                return
            except EngineLostError:
                await self._gone(link)
                progress.restarted()
                _log.warning("request %s was interrupted after %d tokens", request.request_id, len(progress.tokens))
        raise EngineLostError(
            f"the process of the model ended {progress.restarts} times while it worked on this request"
        )

    async def status(self) -> Mapping[str, object]:
        """See `TextEngine.status`. Without an engine the state is "restarting"."""
        link, state = self._link, {"state": "restarting"}
        if link is not None:
            try:
                self._known = await within(_STATUS_S, link.ask("status"))
                state = {}
            except EngineLostError:
                pass
            except asyncio.TimeoutError:
                state = {"state": "waiting"}
        gone = {"devices": ()} if state.get("state") == "restarting" else {}
        process = {"pid": self._facts.get("pid"), "restarts": self.restarts}
        return {**self._known, **state, **gone, "engine": process}

    async def command(self, line: bytes) -> Mapping[str, object]:
        """Have the engine obey a line of `base_station.commands`."""
        link = await self._ready()
        done: Mapping[str, object] = await link.ask("command", line)
        return done

    async def _ready(self) -> EngineLink:
        try:
            await within(self._wait_s, self._served.wait())
        except asyncio.TimeoutError:
            raise EngineLostError("the process of the model ended, and no other one serves yet") from None
        if self._link is None:
            raise EngineLostError("the process of the model ended")
        return self._link

    async def _gone(self, link: EngineLink) -> None:
        """Until whoever restarts engines has noticed the same."""
        if self._link is link:
            await self._held.wait()
