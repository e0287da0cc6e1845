"""Failures as OpenAI's clients expect them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from wdmoe.errors import EngineLostError, ExpertsUnavailableError, NotFiniteError, OverloadedError, RequestError

_log = logging.getLogger(__name__)

RETRY_AFTER_S = 1  # a place in the queue comes free when an answer ends
_WAIT = {"Retry-After": str(RETRY_AFTER_S)}


class Problem(HTTPException):
    """A failure that has a status of its own.

    An HTTPException, because FastAPI turns any other that is raised while it reads a body into a plain 400.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.kind, self.param, self.code = kind, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer, or of an error event in a stream."""
        error = {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), status_code=self.status_code, headers=self.headers)


def problem_from(error: BaseException, request_id: str) -> Problem:
    """What a client is told about any error. One that was not foreseen is logged, and told by its id only."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):  # the framework's own: 404 path, 405 method, 400 body
        return Problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return _validation(error)
    if isinstance(error, RequestError):
        return Problem(400, str(error))
    if isinstance(error, OverloadedError):
        return Problem(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded", headers=_WAIT)
    if isinstance(error, EngineLostError):
        return Problem(503, str(error), kind="server_error", code="engine_lost", headers=_WAIT)
    if isinstance(error, ExpertsUnavailableError):
        return Problem(503, str(error), kind="server_error", code="experts_unavailable", headers=_WAIT)
    if isinstance(error, NotFiniteError):
        return Problem(502, str(error), kind="server_error", code="not_finite")
    _log.error("request %s failed", request_id, exc_info=error)
    return Problem(500, f"internal error; the server's log has it under {request_id}", kind="server_error")


def shutting_down() -> Problem:
    """For requests that come, or still run, when the server has to end."""
    return Problem(503, "the server is shutting down", kind="server_error", code="shutting_down", headers=_WAIT)


def too_many() -> Problem:
    """For requests on more connections than the server keeps."""
    message = "too many connections are open; try again later"
    return Problem(503, message, kind="server_error", code="too_many_connections", headers=_WAIT)


def too_slow(part: str, longest_s: float) -> Problem:
    """For requests that take too long to arrive.

    Args:
        part: "head" or "body".
        longest_s: how long that may take.
    """
    return Problem(408, f"the {part} of the request did not arrive within {longest_s:g} s", code="request_timeout")


def _validation(error: RequestValidationError) -> Problem:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return Problem(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if not where:
        return Problem(400, f"the body must be a JSON object sent as application/json: {first['msg']}")
    return Problem(400, f"{where}: {first['msg']}", param=where)
