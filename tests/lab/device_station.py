"""The least base station that a device can join: real sockets and keys, experts in memory, every step by hand."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.lab.expert_files import ExpertFile
from tests.lab.waiting import PATIENCE_S
from wdmoe.errors import PeerGoneError
from wdmoe.records import ExpertId
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.messages import (
    Attach,
    Attached,
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
    Result,
    Run,
    Welcome,
)
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.keys import station_keys
from wdmoe.transport.security.zap import Door
from wdmoe.transport.zmq.channels import open_control_station, open_data_station
from wdmoe.transport.zmq.sockets import StationSecurity, new_context

DIGEST = "ab" * 32

Experts = dict[ExpertId, ExpertFile]


class Station:
    """Answers what a device says; a test looks at what was `seen` and sends the rest itself."""

    def __init__(self, state: Path, experts: Experts, *, bind: str, lease_s: float, secure: bool) -> None:
        self._keys = station_keys(state)
        self._admission = Admission(state)
        self._context = new_context()
        self._door = Door(self._context, self._admission)
        security = StationSecurity(self._keys, self._door) if secure else None
        self._control = open_control_station(self._context, bind, security)
        self._data = open_data_station(self._context, "tcp://127.0.0.1:*", security)
        self.endpoint = self._control.endpoint
        self.experts = experts
        self.lease_s = lease_s
        self.seen: list[Message] = []
        self.keys: set[str] = set()
        self.fetches: Counter[ExpertId] = Counter()
        self.spoil: Callable[[Chunk], Chunk | None] = lambda chunk: chunk
        self.mute = False
        self.place: Place | None = None
        self.generation = 0
        self.control_route = b""
        self.data_route = b""
        self.data_replies: list[Envelope] = []
        self._attempt = 0
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._pump())]

    def token(self) -> str:
        return self._admission.create_token(self._keys, [self.endpoint], 60.0).text()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._data.wake()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._control.close()
        self._data.close()
        self._door.close()
        self._context.destroy(linger=0)

    # ---- what a test does ----

    async def until(self, done: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE_S
        while not (value := done()):
            for task in self._tasks:
                if task.done():
                    task.result()
            assert time.monotonic() < end, f"never happened; last seen: {[*map(type, self.seen[-5:])]}"
            await asyncio.sleep(0.01)
        return value

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.seen if isinstance(message, kind)]

    async def send(self, message: Message) -> None:
        await self._control.send(self.control_route, message)

    async def place_on(self, *ids: ExpertId, sha256: str = "", hidden: int = 16) -> None:
        """Place experts; from now on whoever says Hello gets the same placement."""
        self.generation += 1
        files = [self.experts[expert] for expert in ids]
        self.place = Place(
            generation=self.generation,
            experts=np.array(ids, np.int32).reshape(-1, 2),
            sha256=np.array([list(bytes.fromhex(sha256 or file.sha256)) for file in files], np.uint8).reshape(-1, 32),
            size=np.array([len(file.data) for file in files], np.int64),
            hidden=hidden,
        )
        if self.control_route:
            await self.send(self.place)

    async def ready(self, *ids: ExpertId) -> None:
        """Wait until the device says that exactly these are loaded, for the newest placement."""
        wanted = sorted(map(list, ids))
        await self.until(
            lambda: any(
                ready.generation == self.generation and sorted(ready.experts.tolist()) == wanted
                for ready in self.of(Ready)[-1:]
            )
        )

    async def run(self, expert: int, tokens: Any, **fields: Any) -> Result | Failure:
        """Send a Run for all tokens and wait for its reply."""
        attempt = await self.start_run(expert, tokens, **fields)
        reply: Result | Failure = await self.until(lambda: self.reply(attempt))
        return reply

    async def start_run(
        self, expert: int, tokens: Any, *, layer: int = 0, remaining_s: float = 10.0, bandwidth_hz: float = 0.0
    ) -> int:
        await self.until(lambda: self.data_route)
        self._attempt += 1
        run = Run(
            attempt=self._attempt,
            layer=layer,
            remaining_s=remaining_s,
            experts=(expert,),
            counts=(len(tokens),),
            tokens=tokens,
            rows=np.arange(len(tokens), dtype=np.int32),
            weights=np.ones(len(tokens), np.float32),
            bandwidth_hz=bandwidth_hz,
        )
        await self.until(lambda: self._sent(run))
        return self._attempt

    def _sent(self, run: Run) -> bool:
        try:
            self.sent_bytes = self._data.send(self.data_route, run)
            return True
        except PeerGoneError:  # of a session that ended; the device attaches again
            return False

    def reply(self, attempt: int) -> Result | Failure | None:
        found = [e.message for e in self.data_replies if getattr(e.message, "attempt", -1) == attempt]
        assert len(found) <= 1, "one run, two replies"
        return found[0] if found else None  # type: ignore[return-value]

    # ---- what the station does by itself ----

    async def _listen(self) -> None:
        while True:
            envelope = await self._control.receive()
            self.seen.append(envelope.message)
            if not self.mute:
                with contextlib.suppress(PeerGoneError):  # who asked went meanwhile
                    await self._answer(envelope)

    async def _answer(self, envelope: Envelope) -> None:
        message, route = envelope.message, envelope.route
        if isinstance(message, Hello):
            await self._welcome(envelope, message)
        elif route != self.control_route:
            await self._control.send(route, Goodbye(reason="no live session; say hello"))
        elif isinstance(message, Ping):
            await self._control.send(route, Pong(sequence=message.sequence))
        elif isinstance(message, Fetch):
            chunk = self.spoil(self._chunk(message))
            if chunk is not None:
                await self._control.send(route, chunk)

    async def _welcome(self, envelope: Envelope, hello: Hello) -> None:
        if hello.enrol_key:
            self._admission.enrol(envelope.key, hello.enrol_key, hello.report.name)
            await self._control.send(envelope.route, Welcome(session=hello.session, enrolled=True))
            return
        self.keys.add(envelope.key)
        self.control_route = envelope.route
        port = int(self._data.endpoint.rpartition(":")[2])
        welcome = Welcome(
            session=hello.session,
            device_id="ab",
            data_port=port,
            lease_s=self.lease_s,
            max_message_bytes=1 << 20,
            model="test",
            manifest_sha256=DIGEST,
        )
        await self.send(welcome)
        if self.place is not None:
            await self.send(self.place)

    def _chunk(self, fetch: Fetch) -> Chunk:
        expert = ExpertId(fetch.layer, fetch.expert)
        self.fetches[expert] += 1
        data = np.frombuffer(self.experts[expert].data, np.uint8)
        return Chunk(
            layer=fetch.layer,
            expert=fetch.expert,
            offset=fetch.offset,
            total=len(data),
            data=data[fetch.offset : fetch.offset + fetch.length],
        )

    async def _pump(self) -> None:
        """The data plane, without a thread: it looks every two milliseconds."""
        while True:
            while (envelope := self._data.receive(0.0)) is not None:
                if isinstance(envelope.message, Attach):
                    self.data_route = envelope.route
                    self._data.send(envelope.route, Attached(session=envelope.message.session))
                else:
                    self.data_replies.append(envelope)
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def station(
    state: Path, experts: Experts, *, bind: str = "tcp://127.0.0.1:*", lease_s: float = 3.0, secure: bool = True
) -> AsyncIterator[Station]:
    opened = Station(state, experts, bind=bind, lease_s=lease_s, secure=secure)
    try:
        yield opened
    finally:
        await opened.close()


@contextlib.asynccontextmanager
async def running(program: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Run a program beside the test. One that ends before it is cancelled was awaited by the test, or fails it."""
    task = asyncio.create_task(program)
    try:
        yield task
    finally:
        awaited = task.done() and not task._log_traceback  # the exception was seen
        task.cancel()
        if not awaited:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, PATIENCE_S)


def ids(layer: int, *experts: int) -> Iterator[ExpertId]:
    return (ExpertId(layer, expert) for expert in experts)
