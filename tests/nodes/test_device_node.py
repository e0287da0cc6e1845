"""The device program against a small base station, over real sockets with real keys."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.lab.device_station import Station, ids, running, station
from tests.lab.expert_files import constant_expert, make_expert
from tests.lab.flooded_station import REPORT
from wdmoe.config import DeviceSettings, LinkEmulation
from wdmoe.errors import ConfigError, RefusedError, TransportError
from wdmoe.nodes.device import device as device_module
from wdmoe.nodes.device.device import run_device
from wdmoe.records import ExpertId
from wdmoe.transport.codec.messages import Chunk, Failure, Goodbye, Hello, Ping, Ready, Result

HIDDEN = 16
BIG_INNER = 6000  # a file of several chunks
ALL = tuple(ids(0, 0, 1, 2))


@pytest.fixture
def experts(rng):
    return {expert: make_expert(rng, HIDDEN, inner) for expert, inner in zip(ALL, (8, 8, BIG_INNER), strict=True)}


@pytest.fixture
def settings(tmp_path):
    def make(join: str, **changes) -> DeviceSettings:
        plain = DeviceSettings(join=join, name="kit", cache=tmp_path / "cache", state=tmp_path / "device")
        return dataclasses.replace(plain, **changes)

    return make


@pytest.fixture(autouse=True)
def _quick_warm_up(monkeypatch):
    monkeypatch.setattr("wdmoe.nodes.device.hardware.WARM_UP_S", 0.01)


def run_async(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())


def token(rng, count: int = 1):
    return rng.standard_normal((count, HIDDEN)).astype(np.float32)


def test_joins_fetches_and_answers(tmp_path, experts, settings, rng, caplog):
    caplog.set_level(logging.INFO)

    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            await bs.place_on(*ALL)
            await bs.ready(*ALL)
            report = bs.of(Hello)[-1].report
            assert (report.name, report.provider, report.threads) == ("kit", "cpu", 1)
            assert report.flops > 1e6
            assert report.memory_bytes > 1 << 20
            for tokens in (token(rng), token(rng, 5)):
                result = await bs.run(2, tokens)
                assert isinstance(result, Result)
                np.testing.assert_allclose(result.partial, experts[ALL[2]].apply(tokens), rtol=1e-4, atol=1e-5)
                assert result.link_down_s == result.link_up_s == 0
                assert 0 < result.compute_s <= result.residence_s
            await bs.until(lambda: bs.of(Ping)[-1].done == 2)
            assert bs.of(Ping)[-1].rss_bytes > 1 << 20
        assert bs.fetches[ALL[2]] > 1  # in chunks

    run_async(work)
    assert "enrolled at" in caplog.text
    assert "holding 3 of 3 experts" in caplog.text


def test_says_goodbye_and_leaves_nothing(tmp_path, experts, settings):
    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs:
            async with running(run_device(settings(bs.token()))):
                await bs.until(lambda: bs.data_route)
            await bs.until(lambda: bs.of(Goodbye))

    run_async(work)


def test_every_run_gets_one_reply_even_what_cannot_be_done(tmp_path, experts, settings, rng):
    bad = ExpertId(0, 3)
    experts[bad] = dataclasses.replace(experts[ALL[0]], data=constant_expert(HIDDEN, np.inf))

    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            await bs.place_on(ALL[0], bad)
            await bs.ready(ALL[0], bad)
            unknown = await bs.run(7, token(rng))
            assert isinstance(unknown, Failure)
            assert unknown.reason == "layer 0 expert 7 isn't loaded here"
            infinite = await bs.run(3, token(rng))
            assert isinstance(infinite, Failure)
            assert "isn't finite" in infinite.reason
            wide = await bs.run(0, np.ones((1, HIDDEN + 1), np.float32))
            assert isinstance(wide, Failure)
            assert isinstance(await bs.run(0, token(rng)), Result)

    run_async(work)


def test_work_that_nobody_waits_for_is_dropped(tmp_path, experts, settings, rng):
    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            await bs.place_on(ALL[0])
            await bs.ready(ALL[0])
            expired = await bs.start_run(0, token(rng), remaining_s=0.0)
            assert isinstance(await bs.run(0, token(rng)), Result)
            assert bs.reply(expired) is None

    run_async(work)


def test_placement_shrinks_grows_and_changes(tmp_path, experts, settings, rng):
    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            await bs.place_on(*ALL)
            await bs.ready(*ALL)
            await bs.place_on(ALL[1])
            await bs.ready(ALL[1])
            assert isinstance(await bs.run(0, token(rng)), Result)  # an order that was on its way is still served
            while isinstance(await bs.run(0, token(rng)), Result):
                await asyncio.sleep(0.05)
            await bs.place_on()
            await bs.ready()
            before = bs.fetches.copy()
            await bs.place_on(ALL[0], ALL[1])
            await bs.ready(ALL[0], ALL[1])
            assert bs.fetches == before  # they were in the cache
            bs.experts[ALL[0]] = make_expert(rng, HIDDEN)  # the same expert in another version
            await bs.place_on(ALL[0], ALL[1])
            await bs.ready(ALL[0], ALL[1])
            tokens = token(rng)
            result = await bs.run(0, tokens)
            assert isinstance(result, Result)
            np.testing.assert_allclose(result.partial, bs.experts[ALL[0]].apply(tokens), rtol=1e-4, atol=1e-5)

    run_async(work)


def test_a_newer_placement_interrupts_and_a_stale_one_is_ignored(tmp_path, experts, settings):
    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            bs.spoil = lambda chunk: None if chunk.expert == 2 else chunk  # this one never arrives
            await bs.place_on(*ALL)
            await bs.ready(ALL[0], ALL[1])
            stale = bs.place
            await bs.place_on(ALL[1])
            await bs.ready(ALL[1])
            assert stale is not None
            await bs.send(stale)
            pings = len(bs.of(Ping))
            await bs.until(lambda: len(bs.of(Ping)) > pings + 1)
            await bs.ready(ALL[1])

    run_async(work)


@pytest.mark.parametrize("spoilt", ["bytes", "length", "total"])
def test_damaged_chunks_are_refused_and_fetched_again(tmp_path, experts, settings, rng, spoilt):
    left = [2]

    def spoil(chunk: Chunk) -> Chunk:
        if chunk.expert != 2 or not left[0]:
            return chunk
        left[0] -= 1
        if spoilt == "bytes":
            return dataclasses.replace(chunk, data=chunk.data ^ np.uint8(1))
        if spoilt == "length":
            return dataclasses.replace(chunk, data=chunk.data[:-1])
        return dataclasses.replace(chunk, total=chunk.total + 1)

    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            bs.spoil = spoil
            await bs.place_on(*ALL)
            await bs.ready(*ALL)
            tokens = token(rng)
            result = await bs.run(2, tokens)
            assert isinstance(result, Result)
            np.testing.assert_allclose(result.partial, experts[ALL[2]].apply(tokens), rtol=1e-4, atol=1e-5)

    run_async(work)
    assert left == [0]


def test_what_is_always_wrong_is_never_loaded(tmp_path, experts, settings, caplog):
    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            bs.spoil = lambda chunk: dataclasses.replace(chunk, data=chunk.data ^ np.uint8(chunk.expert == 1))
            await bs.place_on(ALL[0], ALL[1])
            await bs.ready(ALL[0])
            complaint = await bs.until(lambda: bs.of(Failure))
            assert "can't load 1 experts: layer 0 expert 1 arrived damaged every time" in complaint[0].reason
            await bs.ready(ALL[0])
            assert isinstance(await bs.run(1, np.ones((1, HIDDEN), np.float32)), Failure)

    run_async(work)
    cached = {path.stem for path in (tmp_path / "cache").glob("*.onnx")}
    assert cached == {experts[ALL[0]].sha256}


def test_says_so_when_memory_is_too_small(tmp_path, experts, settings):
    async def work() -> None:
        room = len(experts[ALL[0]].data) * 2
        async with (
            station(tmp_path / "bs", experts) as bs,
            running(run_device(settings(bs.token(), memory_bytes=room))),
        ):
            await bs.place_on(*ALL)
            await bs.ready(ALL[0], ALL[1])
            complaint = await bs.until(lambda: bs.of(Failure))
            assert complaint[0].reason == "no memory for 1 of 3 experts"

    run_async(work)


@pytest.mark.parametrize("leaving", ["killed", "silent", "goodbye"])
def test_finds_a_base_station_that_comes_back(tmp_path, experts, settings, rng, leaving, free_port):
    bind = f"tcp://127.0.0.1:{free_port}"

    async def second(join: str) -> None:
        async with station(tmp_path / "bs", experts, bind=bind, lease_s=0.8) as bs:
            bs.place = None
            await bs.until(lambda: bs.control_route)
            await bs.place_on(*ALL)
            await bs.ready(*ALL)
            assert not bs.fetches  # they stayed in memory
            assert isinstance(await bs.run(2, token(rng)), Result)

    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            bs: Station = await stack.enter_async_context(station(tmp_path / "bs", experts, bind=bind, lease_s=0.8))
            join = bs.token()
            task = await stack.enter_async_context(running(run_device(settings(join))))
            await bs.place_on(*ALL)
            await bs.ready(*ALL)
            hellos = len(bs.of(Hello))
            if leaving == "silent":
                bs.mute = True
                await bs.until(lambda: len(bs.of(Hello)) > hellos)
            elif leaving == "goodbye":
                await bs.send(Goodbye(reason="the base station stops"))
                await bs.until(lambda: len(bs.of(Hello)) > hellos)
            await bs.close()
            await second(join)
            assert not task.done()

    run_async(work)


def test_is_ready_at_once_when_the_base_station_still_knows_it(tmp_path, experts, settings, rng):
    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            await bs.place_on(*ALL)
            await bs.ready(*ALL)
            generation, bs.place = bs.generation, None  # a base station that lost nothing doesn't place again
            await bs.send(Goodbye(reason="a hiccup"))
            count = len(bs.seen)
            await bs.until(lambda: any(isinstance(m, Hello) for m in bs.seen[count:]))
            count = len(bs.seen)
            await bs.until(lambda: len(bs.seen) > count)
            await bs.ready(*ALL)
            assert bs.generation == generation
            assert isinstance(await bs.run(0, token(rng)), Result)

    run_async(work)


def test_an_enrolment_that_hears_nothing_keeps_no_admitted_key_from_its_turn(monkeypatch):
    """Refused once, the device tried its token, which was revoked meanwhile: for good, where no refusal came back."""
    tried = []

    class Link:
        def __init__(self, kind):
            self.kind = kind

        def close(self):
            pass

    class Dialer:
        must_enrol, can_enrol, public_key, endpoint = False, True, "k", "tcp://x:1"

        def turn_to(self, attempt):
            pass

        def control(self):
            return Link("own key")

        def enrolment(self):
            return Link("token")

    async def introduce(link, hello):
        tried.append(link.kind)
        if len(tried) == 5:
            raise asyncio.CancelledError
        raise RefusedError("revoked") if link.kind == "own key" else TransportError("no answer")

    async def nothing(link):
        pass

    monkeypatch.setattr(device_module, "introduce", introduce)
    monkeypatch.setattr(device_module, "_say_goodbye", nothing)
    monkeypatch.setattr("wdmoe.nodes.device.rules.FIRST_RETRY_S", 1e-4)
    compute = SimpleNamespace(hang_up=lambda: None)
    member = device_module._Member(Dialer(), REPORT, None, compute, None)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(member.stay_joined())
    assert tried == ["own key", "token", "own key", "token", "own key"]


def test_comes_back_slowly_when_sent_away(tmp_path, experts, settings, monkeypatch, caplog):
    """It ended for good: a board that was shut out by mistake had to be started by hand."""
    monkeypatch.setattr("wdmoe.nodes.device.rules.FIRST_RETRY_S", 0.001)  # slow is slow enough here

    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))) as task:
            await bs.until(lambda: bs.control_route)
            for _ in range(3):
                route = bs.control_route
                await bs.send(Goodbye(reason="this device's key is revoked", retry=False))
                await bs.until(lambda: bs.control_route != route)  # noqa: B023
            assert not task.done()

    run_async(work)
    assert "sent this device away: this device's key is revoked; trying again in" in caplog.text


def test_who_was_sent_away_knocks_on_no_other_door_either(tmp_path, experts, settings, monkeypatch):
    """Its data plane went on asking five times a second."""
    monkeypatch.setattr("wdmoe.nodes.device.rules.FIRST_RETRY_S", 60.0)
    monkeypatch.setattr("wdmoe.nodes.device.rules.random.Random.uniform", lambda chance, low, high: high)

    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            await bs.until(lambda: bs.data_route)
            await bs.send(Goodbye(reason="this device's key is revoked", retry=False))
            await asyncio.sleep(1.5)  # what was on its way has arrived
            count = len(bs.seen)
            await asyncio.sleep(2.5)
            assert len(bs.seen) == count

    run_async(work)


def test_a_base_station_that_lost_its_list_admits_the_same_key_again(tmp_path, experts, settings, free_port, caplog):
    bind = f"tcp://127.0.0.1:{free_port}"

    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with station(tmp_path / "bs", experts, bind=bind) as bs:
                await stack.enter_async_context(running(run_device(settings(bs.token()))))
                await bs.until(lambda: bs.control_route)
            for file in (tmp_path / "bs" / "devices").iterdir():
                file.unlink()
            async with station(tmp_path / "bs", experts, bind=bind) as again:
                await again.until(lambda: again.control_route)
                assert again.keys == bs.keys
            await stack.aclose()

    run_async(work)
    assert "refused key" in caplog.text


def test_without_keys(tmp_path, experts, settings, rng):
    async def work() -> None:
        async with (
            station(tmp_path / "bs", experts, secure=False) as bs,
            running(run_device(settings(bs.endpoint, insecure=True))),
        ):
            await bs.place_on(*ALL)
            await bs.ready(*ALL)
            assert isinstance(await bs.run(2, token(rng)), Result)

    run_async(work)
    assert not (tmp_path / "device").exists()


def test_emulated_links_make_messages_wait(tmp_path, experts, settings, rng):
    down_bps, up_bps = 200e3, 100e3
    link = LinkEmulation(downlink_bps=down_bps, uplink_bps=up_bps)

    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token(), link=link))):
            await bs.place_on(ALL[0])
            await bs.ready(ALL[0])
            tokens = token(rng, 32)
            start = time.monotonic()
            attempts = [await bs.start_run(0, tokens) for _ in range(2)]
            apart = time.monotonic() - start  # at most so much later was the second one sent
            results, elapsed = [], []
            for attempt in attempts:
                results.append(await bs.until(lambda attempt=attempt: bs.reply(attempt)))
                elapsed.append(time.monotonic() - start)
            air_down, air_up = 8 * tokens.nbytes / down_bps, 8 * tokens.nbytes / up_bps
            assert all(result.link_down_s >= air_down and result.link_up_s >= air_up for result in results)
            assert results[1].link_down_s >= 2 * air_down - apart  # one after the other
            assert elapsed[1] >= air_down + 2 * air_up
            for result, spent in zip(results, elapsed, strict=True):  # no second is counted twice, however slow it is
                assert result.link_down_s + result.residence_s + result.link_up_s <= spent

    run_async(work)


def test_a_cache_that_cannot_be_used_is_lived_without(tmp_path, experts, settings, rng, caplog):
    (tmp_path / "cache").write_text("in the way")

    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            await bs.place_on(*ALL)
            await bs.ready(*ALL)
            assert isinstance(await bs.run(2, token(rng)), Result)

    run_async(work)
    assert "can't be written" in caplog.text


def test_a_bug_in_the_computing_thread_stops_the_node(tmp_path, experts, settings, rng, monkeypatch):
    def bug(*_args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("wdmoe.moe.expert.ExpertRunner.run", bug)

    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))) as task:
            await bs.place_on(ALL[0])
            await bs.ready(ALL[0])
            await bs.start_run(0, token(rng))
            with pytest.raises(ZeroDivisionError, match="a bug"):
                await asyncio.wait_for(asyncio.shield(task), 20)
            await bs.until(lambda: bs.of(Goodbye))

    run_async(work)


@pytest.mark.parametrize(
    ("join", "insecure", "reason"),
    [
        ("nonsense", False, "not a join token"),
        ("tcp://127.0.0.1:5555", False, "not a join token"),
        ("wdmoe1.abc", True, "--insecure joins an endpoint like tcp://"),
    ],
)
def test_what_cannot_be_joined_is_said(settings, join, insecure, reason):
    with pytest.raises(ConfigError, match=reason):
        asyncio.run(run_device(settings(join, insecure=insecure)))


DEVICE = """
import asyncio, json, logging, signal, sys
from pathlib import Path
from wdmoe.config import DeviceSettings
from wdmoe.nodes.device.device import run_device

async def main():
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    join, cache, state = json.loads(sys.argv[1])
    try:
        await run_device(DeviceSettings(join=join, name="kit", cache=Path(cache), state=Path(state)))
    except asyncio.CancelledError:
        pass

logging.basicConfig(level=logging.INFO)
asyncio.run(main())
heavy = {"torch", "transformers", "onnx"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def start_process(join: str, tmp_path: Path) -> subprocess.Popen[str]:
    arguments = json.dumps([join, str(tmp_path / "cache"), str(tmp_path / "device")])
    return subprocess.Popen([sys.executable, "-c", DEVICE, arguments], stderr=subprocess.PIPE, text=True)


def test_a_killed_device_comes_back_as_itself_with_its_cache(tmp_path, experts, rng):
    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs:
            join = bs.token()
            first = start_process(join, tmp_path)
            await bs.place_on(*ALL)
            await bs.ready(*ALL)
            fetched, sessions = bs.fetches.copy(), {hello.session for hello in bs.of(Hello)}
            first.kill()
            first.communicate()
            count = len(bs.seen)
            again = start_process(join, tmp_path)
            await bs.until(lambda: any(isinstance(m, Hello) for m in bs.seen[count:]))
            bs.seen[:count] = []
            await bs.ready(*ALL)
            assert isinstance(await bs.run(2, token(rng)), Result)
            assert bs.fetches == fetched
            assert len(bs.keys) == 1
            assert not any(hello.enrol_key for hello in bs.of(Hello))
            assert not {hello.session for hello in bs.of(Hello)} & sessions
            again.send_signal(signal.SIGTERM)
            said = (await asyncio.to_thread(again.communicate))[1]
            assert again.returncode == 0, said
            assert "3 from cache, 0 fetched" in said
            assert "Traceback" not in said

    run_async(work)


def test_an_idle_device_measures_itself_again_and_says_so(tmp_path, experts, settings, monkeypatch):
    for name in ("FIRST_MEASURE_S", "IDLE_S"):
        monkeypatch.setattr(f"wdmoe.nodes.device.device.{name}", 0.02)
    monkeypatch.setattr("wdmoe.nodes.device.device.SAME_SPEED", 1.0)

    async def work() -> None:
        async with station(tmp_path / "bs", experts) as bs, running(run_device(settings(bs.token()))):
            await bs.place_on(ALL[0])
            await bs.ready(ALL[0])
            said = [hello for hello in bs.of(Hello) if not hello.enrol_key]
            await bs.until(lambda: bs.of(Hello)[-1].report.flops != said[0].report.flops)
            assert bs.of(Hello)[-1].session == said[0].session
            count = len(bs.seen)
            await bs.until(lambda: any(isinstance(m, Ready) for m in bs.seen[count:]))  # the session goes on
            assert not bs.of(Goodbye)

    run_async(work)


def test_importing_the_node_needs_no_heavy_package():
    code = "import sys, wdmoe.nodes.device.device; sys.exit(str({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
