"""Clients of the HTTP face that write down everything they are told, and when."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from tools.bench.catalogue.model import Question
from tools.bench.catalogue.records import Answer

SILENCE_S = 90.0
_MOST_LINE = 1 << 20


class Client(threading.Thread):
    """Asks one question, streamed or not. `answer` grows while the thread runs."""

    def __init__(self, port: int, question: Question, tokens: int, *, streamed: bool = True) -> None:
        super().__init__(name="client", daemon=True)
        self._port, self._streamed = port, streamed
        self._body = {
            "prompt": list(question.prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": streamed,
        }
        self.answer = Answer(wanted=tokens, streamed=streamed, asked_s=time.monotonic())
        self._connection: http.client.HTTPConnection | None = None
        self._news = threading.Condition()

    def run(self) -> None:
        try:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SILENCE_S)
            with closing(self._connection) as connection:
                self._ask(connection)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            self.answer.error, self.answer.told = f"{type(error).__name__}: {error}", False
        self.answer.ended_s = time.monotonic()
        with self._news:
            self._news.notify_all()

    def go(self) -> Client:
        self.start()
        return self

    def leave(self) -> None:
        """Close the connection in the middle of the answer."""
        if self._connection is not None and self._connection.sock is not None:
            self._connection.sock.close()

    def until(self, ready: Callable[[Answer], bool], timeout_s: float) -> None:
        """Until the answer is so far, has ended, or the time is over."""
        with self._news:
            self._news.wait_for(lambda: ready(self.answer) or not self.is_alive(), timeout_s)

    def _ask(self, connection: http.client.HTTPConnection) -> None:
        connection.request("POST", "/v1/completions", json.dumps(self._body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        self.answer.status = response.status
        if response.status != 200:
            self.answer.error = _message(response.read(_MOST_LINE))
        elif self._streamed:
            self._listen(response)
        else:
            whole = json.loads(response.read())
            self.answer.text = whole["choices"][0]["text"]
            self.answer.tokens = int(whole["usage"]["completion_tokens"])
            self.answer.receipt = whole["wdmoe"]

    def _listen(self, response: http.client.HTTPResponse) -> None:
        while line := response.readline(_MOST_LINE):
            if line.startswith(b":"):
                self.answer.comments.append(line[1:].decode().strip())
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                self.answer.error = str(event["error"]["message"])
                return
            self._note(event)
        if self.answer.receipt is None:
            self.answer.error, self.answer.told = "the stream ended without a word", False

    def _note(self, event: Mapping[str, Any]) -> None:
        choice, about = event["choices"][0], event.get("wdmoe")
        self.answer.text += choice["text"]
        if choice["finish_reason"] is not None:
            self.answer.receipt, self.answer.tokens = about, len(self.answer.ids)
        elif about is not None:
            with self._news:
                self.answer.ids.append(int(about["token_id"]))
                self.answer.devices |= set(about["devices"])
                self.answer.dropped.append(float(about["dropped_weight"]))
                self.answer.times_s.append(time.monotonic())
                self._news.notify_all()


def fetch(port: int, path: str, timeout_s: float = 5.0) -> Any:
    """JSON or text of a GET; None where it was not answered with 200."""
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                return None
        return json.loads(body) if body[:1] == b"{" else body.decode()
    except (OSError, http.client.HTTPException, ValueError):
        return None


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"not in OpenAI's shape: {body[:200].decode(errors='replace')}"
