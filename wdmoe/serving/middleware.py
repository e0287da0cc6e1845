"""The outermost ASGI layer: request ids, the API key, bounds, who is turned away, and a count of what was answered."""

from __future__ import annotations

import asyncio
import hmac
import logging
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wdmoe.serving.closing import Closing
from wdmoe.serving.connections import CROWDED
from wdmoe.serving.errors import Problem, problem_from, shutting_down, too_many, too_slow
from wdmoe.serving.metrics import Metrics
from wdmoe.serving.requests import ServingLimits

_log = logging.getLogger(__name__)

_OPEN_PATHS = frozenset({"/health"})  # for probes, which carry no key
_WITHOUT_BODY = frozenset({"GET", "HEAD"})
_STATE_PATHS = frozenset({"/health", "/metrics", "/wdmoe/status"})  # answered to the end, and in any crowd


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Who may pass, and what is told about it."""

    api_key: str
    limits: ServingLimits
    closing: Closing
    metrics: Metrics
    paths: frozenset[str]  # label values of the request counter: a scan must not make new ones


class Guard:
    """Lets through what may pass. An error that escapes the application is logged and told by its id."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        outgoing = _Outgoing(send, request_id)
        rules = self._rules
        with rules.metrics.active.track_inprogress(), rules.closing.work():
            try:
                self._check(scope)
                body = _Body(receive, rules.limits, rules.closing)
                if scope["method"] in _WITHOUT_BODY or await body.read():
                    await self._app(scope, body, outgoing)
            except (Exception, asyncio.CancelledError) as error:
                # Cancelled: the server ends, and this request would not. That is told like all that ends it.
                problem = (
                    shutting_down() if isinstance(error, asyncio.CancelledError) else problem_from(error, request_id)
                )
                if not outgoing.status:
                    await problem.response()(scope, receive, outgoing)
        path = scope["path"] if scope["path"] in rules.paths else "other"
        rules.metrics.requests.labels(path, outgoing.status or 499).inc()  # 499: the client did not wait for any
        _log.info("%s %s %s %s", request_id, scope["method"], scope["path"], outgoing.status)

    def _check(self, scope: Scope) -> None:
        """Raises Problem if this request may not pass."""
        path, headers, rules = scope["path"], Headers(scope=scope), self._rules
        if rules.api_key and path not in _OPEN_PATHS:
            _check_key(headers, rules.api_key)
        if path not in _STATE_PATHS:
            if rules.closing.begun.is_set():
                raise shutting_down()
            if CROWDED in scope["state"]:
                raise too_many()
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > rules.limits.body_bytes:
            raise _too_large(rules.limits.body_bytes)


def _check_key(headers: Headers, api_key: str) -> None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), api_key.encode()):
        message = "this server wants its API key: send 'Authorization: Bearer KEY'"
        wanted = {"WWW-Authenticate": "Bearer"}
        raise Problem(401, message, kind="authentication_error", code="invalid_api_key", headers=wanted)


class _Outgoing:
    """Adds the request id to an answer and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)


class _Body:
    """Takes a body in before the application sees the request: so many bytes at most, and in its time.

    A request whose body never comes whole costs little then.
    """

    def __init__(self, receive: Receive, limits: ServingLimits, closing: Closing) -> None:
        self._receive, self._limits, self._closing = receive, limits, closing
        self._whole: Message | None = None

    async def __call__(self) -> Message:
        """ASGI's receive: the whole body at once, and then, after as long as it takes, that the client has gone."""
        if self._whole is None:
            return await self._receive()
        whole, self._whole = self._whole, None
        return whole

    async def read(self) -> bool:
        """Take it in. Whether the client is still there.

        Raises:
            Problem: 408 or 413, or 503 when the server ends before the body is whole.
        """
        reading = asyncio.ensure_future(self._read())
        ends = asyncio.ensure_future(self._closing.begun.wait())
        try:
            await asyncio.wait((reading, ends), timeout=self._limits.body_s, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise shutting_down() if ends.done() else too_slow("body", self._limits.body_s)
        finally:
            reading.cancel()
            ends.cancel()

    async def _read(self) -> bool:
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return False
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise _too_large(self._limits.body_bytes)
            if not message.get("more_body", False):
                self._whole = {"type": "http.request", "body": bytes(body), "more_body": False}
                return True


def _too_large(limit: int) -> Problem:
    return Problem(413, f"the body may have {limit} bytes at most", code="body_too_large")
