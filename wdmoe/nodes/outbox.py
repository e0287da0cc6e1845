"""What a station is about to send, bounded for each peer: one that asks faster than it listens must not fill memory."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from wdmoe.transport.codec.messages import Message

log = logging.getLogger(__name__)

MOST_WAITING = 64  # messages to one peer; a device asks for a few chunks at once


class Outbox:
    """A queue of messages, first come, first sent. One event loop owns it."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[bytes, Message]] = asyncio.Queue()
        self._waiting: Counter[bytes] = Counter()
        self.dropped = 0

    def put(self, route: bytes, message: Message) -> None:
        """Queue a message. One too many for its peer is dropped and counted: what matters is asked for again."""
        if self._waiting[route] >= MOST_WAITING:
            self.dropped += 1
            log.debug("dropped a %s: too many wait for its peer", type(message).__name__)
            return
        self._waiting[route] += 1
        self._queue.put_nowait((route, message))

    async def get(self) -> tuple[bytes, Message]:
        """The next message and whom it is for. Waits for it; cancelling loses none."""
        route, message = await self._queue.get()
        self._waiting[route] -= 1
        if not self._waiting[route]:
            del self._waiting[route]
        return route, message

    def __len__(self) -> int:
        return self._queue.qsize()
