"""One engine process as the front sees it: questions and answers by number, until it ends."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from wdmoe.errors import EngineLostError
from wdmoe.nodes.supervised.link import Link, Message, open_link
from wdmoe.nodes.supervised.plain import heard
from wdmoe.records import AnswerEvent, Finished, GenerationRequest


class EngineLink:
    """Made by `open`. When the engine ends, all that wait for it get an `EngineLostError`."""

    _link: Link

    def __init__(self, on_barred: Callable[[str], None]) -> None:
        self._on_barred = on_barred
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._events: dict[int, asyncio.Queue[AnswerEvent | Exception]] = {}
        self.opened: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self.lost = asyncio.Event()

    @classmethod
    async def open(cls, end: socket.socket, on_barred: Callable[[str], None]) -> EngineLink:
        """Over one end of a socket pair. `opened` gets what the engine says of itself, or why it can't serve.

        `on_barred`: told of the id of each device that is in quarantine from now on.
        """
        made = cls(on_barred)
        made._link = await open_link(end, made._hear, made._end)
        return made

    async def ask(self, kind: str, *words: object) -> Any:
        """One question, one answer.

        Raises:
            EngineLostError: it has ended.
            Exception: as the engine raised it.
        """
        self._check()
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._link.send(kind, number, *words)
        try:
            return await answer
        finally:
            self._answers.pop(number, None)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[AnswerEvent]:
        """See `TextEngine.stream`. Raises also EngineLostError."""
        self._check()
        number = next(self._numbers)
        events = self._events[number] = asyncio.Queue()
        self._link.send("stream", number, request)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            del self._events[number]
            self._link.send("cancel", number)

    def stop(self) -> None:
        """Have it end in order; `lost` is set when it has."""
        self._link.send("stop")

    def cut(self) -> None:
        """Talk no more."""
        self._link.close()

    def _check(self) -> None:
        if self.lost.is_set():
            raise EngineLostError(_LOST)

    def _hear(self, message: Message) -> None:
        kind, *words = message
        if kind == "opened":
            self.opened.set_result(words[0])
        elif kind == "failed":
            self.opened.set_exception(heard(*words))
        elif kind == "barred":
            self._on_barred(words[0])
        else:
            self._settle(kind, *words)

    def _settle(self, kind: str, number: int, *words: Any) -> None:
        """What comes for nobody was cancelled meanwhile."""
        found = heard(*words) if kind == "error" else words[0]
        if (events := self._events.get(number)) is not None:
            events.put_nowait(found)
        elif (answer := self._answers.get(number)) is not None and not answer.done():
            if kind == "error":
                answer.set_exception(found)
            else:
                answer.set_result(found)

    def _end(self) -> None:
        self.lost.set()
        error = EngineLostError(_LOST)
        for answer in (*self._answers.values(), self.opened):
            if not answer.done():
                answer.set_exception(error)
        self.opened.exception()  # seen: nobody may have waited for it
        for events in self._events.values():
            events.put_nowait(error)


_LOST = "the process of the model ended"
