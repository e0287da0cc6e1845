"""The process with the model and the devices: a `BaseStation`, and a link to the process that talks to clients."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from wdmoe.config import StationSettings
from wdmoe.nodes.base_station.base_station import BaseStation
from wdmoe.nodes.base_station.commands import do_command
from wdmoe.nodes.supervised.link import Link, Message, open_link
from wdmoe.nodes.supervised.plain import told
from wdmoe.records import GenerationRequest
from wdmoe.tasks import end_tasks, run_until_first

_log = logging.getLogger(__name__)

_LAST_S = 0.5  # for what closes after the devices were told; then the process ends anyway


def run_engine(
    end: socket.socket, settings: StationSettings, logs: Mapping[str, Any], barred: tuple[str, ...], first: bool
) -> None:
    """Serve until told to stop or the link is cut. Whatever is left then has to end with the process.

    Args:
        end: of the socket pair; the other one is the front's.
        settings: those of the station.
        logs: `form` of log lines, and `levels` by logger.
        barred: see `BaseStation`; the front keeps them from engine to engine.
        first: make a join token; a later engine of the same station needs none.
    """
    logging.basicConfig(format=logs["form"], datefmt="%H:%M:%S")
    for name, level in logs["levels"].items():
        logging.getLogger(name).setLevel(level)
    # Not asyncio.run: it would wait for threads, which are of no use any more.
    asyncio.new_event_loop().run_until_complete(_serve(end, settings, frozenset(barred), first))


async def _serve(end: socket.socket, settings: StationSettings, barred: frozenset[str], first: bool) -> None:
    host = _Host(settings)
    await host.open(end)
    station = BaseStation(settings, barred=barred, on_barred=lambda device_id: host.link.send("barred", device_id))
    try:
        await station.__aenter__()
    except Exception as error:
        host.link.send("failed", *told(error))
        return
    host.begin(station, first)
    await run_until_first(station.run(), host.stop.wait())
    await station.leave()
    await host.end_all()
    closing = asyncio.ensure_future(station.__aexit__(None, None, None))
    await asyncio.wait([closing], timeout=None if settings.record_trace else _LAST_S)


class _Host:
    """Does what the front asks."""

    link: Link
    _station: BaseStation

    def __init__(self, settings: StationSettings) -> None:
        self._settings = settings
        self._work: dict[int, asyncio.Task[None]] = {}
        self.stop = asyncio.Event()  # told to stop, or nobody is left to serve

    async def open(self, end: socket.socket) -> None:
        """Open the link."""
        self.link = await open_link(end, self._hear, self.stop.set)

    def begin(self, station: BaseStation, first: bool) -> None:
        """Tell the front what it has got."""
        self._station = station
        engine = station.engine
        facts = {
            "pid": os.getpid(),
            "join_text": station.join_text if first else "",
            "model_name": engine.model_name,
            "context_tokens": engine.context_tokens,
            "control_port": station.control_port,
            "data_port": station.data_port,
            "modules": tuple(sys.modules),
        }
        self.link.send("opened", facts)

    async def end_all(self) -> None:
        """End what still runs."""
        await end_tasks(tuple(self._work.values()))

    def _hear(self, message: Message) -> None:
        kind, *words = message
        if kind == "stop":
            self.stop.set()
        elif kind == "cancel":
            if (task := self._work.get(words[0])) is not None:
                task.cancel()
        elif kind == "stream":
            self._start(words[0], self._stream(*words))
        else:
            self._start(words[0], self._answer(kind, *words))

    def _start(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        task = self._work[number] = asyncio.ensure_future(self._told(number, work))
        task.add_done_callback(lambda _: self._work.pop(number, None))

    async def _told(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self.link.send("error", number, *told(error))

    async def _stream(self, number: int, request: GenerationRequest) -> None:
        async with aclosing(self._station.engine.stream(request)) as events:  # type: ignore[type-var]
            async for event in events:
                self.link.send("event", number, event)

    async def _answer(self, kind: str, number: int, *words: Any) -> None:
        self.link.send("answer", number, await self._found(kind, *words))

    async def _found(self, kind: str, *words: Any) -> object:
        if kind == "prepare":
            return await self._station.engine.prepare(*words)
        if kind == "command":
            return await do_command(self._station, self._settings, *words)
        return await self._station.engine.status()
