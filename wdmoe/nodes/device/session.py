"""One live session of a device with its base station, from Welcome to whatever ends it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from wdmoe.errors import ProtocolError, RefusedError, TransportError
from wdmoe.nodes.device.broadcast_receiver import Radio, RadioSite
from wdmoe.nodes.device.compute_thread import ComputeThread
from wdmoe.nodes.device.expert_fetch import ExpertFetcher
from wdmoe.nodes.device.expert_store import ExpertStore
from wdmoe.nodes.device.hardware import resident_bytes
from wdmoe.nodes.device.rules import wanted_experts
from wdmoe.tasks import run_together, run_until_first, within
from wdmoe.transport.channel import ControlLink
from wdmoe.transport.codec.messages import (
    Chunk,
    Failure,
    Fetch,
    Goodbye,
    Hello,
    Message,
    Ping,
    Place,
    Pong,
    Ready,
    Tune,
    Welcome,
)

log = logging.getLogger(__name__)

BEATS_PER_LEASE = 4
NEWS_S = 0.1  # at most so often the base station hears what was loaded meanwhile

KeepPlace: TypeAlias = Callable[[Place], None]


class SentAwayError(RefusedError):
    """A Goodbye that asks not to come back soon: revoked, replaced by another process with the same key, not fit.

    It is no end: a board in an attic that ended by itself would have to be started by hand when it is wanted again.
    """


class DeviceSession:
    """Listens, beats, follows placements, hears broadcasts. Use: `await DeviceSession(...).run()`."""

    def __init__(
        self,
        link: ControlLink,
        welcome: Welcome,
        store: ExpertStore,
        compute: ComputeThread,
        last_place: Place | None,
        keep_place: KeepPlace,
        radio: RadioSite,
    ) -> None:
        """Nothing is owned; `link` is used by this session alone while it runs.

        Args:
            last_place: of an earlier session with the same bundle. The base station may still count on it.
            keep_place: told every placement that is followed.
            radio: for semantic broadcasts.
        """
        self._link = link
        self._welcome = welcome
        self._store = store
        self._compute = compute
        self._place = last_place
        self._keep_place = keep_place
        self._generation = -1  # of this session: after a restart the base station may count anew
        self._fetcher = ExpertFetcher(self._ask)
        self._radio = Radio(radio, self._fetcher.fetch, self._link.send)
        self._placed = asyncio.Event()
        self._news = asyncio.Event()
        self._heard_s = time.monotonic()
        self._complaints: list[str] = []
        self._hello: Hello | None = None  # to be sent in this session, which lives already

    async def run(self) -> None:
        """Serve until the session ends; never returns normally.

        Raises:
            SentAwayError: the base station wants this device not to come back soon.
            TransportError: the session was ended, or the base station is silent for longer than the lease.
        """
        if self._place is not None:
            self._placed.set()
        await run_together(self._listen(), self._beat(), self._follow(), self._radio.run())

    def introduce_again(self, hello: Hello) -> None:
        """Tell the base station what has changed in this device's report. Soon, and of this session."""
        self._hello = hello
        self._news.set()

    async def _listen(self) -> None:
        while True:
            message = (await self._link.receive()).message
            if not isinstance(message, Failure):  # a station that only refuses doesn't serve this device
                self._heard_s = time.monotonic()
            self._handle(message)

    def _handle(self, message: Message) -> None:
        if isinstance(message, Chunk):
            self._fetcher.accept(message)
        elif isinstance(message, Place):
            self._new_place(message)
        elif isinstance(message, Tune):
            self._radio.tune(message)
        elif isinstance(message, Goodbye):
            if not message.retry:
                raise SentAwayError(f"the base station sent this device away: {message.reason}")
            raise TransportError(f"the base station ended the session: {message.reason}")
        elif isinstance(message, Welcome):
            self._compute.attach_again()
        elif isinstance(message, Failure):
            log.warning("the base station refused a message: %s", message.reason)
        elif not isinstance(message, Pong):
            log.warning("ignored a %s from the base station: only devices send that", type(message).__name__)

    def _new_place(self, place: Place) -> None:
        if place.generation <= self._generation:
            return
        try:
            wanted_experts(place)
        except ProtocolError as error:
            log.warning("ignored a placement: %s", error)
            return
        self._generation = place.generation
        self._place = place
        self._keep_place(place)
        self._placed.set()

    async def _follow(self) -> None:
        """Let the newest placement be followed; a newer one interrupts."""
        while True:
            await self._placed.wait()
            self._placed.clear()
            if self._place is not None:
                follow = self._store.follow(self._place, self._fetcher.fetch, self._news.set, self._complain)
                await run_until_first(follow, self._placed.wait())

    async def _beat(self) -> None:
        """Ping, and say what is ready: when that changed, and with every ping, in case one was lost."""
        beat_s = self._welcome.lease_s / BEATS_PER_LEASE
        sequence, next_s = 0, time.monotonic()
        while True:
            now_s = time.monotonic()
            silence_s = now_s - self._heard_s
            if silence_s > self._welcome.lease_s:
                raise TransportError(f"the base station is silent for {silence_s:.1f} s")
            await self._tell_news()
            if now_s >= next_s:
                await self._tell(self._ping(sequence))
                sequence, next_s = sequence + 1, now_s + beat_s
            await self._rest(next_s)

    async def _rest(self, until_s: float) -> None:
        try:
            await within(until_s - time.monotonic(), self._news.wait())
        except asyncio.TimeoutError:
            return
        await asyncio.sleep(min(NEWS_S, max(0.0, until_s - time.monotonic())))

    async def _tell_news(self) -> None:
        self._news.clear()
        if self._hello is not None:
            hello, self._hello = self._hello, None
            await self._tell(hello)
        if self._place is not None:
            experts = np.array(self._store.ready(self._place), np.int32).reshape(-1, 2)
            await self._tell(Ready(generation=self._place.generation, experts=experts))
        while self._complaints:
            await self._tell(Failure(attempt=0, reason=self._complaints.pop(0)))

    def _complain(self, line: str) -> None:
        log.warning("%s", line)
        self._complaints.append(line)
        self._news.set()

    def _ping(self, sequence: int) -> Ping:
        return Ping(
            sequence=sequence,
            done=self._compute.done,
            queued=self._compute.queued,
            rss_bytes=resident_bytes(),
        )

    async def _ask(self, fetch: Fetch) -> None:
        await self._link.send(fetch)

    async def _tell(self, message: Message) -> None:
        """Say something that is said again later: a queue that is full now is no reason to leave."""
        try:
            await self._link.send(message)
        except TransportError as error:
            log.debug("a %s was not sent: %s", type(message).__name__, error)
