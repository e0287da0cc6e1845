"""The outermost ASGI layer: request ids, the API key, the size of bodies, a count of what was answered."""

from __future__ import annotations

import hmac
import logging
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wdmoe.serving.errors import Problem, problem_from
from wdmoe.serving.metrics import Metrics

_log = logging.getLogger(__name__)

_OPEN_PATHS = frozenset({"/health"})  # for probes, which carry no key


class Guard:
    """Lets through what may pass. An error that escapes the application is logged and told by its id."""

    def __init__(self, app: ASGIApp, *, api_key: str, body_bytes: int, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics = app, metrics
        self._api_key, self._body_bytes = api_key.encode(), body_bytes
        self._paths = paths  # label values of the request counter: a scan must not make new ones

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        outgoing = _Outgoing(send, request_id)
        headers = Headers(scope=scope)
        with self._metrics.active.track_inprogress():
            try:
                self._check(scope["path"], headers)
                await self._app(scope, _bounded(receive, self._body_bytes), outgoing)
            except Exception as error:
                problem = problem_from(error, request_id)
                if not outgoing.status:
                    await problem.response()(scope, receive, outgoing)
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.requests.labels(path, outgoing.status or 499).inc()  # 499: the client did not wait for any
        _log.info("%s %s %s %s", request_id, scope["method"], scope["path"], outgoing.status)

    def _check(self, path: str, headers: Headers) -> None:
        if self._api_key and path not in _OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key):
                message = "this server wants its API key: send 'Authorization: Bearer KEY'"
                wanted = {"WWW-Authenticate": "Bearer"}
                raise Problem(401, message, kind="authentication_error", code="invalid_api_key", headers=wanted)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._body_bytes:
            raise _too_large(self._body_bytes)


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


def _bounded(receive: Receive, limit: int) -> Receive:
    """Count a body that states no length while it comes in."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    return counted


def _too_large(limit: int) -> Problem:
    return Problem(413, f"the body may have {limit} bytes at most", code="body_too_large")
