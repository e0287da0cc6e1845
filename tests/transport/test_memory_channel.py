"""The in-process twins behave as the real channels do, and lose, delay and double as ordered."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from tests.lab.wire_examples import a_result, a_run, every_kind, same
from wdmoe.errors import PeerBusyError, PeerGoneError, ProtocolError
from wdmoe.transport.channel import ControlLink, ControlStation, DataLink, DataStation
from wdmoe.transport.codec.messages import Attach, Attached, Failure, Ping, Pong
from wdmoe.transport.codec.wire import Limits
from wdmoe.transport.memory import Faults, MemoryControlStation, MemoryDataStation


def test_data_plane_both_ways() -> None:
    station = MemoryDataStation()
    typed_station: DataStation = station
    link = station.connect(key="k")
    typed_link: DataLink = link
    size = typed_link.send(Attach(session=5))
    asked = typed_station.receive(1.0)
    assert asked is not None
    assert (asked.key, asked.size_bytes) == ("k", size)
    run = a_run()
    typed_station.send(asked.route, run)
    ordered = typed_link.receive(1.0)
    assert ordered is not None
    assert same(ordered.message, run)


def test_messages_pass_the_real_codec() -> None:
    station = MemoryDataStation(limits=Limits(max_message_bytes=1000))
    link = station.connect()
    with pytest.raises(ProtocolError, match="1000"):
        link.send(a_result(a_run(hidden=1000)))
    for message in every_kind():
        link.send(message)
        envelope = station.receive(1.0)
        assert envelope is not None
        assert same(envelope.message, message)


def test_invalid_frames_are_counted_and_skipped_and_a_version_is_answered() -> None:
    station = MemoryDataStation()
    link = station.connect()
    link.send_frame(b"\x02\x08")
    link.send_frame(b"\x09\x08\x80")
    link.send(Attach(session=5))
    envelope = station.receive(1.0)
    assert envelope is not None
    assert isinstance(envelope.message, Attach)
    assert station.counters == {"invalid_message": 1, "wrong_version": 1}
    answer = link.receive(1.0)
    assert answer is not None
    assert isinstance(answer.message, Failure)
    assert "version 9" in answer.message.reason


def test_wake_timeout_and_close() -> None:
    station = MemoryDataStation()
    link = station.connect()
    assert station.receive(0.0) is None
    assert station.receive(0.01) is None
    waker = threading.Timer(0.05, link.wake)
    waker.start()
    assert link.receive(60.0) is None
    waker.join()
    route = link.route
    link.close()
    link.close()
    with pytest.raises(PeerGoneError):
        station.send(route, Attached(session=5))
    other = station.connect()
    station.close()
    station.close()
    with pytest.raises(PeerBusyError):
        other.send(Attach(session=5))


def test_full_queues_say_so() -> None:
    station = MemoryDataStation()
    link = station.connect()

    def flood() -> None:
        for _ in range(1000):
            station.send(link.route, Attached(session=1))

    with pytest.raises(PeerBusyError):
        flood()


def test_loss_and_copies_repeat_with_the_seed() -> None:
    def arrived(seed: int) -> list[int]:
        station = MemoryDataStation(faults=Faults(loss=0.3, duplicate=0.2), rng=np.random.default_rng(seed))
        link = station.connect()
        for number in range(200):
            link.send(Attach(session=number))
        found = []
        while (envelope := station.receive(0.0)) is not None:
            assert isinstance(envelope.message, Attach)
            found.append(envelope.message.session)
        return found

    first = arrived(1)
    assert first == arrived(1)
    assert first != arrived(2)
    assert 100 < len(set(first)) < 180
    assert len(first) > len(set(first))


def test_delay_and_jitter_reorder() -> None:
    station = MemoryDataStation(faults=Faults(delay_s=0.02, jitter_s=0.05), rng=np.random.default_rng(3))
    link = station.connect()
    started = time.monotonic()
    for number in range(20):
        link.send(Attach(session=number))
    assert station.receive(0.0) is None
    found = []
    while len(found) < 20:
        envelope = station.receive(5.0)
        assert envelope is not None
        assert isinstance(envelope.message, Attach)
        found.append(envelope.message.session)
    assert time.monotonic() - started >= 0.02
    assert found != sorted(found)


def test_the_weather_can_change() -> None:
    station = MemoryDataStation()
    link = station.connect()
    station.faults = Faults(loss=1.0)
    link.send(Attach(session=1))
    assert station.receive(0.0) is None
    station.faults = Faults()
    link.send(Attach(session=2))
    assert station.receive(1.0) is not None


def test_control_plane_both_ways() -> None:
    async def talk() -> None:
        station = MemoryControlStation(faults=Faults(delay_s=0.01))
        typed_station: ControlStation = station
        link = station.connect(key="k")
        typed_link: ControlLink = link
        ping = Ping(sequence=1, done=2, queued=3, rss_bytes=4)
        await typed_link.send(ping)
        envelope = await typed_station.receive()
        assert envelope.key == "k"
        assert same(envelope.message, ping)
        await typed_station.send(envelope.route, Pong(sequence=1))
        assert same((await typed_link.receive()).message, Pong(sequence=1))
        await link.send_frame(b"\x09\x08\x80")
        await link.send_frame(b"junk")
        await link.send(ping)
        await station.receive()
        assert station.counters == {"wrong_version": 2}  # "j" is a version, too
        assert isinstance((await link.receive()).message, Failure)
        link.close()
        with pytest.raises(PeerGoneError):
            await station.send(envelope.route, Pong(sequence=2))
        station.close()

    asyncio.run(talk())


def test_a_cancelled_receive_loses_nothing() -> None:
    async def talk() -> None:
        station = MemoryControlStation()
        link = station.connect()
        for number in range(50):
            waiting = asyncio.ensure_future(station.receive())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await link.send(Pong(sequence=number))
            assert same((await station.receive()).message, Pong(sequence=number))

        async def flood() -> None:
            for _ in range(1000):
                await station.send(link.route, Pong(sequence=0))

        with pytest.raises(PeerBusyError):
            await flood()

    asyncio.run(talk())
