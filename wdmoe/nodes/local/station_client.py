"""A client of a base station's HTTP face, on the standard library: its status, and answers as they stream."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from wdmoe.errors import RequestError, TransportError
from wdmoe.receipt import Receipt, StageSeconds

_MOST_BYTES = 64 << 20  # of an answer that is not a stream
_MOST_LINE = 1 << 20
_STATUS_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a streamed answer."""

    text: str
    token_id: int
    at_s: float  # monotonic, when it was read from the socket
    devices: tuple[str, ...]
    layers: tuple[int, ...]  # in how many MoE layers each of them worked on it
    dropped_weight: float  # of the answer so far


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The last event: what is left of the text, and the account."""

    text: str
    reason: str
    receipt: Receipt


class StationClient:
    """Talks to one base station. Blocking; nothing stays open between calls."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """`timeout_s`: longest silence in the middle of an answer."""
        self._address = urlsplit(url).netloc
        self._timeout_s = timeout_s

    def status(self) -> Mapping[str, Any]:
        """What `/wdmoe/status` says.

        Raises:
            TransportError: no such answer.
        """
        with closing(http.client.HTTPConnection(self._address, timeout=_STATUS_TIMEOUT_S)) as connection:
            response = self._ask(connection, "GET", "/wdmoe/status")
            try:
                state = json.loads(response.read(_MOST_BYTES))
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise TransportError(f"the base station at {self._address} sent no status: {error}") from error
        if not isinstance(state, dict):
            raise TransportError(f"the base station at {self._address} sent no status")
        return state

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Token | End]:
        """Post a request to `/v1/completions` or `/v1/chat/completions` and give its events as they come.

        Closing the iterator closes the connection, which ends the work.

        Raises:
            RequestError: the request was refused.
            TransportError: the connection was lost, was silent for too long, or the answer broke off.
        """
        with closing(http.client.HTTPConnection(self._address, timeout=self._timeout_s)) as connection:
            response = self._ask(connection, "POST", path, {**body, "stream": True})
            yield from self._events(response)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> http.client.HTTPResponse:
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status == 200:
                return response
            said = response.read(_MOST_LINE)
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(f"the base station at {self._address} does not answer: {error}") from error
        raise RequestError(f"the base station answered {response.status}: {_message(said)}")

    def _events(self, response: http.client.HTTPResponse) -> Iterator[Token | End]:
        text = ""  # held back by the station while it could have become a stop sequence
        try:
            while line := response.readline(_MOST_LINE):
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise TransportError(f"the answer broke off: {_message(line[len(b'data: ') :])}")
                if event["choices"][0]["finish_reason"] is not None:
                    yield _end(event, text)
                    return
                if "wdmoe" in event:
                    yield _token(event)
                else:
                    text += _text(event)
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(f"the base station at {self._address} was lost: {error}") from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TransportError(f"the base station at {self._address} sent no such answer: {error!r}") from error
        raise TransportError(f"the base station at {self._address} was lost in mid-answer")


def _text(event: Mapping[str, Any]) -> str:
    choice = event["choices"][0]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


def _token(event: Mapping[str, Any]) -> Token:
    about = event["wdmoe"]
    return Token(
        text=_text(event),
        token_id=int(about["token_id"]),
        at_s=time.monotonic(),
        devices=tuple(about["devices"]),
        layers=tuple(about["layers"]),
        dropped_weight=float(about["dropped_weight"]),
    )


def _end(event: Mapping[str, Any], text: str) -> End:
    fields = dict(event["wdmoe"])
    receipt = Receipt(**{**fields, "stages": StageSeconds(**fields["stages"])})
    return End(text=text, reason=str(event["choices"][0]["finish_reason"]), receipt=receipt)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
