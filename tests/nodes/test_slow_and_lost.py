"""Devices as processes that are slow, that stop for a while, or that take a whole layer with them when they die."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.backbone.test_spine import greedy
from tests.lab.families import save_tiny
from tests.lab.fleet import Fleet
from tests.lab.slow_device import COMMAND, Delay
from tests.lab.waiting import PATIENCE_S
from tests.nodes.test_alive import PROMPT, ask, names, until
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.nodes.base_station.base_station import BaseStation
from wdmoe.serving.server import serve_http

DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "mixtral"
    export_bundle(checkpoint, out, ExportSettings())
    return out


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


def settled(fleet: Fleet, station: BaseStation) -> None:
    """Wait until every device holds its copies too."""
    until(fleet, lambda: station.control.wanted() == {d.device_id: d.ready for d in station.control.roster.live()})


def state_of(station: BaseStation, name: str) -> Any:
    devices: Any = station.overview()["devices"]
    return next(device for device in devices if device["name"] == name)


def test_a_slow_device_loses_its_work_to_the_copies_and_gets_it_back(
    fleet: Fleet, bundle: Path, checkpoint: Path
) -> None:
    delay = Delay(fleet.folder / "delay", 0.15)
    with fleet.serve(bundle, devices=0, deadline_s=DEADLINE_S) as station:
        slow = fleet.add_device(node=[*COMMAND, str(delay.file)])
        for _ in range(2):
            fleet.add_device()
        fleet.wait(station, devices=3)
        settled(fleet, station)
        want, hedges = greedy(checkpoint, tokens=40), 0
        while not state_of(station, slow.name)["slow"]:
            ids, _, receipt = ask(fleet, station, tokens=40)
            assert ids == want
            assert (receipt.degraded, receipt.retries) == (False, 0)
            hedges += receipt.hedges
        assert station.overview()["hedges"] == hedges > 0
        delay.set(0)
        while state_of(station, slow.name)["slow"]:
            assert ask(fleet, station, tokens=40)[0] == want
        assert slow.name in ask(fleet, station, tokens=40)[1]
        assert slow.process.poll() is None
        assert station.overview()["devices_lost"] == 0


def test_a_device_that_stops_for_a_moment_costs_a_hedge_and_is_not_ejected(
    fleet: Fleet, bundle: Path, checkpoint: Path
) -> None:
    with fleet.serve(bundle, deadline_s=DEADLINE_S, lease_s=60.0) as station:
        settled(fleet, station)
        victim = next(d for d in fleet.devices if d.name in ask(fleet, station)[1])
        resume = threading.Timer(0.5, lambda: victim.signal(signal.SIGCONT))

        def stop() -> None:
            victim.signal(signal.SIGSTOP)
            resume.start()

        ids, _, receipt = ask(fleet, station, tokens=200, at_token={20: stop})
        resume.join()
        assert ids == greedy(checkpoint, tokens=200)
        assert (receipt.degraded, receipt.retries) == (False, 0)
        assert receipt.hedges > 0
        assert station.overview()["devices_lost"] == 0
        assert victim.name in names(station)


def pair_of_a_layer(fleet: Fleet, station: BaseStation) -> list[Any]:
    """The processes of all homes of some layer, and not of all layers: one device is left."""
    routing = station.control.routing
    for layer, row in routing.device_of.items():
        homes = {routing.devices[i].name for i in {*row.tolist(), *routing.standby_of[layer].tolist()}}
        if len(homes) < len(fleet.devices):
            return [device for device in fleet.devices if device.name in homes]
    raise AssertionError("every layer is everywhere")


@contextmanager
def http(fleet: Fleet, station: BaseStation) -> Iterator[str]:
    """The base station's HTTP face; gives its address."""
    ready: list[str] = []

    async def start() -> asyncio.Task[None]:
        task = asyncio.create_task(serve_http(station.engine, "127.0.0.1", 0, ready=ready.append))
        while not ready:
            await asyncio.sleep(0.01)
        return task

    async def stop(task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    task = fleet.loop.run(start())
    try:
        yield ready[0]
    finally:
        fleet.loop.run(stop(task))


def stream(url: str, tokens: int, at: int = -1, act: Callable[[], object] = lambda: None) -> list[str]:
    """Lines of a streamed answer; `act` runs after its first so many tokens, at 0 before it is asked for."""
    body = {"prompt": list(PROMPT), "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    lines: list[str] = []
    if at == 0:
        act()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
        assert response.status_code == 200, response.read()
        for line in sse_lines(response):
            lines.append(line)
            if len(lines) == at:
                act()
    return lines


def sse_lines(response: httpx.Response) -> Iterator[str]:
    """Lines as server-sent events know them: httpx ends one at each of Unicode's line ends, which a token may be."""
    rest = ""
    for piece in response.iter_text():
        *lines, rest = (rest + piece).split("\n")
        yield from filter(None, lines)


def ids_of(lines: list[str]) -> list[int]:
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [event["wdmoe"]["token_id"] for event in events if "token_id" in event.get("wdmoe", {})]


@pytest.mark.parametrize("at", [0, 5], ids=["before the prompt", "in the answer"])
def test_with_both_homes_of_a_layer_killed_the_stream_waits_and_is_exact(
    fleet: Fleet, bundle: Path, checkpoint: Path, at: int
) -> None:
    with fleet.serve(bundle, deadline_s=DEADLINE_S, wait_for_experts_s=PATIENCE_S) as station:
        settled(fleet, station)
        pair = pair_of_a_layer(fleet, station)
        with http(fleet, station) as url:
            lines = stream(url, 250, at, lambda: [device.kill() for device in pair])
            assert lines[-1] == "data: [DONE]"
            assert ids_of(lines) == greedy(checkpoint, tokens=250)
            receipt = json.loads(lines[-2][6:])["wdmoe"]
            assert not receipt["degraded"]
            comments = [line for line in lines if line.startswith(":")]
            assert (receipt["waited_s"] > 0) == bool(comments)
            assert comments or at == 0  # before the prompt others may be ready first
            assert all(line.startswith(": waiting for experts") for line in comments)
            assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_an_answer_at_once_waits_too_and_one_that_waits_too_long_is_503(fleet: Fleet, bundle: Path) -> None:
    body = {"prompt": list(PROMPT), "max_tokens": 12, "ignore_eos": True, "temperature": 0}
    with fleet.serve(bundle, devices=2, deadline_s=DEADLINE_S, wait_for_experts_s=PATIENCE_S) as station:
        settled(fleet, station)
        with http(fleet, station) as url:
            whole = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).json()
            for device in fleet.devices:
                device.kill()
            until(fleet, lambda: not names(station))
            back = threading.Timer(0.5, lambda: [device.start() for device in fleet.devices])
            back.start()
            again = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
            back.join()
            assert again.status_code == 200
            assert again.json()["choices"] == whole["choices"]
            assert again.json()["wdmoe"]["waited_s"] > 0

            fleet.wait(station, devices=2)
            for device in fleet.devices:
                device.kill()
            until(fleet, lambda: not names(station))
            station.layers.rules = type(station.layers.rules)(wait_for_experts_s=0.5)
            late = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "experts_unavailable"
            lines = stream(url, 12)
            assert lines[0].startswith(": waiting for experts")
            error = json.loads(lines[-1][6:])["error"]
            assert error["code"] == "experts_unavailable"
            assert "0.5 s" in error["message"]


def test_a_client_that_hangs_up_while_it_waits_frees_its_place(fleet: Fleet, bundle: Path) -> None:
    with fleet.serve(bundle, devices=2, deadline_s=DEADLINE_S, wait_for_experts_s=PATIENCE_S * 4) as station:
        for device in fleet.devices:
            device.kill()
        until(fleet, lambda: not names(station))
        body = {"prompt": list(PROMPT), "max_tokens": 12, "stream": True}
        with http(fleet, station) as url:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
                assert next(sse_lines(response)).startswith(": waiting for experts")
                assert station.engine._thread.load == 1
            until(fleet, lambda: station.engine._thread.load == 0)
