"""How far the end of a server has come: first nothing new is taken on, later what still runs is ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Closing:
    """Shared by whoever runs the server, who calls `drain`, and by the requests, which ask how far it is."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()  # no new work
        self.ends = asyncio.Event()  # what still runs is told that the server ends
        self._in_work = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around a request in work: `drain` waits for its end."""
        self._in_work += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_work -= 1
            if not self._in_work:
                self._idle.set()

    async def drain(self, drain_s: float, farewell_s: float) -> None:
        """Take nothing on any more and return when all work has ended.

        Args:
            drain_s: how long work may go on.
            farewell_s: how long it may take, after that, to tell its client that it was ended.
        """
        self.begun.set()
        await self._until_idle(drain_s)
        self.ends.set()
        await self._until_idle(farewell_s)

    async def _until_idle(self, longest_s: float) -> None:
        waiting = asyncio.ensure_future(self._idle.wait())
        try:
            await asyncio.wait([waiting], timeout=longest_s)
        finally:
            waiting.cancel()
