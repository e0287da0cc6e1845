"""Connections that say nothing, little, or take nothing: they have their time, and nobody else waits for them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import httpx
import pytest

from tests.lab.serving_bench import EchoEngine, Server, serving
from wdmoe.serving.requests import ServingLimits

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def _dial(server: Server, source: str = "127.0.0.1") -> socket.socket:
    host, port = server.url[7:].split(":")
    return socket.create_connection((host, int(port)), timeout=20, source_address=(source, 0))


@contextmanager
def _silent(server: Server, count: int, source: str = "127.0.0.2") -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(_dial(server, source))) for _ in range(count)]


def _answers(server: Server) -> bool:
    body = {"prompt": "one two", "max_tokens": 2}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=20).status_code == 200


def _said(client: socket.socket) -> bytes:
    """All until the server closes."""
    parts = []
    while part := client.recv(10_000):
        parts.append(part)
    return b"".join(parts)


def _error(said: bytes) -> dict[str, str]:
    return json.loads(said.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_silent_connections_make_room(source, caplog):
    """From the same address as the client and from another one, whatever the limit that they break."""
    with serving(EchoEngine(), limits=ServingLimits(connections=40, connections_per_address=20)) as server:
        with _silent(server, 100, source):
            for path in ("/health", "/metrics"):
                assert httpx.get(server.url + path).status_code == 200
            assert _answers(server)
            with _silent(server, 30, "127.0.0.3"), _silent(server, 30, "127.0.0.4"):
                assert httpx.get(f"{server.url}/health").status_code == 200
                assert _answers(server)
        told = [line for line in caplog.messages if "silent ones are closed" in line]
        assert len(told) == 1  # not a line for each


def test_of_one_address_the_oldest_silent_one_is_closed():
    with serving(EchoEngine(), limits=ServingLimits(connections_per_address=3)) as server, _silent(server, 3) as held:
        time.sleep(0.1)
        with _silent(server, 1) as late, _silent(server, 3, "127.0.0.3"):
            assert held[0].recv(1) == b""
            for each in (*held[1:], *late):
                each.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert each.recv(100).startswith(b"HTTP/1.1 200 ")


def test_requests_in_work_are_never_closed_for_others():
    """Where all that are open are busy, the state is told and everything else is turned away."""
    engine = EchoEngine(step_s=0.05)
    engine.context_tokens = 100_000
    body = json.dumps({"prompt": "one two", "max_tokens": 90_000, "stream": True}).encode()
    with (
        serving(engine, limits=ServingLimits(connections=3, connections_per_address=2)) as server,
        ExitStack() as stack,
    ):
        busy = []
        for _ in range(3):
            each = stack.enter_context(closing(_dial(server)))
            busy.append(each)
            each.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            assert each.recv(100).startswith(b"HTTP/1.1 200 ")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "one"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        assert int(refused.headers["Retry-After"]) > 0
        for each in busy:
            assert each.recv(100)
            each.close()


def test_a_head_has_its_time():
    with serving(EchoEngine(), limits=ServingLimits(head_s=0.5)) as server, _silent(server, 2) as (slow, mute):
        begun_s = time.monotonic()
        for letter in b"GET /health HT":
            slow.sendall(bytes([letter]))
            time.sleep(0.02)
        said = _said(slow)
        assert time.monotonic() - begun_s > 0.4
        assert said.startswith(b"HTTP/1.1 408 ")
        assert "the head of the request" in _error(said)["message"]
        assert _said(mute) == b""  # no answer where nothing was asked


def test_the_head_of_a_later_request_has_its_time_too():
    with serving(EchoEngine(), limits=ServingLimits(head_s=0.5)) as server, _silent(server, 1) as (client,):
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(10_000).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"GET /hea")
        assert b"HTTP/1.1 408 " in _said(client)


def test_a_body_has_its_time():
    with serving(EchoEngine(), limits=ServingLimits(body_s=0.5)) as server, _silent(server, 1) as (client,):
        client.sendall(POST + b"Content-Length: 99\r\nConnection: close\r\n\r\n{")
        time.sleep(0.1)
        client.sendall(b'"prompt"')
        said = b"".join(iter(lambda: client.recv(10_000), b""))
        assert said.startswith(b"HTTP/1.1 408 ")
        assert _error(said)["code"] == "request_timeout"


def test_a_request_in_work_has_all_the_time_it_takes():
    with serving(EchoEngine(step_s=0.1), limits=ServingLimits(head_s=0.1, body_s=0.1)) as server:
        body = {"prompt": "one two", "max_tokens": 10}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=20).status_code == 200


def test_a_client_that_does_not_read_is_let_go():
    engine = EchoEngine()
    engine.context_tokens = 10_000_000
    body = json.dumps({"prompt": "w" * 1000, "max_tokens": 9_000_000, "stream": True}).encode()
    with serving(engine, limits=ServingLimits(stall_s=0.5)) as server, _silent(server, 1) as (client,):
        client.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        limit_s = time.monotonic() + 20
        while not engine.most_running or engine.running:
            assert time.monotonic() < limit_s
            time.sleep(0.05)


def test_what_is_no_http_is_told_in_openais_shape():
    with serving(EchoEngine()) as server, _silent(server, 1) as (client,):
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        said = _said(client)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert _error(said)["type"] == "invalid_request_error"
