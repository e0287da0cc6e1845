"""Answers requests with the model: implements `wdmoe.records.TextEngine` on top of the model thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.format.bundle import Manifest
from wdmoe.backbone.runtime.job import Event, Job
from wdmoe.backbone.runtime.model_thread import ModelThread, Task
from wdmoe.backbone.runtime.prompt import encode_prompt
from wdmoe.backbone.text.tokenizer import TextTokenizer
from wdmoe.errors import WdmoeError
from wdmoe.receipt import Ledger
from wdmoe.records import AnswerEvent, Finished, GenerationRequest

log = logging.getLogger(__name__)

T = TypeVar("T")


class Backbone(Protocol):
    """A model at work, by one of the two ways: transformers (`Station`) or graphs (`GraphStation`)."""

    @property
    def kind(self) -> str:
        """Which of them."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the model."""
        ...

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        ...

    def at_work(self) -> AbstractContextManager[object]:
        """Open on the model thread as long as it works."""
        ...

    def begin(self, ledger: Ledger) -> None:
        """What work of `Engine.call` computes in this greenlet from now on is booked there."""
        ...

    def forget(self) -> None:
        """Drop what was kept of former requests: it may be wrong. On the model thread."""
        ...

    def size_bytes(self, tokens: int) -> int:
        """The most that keys and values of a request of so many tokens take."""
        ...

    def answer(self, job: Job) -> Finished:
        """Run a job to its end, in a greenlet of its own."""
        ...

    def nats(self, windows: Int32Array, ledger: Ledger) -> Float32Array:
        """(windows, length) token ids -> (windows, length - 1) negative log-likelihood of every token but the first."""
        ...


class Engine:
    """Text in, text out. Every method may be called from any thread or event loop."""

    def __init__(
        self,
        station: Backbone,
        thread: ModelThread,
        status: Callable[[], Mapping[str, object]],
        *,
        policy: str,
    ) -> None:
        self._station = station
        self._thread = thread
        self._status = status
        self.policy = policy  # named in receipts; may be set anew

    @property
    def model_name(self) -> str:
        """Name shown to clients."""
        return self._station.manifest.model

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self._station.manifest.context_tokens

    async def status(self) -> Mapping[str, object]:
        """See `TextEngine.status`."""
        return {**self._status(), "requests": self._thread.load}

    async def prepare(self, request: GenerationRequest) -> tuple[int, ...]:
        """See `TextEngine.prepare`."""
        # A long text takes a while: not on the loop.
        return await asyncio.to_thread(encode_prompt, self._station.tokenizer, request, self.context_tokens)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[AnswerEvent]:
        """See `TextEngine.stream`."""
        prompt_ids = await self.prepare(request)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            if not loop.is_closed():  # a client's loop may end before its request does
                loop.call_soon_threadsafe(events.put_nowait, event)

        begun = request.begun
        ledger = Ledger(
            policy=self.policy,
            request_id=request.request_id,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(begun),
        )
        job = Job(prompt_ids=prompt_ids, begun=begun, sampling=request.sampling, ledger=ledger, emit=emit)
        size_bytes = self._station.size_bytes(len(prompt_ids) + request.sampling.max_tokens)
        self._thread.submit(Task(run=lambda: self._serve(job), fail=emit, cancel=job.cancel, size_bytes=size_bytes))
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            job.cancel()

    def call(self, work: Callable[[Any, Ledger], T]) -> Future[T]:
        """Run `work` on the model thread as a request of its own: for evaluation, and for tests."""
        future: Future[T] = Future()
        ledger = Ledger(policy=self.policy)

        def run() -> None:
            self._station.begin(ledger)
            try:
                future.set_result(work(self._station, ledger))
            except Exception as error:
                future.set_exception(error)

        self._thread.submit(Task(run=run, fail=future.set_exception, cancel=lambda: None))
        return future

    def _serve(self, job: Job) -> None:
        if job.cancelled:
            return
        try:
            job.emit(self._station.answer(job))
        except WdmoeError as error:
            job.emit(error)
        except Exception as error:  # a bug in one request must not take the others down; it is logged whole
            log.exception("a request failed")
            job.emit(error)
