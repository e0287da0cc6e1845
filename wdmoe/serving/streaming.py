"""Answers one generation request: whole, or as a stream of server-sent events (SSE)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from wdmoe.errors import CancelledRequestError
from wdmoe.receipt import Receipt
from wdmoe.records import Finished, TextDelta, TextEngine, Waiting
from wdmoe.serving import responses
from wdmoe.serving.closing import Closing
from wdmoe.serving.errors import problem_from, shutting_down
from wdmoe.serving.generation import Step, run
from wdmoe.serving.metrics import Metrics
from wdmoe.serving.requests import Job, ServingLimits
from wdmoe.tasks import end_tasks

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in between must not collect events
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What all answers share."""

    engine: TextEngine
    limits: ServingLimits
    metrics: Metrics
    closing: Closing


class Reply(Response):
    """Runs a job while it is sent.

    When the client goes away, the work is cancelled; when the server closes, the client is told. An error
    before the first event has a status of its own, a later one is the last event of the stream.
    """

    def __init__(self, job: Job, service: Service) -> None:
        super().__init__()
        self._job, self._service = job, service
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Every error is told to the client, none escapes."""
        metrics = self._service.metrics
        work = self._send_stream(send) if self._job.stream else self._send_whole(scope, receive, send)
        try:
            await _unless(work, gone=_gone(receive), closing=self._service.closing.ends.wait())
        except CancelledRequestError:
            metrics.outcomes.labels("cancelled").inc()
        except Exception as error:
            metrics.outcomes.labels("error").inc()
            problem = problem_from(error, self._job.request_id)
            if self._started:
                await _send_event(send, problem.body(), last=True)
            else:
                await problem.response()(scope, receive, send)

    def _steps(self) -> AsyncGenerator[Step, None]:
        return run(self._service.engine, self._job.generations, self._service.limits.parallel_prompts)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts: list[list[str]] = [[] for _ in self._job.generations]
        ends: dict[int, Finished] = {}
        async with aclosing(self._steps()) as steps:
            async for step in steps:
                if isinstance(step.event, TextDelta):
                    texts[step.index].append(step.event.text)
                elif isinstance(step.event, Finished):
                    ends[step.index] = step.event
                    self._service.metrics.finished(step.event.reason, step.event.receipt)
        ordered = [ends[index] for index in range(len(texts))]
        receipt = responses.merge_receipts([end.receipt for end in ordered])
        reasons = [end.reason for end in ordered]
        body = responses.whole_answer(self._job, ["".join(parts) for parts in texts], reasons, receipt)
        await JSONResponse(body)(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        receipts: list[Receipt] = []
        begun: set[int] = set()
        async with aclosing(self._steps()) as steps:
            async for step in steps:
                await self._start(send)  # only now: until the first event, an error has a status of its own
                if isinstance(step.event, Waiting):
                    await _send_comment(send, step.event.text)
                    continue
                first = step.index not in begun
                begun.add(step.index)
                if isinstance(step.event, TextDelta):
                    event = responses.chunk(self._job, step.index, step.event.text, first=first, token=step.event)
                    await _send_event(send, event)  # also without text: a token was made, and somebody may count
                    continue
                receipts.append(step.event.receipt)
                self._service.metrics.finished(step.event.reason, step.event.receipt)
                end = responses.chunk(
                    self._job,
                    step.index,
                    "",
                    first=first,
                    reason=step.event.reason,
                    receipt=step.event.receipt,
                )
                await _send_event(send, end)
        if self._job.include_usage:
            await _send_event(send, responses.usage_chunk(self._job, responses.merge_receipts(receipts)))
        await _send_text(send, "[DONE]", last=True)

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})


async def _send_event(send: Send, body: dict[str, Any], *, last: bool = False) -> None:
    await _send_text(send, json.dumps(body, ensure_ascii=False, separators=(",", ":")), last=last)


async def _send_text(send: Send, text: str, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": not last})


async def _send_comment(send: Send, text: str) -> None:
    """What a client of server-sent events does not hand on, and a person sees."""
    await send({"type": "http.response.body", "body": f": {text}\n\n".encode(), "more_body": True})


async def _gone(receive: Receive) -> None:
    """Return when the client has closed its connection. The body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(work: Coroutine[Any, Any, None], *, gone: Coroutine[Any, Any, None], closing: Awaitable[Any]) -> None:
    """Run `work` to its end, or until the client goes or the server closes; it has ended when this returns.

    Raises:
        CancelledRequestError: the client went away.
        Problem: 503, the server closes.
        Whatever `work` raises.
    """
    task, left, closed = (asyncio.ensure_future(each) for each in (work, gone, closing))
    try:
        await asyncio.wait((task, left, closed), return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_tasks((task, left, closed))
    if not task.cancelled():
        task.result()
        return
    if left.done() and not left.cancelled():
        raise CancelledRequestError("the client closed its connection")
    raise shutting_down()
