"""The server's own manners: keys, sizes, health, metrics, clients that go, and its end."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time

import httpx
import pytest

from tests.lab.serving_bench import EchoEngine, serving
from wdmoe.errors import ConfigError, TransportError
from wdmoe.serving.requests import ServingLimits
from wdmoe.serving.server import serve_http


def _post(url, **more):
    body = {"prompt": "one two", "max_tokens": 2, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=20)


def _until(condition):
    limit = time.monotonic() + 20
    while not condition() and time.monotonic() < limit:
        time.sleep(0.01)
    return condition()


def test_health_follows_the_devices():
    engine = EchoEngine()
    with serving(engine) as server:
        good = httpx.get(f"{server.url}/health")
        assert (good.status_code, good.json()) == (200, {"status": "ok", "devices": 2})
        engine.devices.clear()
        bad = httpx.get(f"{server.url}/health")
        assert (bad.status_code, bad.json()) == (503, {"status": "waiting", "devices": 0})
        assert httpx.get(f"{server.url}/wdmoe/status").json()["model"] == "echo-moe"


def test_metrics_count_what_was_served():
    with serving(EchoEngine()) as server:
        assert _post(server.url).status_code == 200
        assert _post(server.url, n=3).status_code == 400
        httpx.get(f"{server.url}/a/scan/makes/no/new/label")
        page = httpx.get(f"{server.url}/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    lines = page.text.splitlines()
    for line in (
        'wdmoe_http_requests_total{path="/v1/completions",status="200"} 1.0',
        'wdmoe_http_requests_total{path="/v1/completions",status="400"} 1.0',
        'wdmoe_http_requests_total{path="other",status="404"} 1.0',
        'wdmoe_tokens_total{kind="completion"} 2.0',
        'wdmoe_answers_total{outcome="length"} 1.0',
        'wdmoe_stage_seconds_total{stage="bs_compute"} 0.5',
        'wdmoe_wire_bytes_total{direction="down"} 200.0',
        "wdmoe_retries_total 1.0",
        "wdmoe_dropped_weight_sum 0.25",
        "wdmoe_devices 2.0",
    ):
        assert line in lines


def test_what_is_known_of_liars_is_told():
    engine = EchoEngine()
    engine.checks = {"verified_answers": 70, "lies": 2, "odd_answers": 1, "skipped_verifications": 3}
    engine.checks |= {"devices_quarantined": 1, "state": "degraded"}
    engine.suspect = True
    with serving(engine) as server:
        receipt = _post(server.url).json()["wdmoe"]
        assert (receipt["suspect"], receipt["suspect_answers"]) == (True, 5)
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        good = httpx.get(f"{server.url}/health")
    assert (good.status_code, good.json()) == (200, {"status": "degraded", "devices": 2, "quarantined": 1})
    for line in (
        "wdmoe_answers_suspect_total 1.0",
        "wdmoe_verified_answers_total 70.0",
        "wdmoe_lies_total 2.0",
        "wdmoe_odd_answers_total 1.0",
        "wdmoe_skipped_verifications_total 3.0",
        "wdmoe_devices_quarantined 1.0",
    ):
        assert line in lines


def test_wants_its_key_everywhere_but_at_health():
    with serving(EchoEngine(), api_key="geheim") as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic geheim"}):
            for path in ("/v1/models", "/metrics", "/wdmoe/status", "/nowhere"):
                answer = httpx.get(server.url + path, headers=header)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        right = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer geheim"})
        assert right.status_code == 200


def test_a_body_is_bounded_stated_or_not():
    with serving(EchoEngine(), limits=ServingLimits(body_bytes=1000)) as server:
        stated = _post(server.url, prompt="x" * 2000)
        url = f"{server.url}/v1/completions"
        chunks = (b"x" * 100 for _ in range(20))
        unstated = httpx.post(url, content=chunks, headers={"Content-Type": "application/json"})
        assert (stated.status_code, unstated.status_code) == (413, 413)
        assert stated.json()["error"]["message"] == "the body may have 1000 bytes at most"
        assert _post(server.url).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"{", "application/json", "not valid JSON"),
        (b"[1]", "application/json", "object"),
        (b'{"prompt": "a"}', "text/plain", "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json", "prompt"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", "temperature"),
        (b'{"prompt": "a", "max_tokens": "5"}', "application/json", "max_tokens"),
        (b'{"a":' * 100_000, "application/json", "body"),
        (b"", "application/json", "JSON"),
        (b"\xff\xfe\x00", "application/json", "body"),
    ],
)
def test_bodies_that_are_none(content, kind, says):
    with serving(EchoEngine()) as server:
        answer = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_have_openais_shape():
    with serving(EchoEngine()) as server:
        assert httpx.get(f"{server.url}/v2").json()["error"]["message"] == "Not Found"
        wrong = httpx.get(f"{server.url}/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (405, "Method Not Allowed")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["one two", ["one two", "three"]])
def test_a_client_that_goes_away_cancels_its_work(stream, prompt):
    engine = EchoEngine(step_s=0.05)
    engine.context_tokens = 100_000
    with serving(engine) as server:
        host, port = server.url[7:].split(":")
        body = json.dumps({"prompt": prompt, "max_tokens": 90_000, "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            assert _until(lambda: engine.running > 0)
            if stream:
                assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert _until(lambda: engine.running == 0)
        assert _until(lambda: 'outcome="cancelled"} 1.0' in httpx.get(f"{server.url}/metrics").text)


def test_a_reader_that_stalls_is_let_go_when_it_leaves():
    """The stream is parked in a full socket then, not in the engine."""
    engine = EchoEngine()
    engine.context_tokens = 10_000_000
    with serving(engine) as server:
        host, port = server.url[7:].split(":")
        body = json.dumps({"prompt": "w" * 1000, "max_tokens": 9_000_000, "stream": True}).encode()
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            assert _until(lambda: engine.running > 0)
            time.sleep(0.5)  # the buffers fill
        assert _until(lambda: engine.running == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_shutdown_ends_what_still_runs_with_a_word(stream):
    engine = EchoEngine(step_s=0.02)
    engine.context_tokens = 100_000
    got: list[httpx.Response] = []
    with serving(engine, limits=ServingLimits(drain_s=0.1)) as server:
        ask = threading.Thread(target=lambda: got.append(_post(server.url, max_tokens=90_000, stream=stream)))
        ask.start()
        assert _until(lambda: engine.running > 0)
        time.sleep(0.1)
    ask.join(20)
    assert engine.running == 0
    if stream:
        last = [line for line in got[0].text.splitlines() if line][-1]
        assert json.loads(last[6:])["error"]["code"] == "shutting_down"
    else:
        assert got[0].status_code == 503


def test_shutdown_lets_short_answers_finish():
    engine = EchoEngine(step_s=0.02)
    got: list[httpx.Response] = []
    with serving(engine) as server:
        ask = threading.Thread(target=lambda: got.append(_post(server.url, max_tokens=20)))
        ask.start()
        assert _until(lambda: engine.running > 0)
    ask.join(20)
    assert got[0].json()["usage"]["completion_tokens"] == 20


def test_while_answers_end_new_requests_are_told_to_come_back():
    engine = EchoEngine(step_s=0.02)
    engine.context_tokens = 100_000
    got: list[httpx.Response] = []
    with serving(engine, limits=ServingLimits(drain_s=20)) as server:
        ask = threading.Thread(target=lambda: got.append(_post(server.url, max_tokens=100, stream=True)))
        ask.start()
        assert _until(lambda: engine.running > 0)
        server.cancel()
        assert _until(lambda: httpx.get(f"{server.url}/health").json()["status"] == "stopping")
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        late = _post(server.url)
    ask.join(20)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    assert int(late.headers["Retry-After"]) > 0
    assert got[0].text.endswith("data: [DONE]\n\n")


def test_a_body_that_is_not_whole_when_the_server_stops_is_refused():
    with serving(EchoEngine()) as server, _half_sent(server.url) as client:
        server.cancel()
        said = b"".join(iter(lambda: client.recv(10_000), b""))
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b'"shutting_down"' in said


def _half_sent(url: str) -> socket.socket:
    host, port = url[7:].split(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    client.sendall(head + b'{"prompt"')
    time.sleep(0.2)  # it has arrived
    return client


def test_a_taken_port_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(TransportError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            asyncio.run(serve_http(EchoEngine(), "127.0.0.1", port))


def test_an_unknown_host_is_one_clear_line():
    with pytest.raises(TransportError, match=r"no\.such\.host\.invalid:0"):
        asyncio.run(serve_http(EchoEngine(), "no.such.host.invalid", 0))


def test_open_to_all_without_a_key_is_said(caplog):
    with caplog.at_level(logging.WARNING), serving(EchoEngine(), host="0.0.0.0"):  # noqa: S104
        assert "set an API key" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), serving(EchoEngine(), api_key="k", host="0.0.0.0"):  # noqa: S104
        assert caplog.text == ""


def test_limits_are_checked():
    with pytest.raises(ConfigError, match="body_bytes"):
        ServingLimits(body_bytes=0)
    with pytest.raises(ConfigError, match="head_s"):
        ServingLimits(head_s=0)
    with pytest.raises(ConfigError, match="drain_s"):
        ServingLimits(drain_s=float("nan"))
