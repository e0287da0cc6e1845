"""Hello until Welcome, and what a session does with messages no good base station sends; over memory channels."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from tests.lab.expert_files import make_expert
from wdmoe.config import DeviceSettings, LinkEmulation
from wdmoe.errors import ConfigError, ProtocolError, TransportError
from wdmoe.moe.expert import ExpertRunner
from wdmoe.moe.providers import OnnxExpert, cpu_chain
from wdmoe.nodes.device.broadcast_receiver import RadioSite
from wdmoe.nodes.device.compute_thread import ComputeThread
from wdmoe.nodes.device.expert_cache import ExpertCache
from wdmoe.nodes.device.expert_opening import expert_opener
from wdmoe.nodes.device.expert_store import ExpertStore
from wdmoe.nodes.device.join import introduce, open_dialer
from wdmoe.nodes.device.session import DeviceSession, SentAwayError
from wdmoe.records import DeviceReport, ExpertId
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.messages import Failure, Goodbye, Hello, Message, Ping, Place, Pong, Ready, Welcome
from wdmoe.transport.memory import MemoryControlLink, MemoryControlStation

REPORT = DeviceReport(
    name="kit", hardware="board", system="Linux", provider="cpu", threads=1, memory_bytes=1 << 30, flops=1e9
)
HELLO = Hello(session=5, report=REPORT)
WELCOME = Welcome(session=5, device_id="ab", data_port=5556, lease_s=0.4, max_message_bytes=1 << 20, model="m")

Script = Callable[[MemoryControlStation, MemoryControlLink], Awaitable[None]]


async def beside(script: Awaitable[None], work: Awaitable[object]) -> object:
    task = asyncio.ensure_future(script)
    try:
        return await work
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def answered(*answers: Message, after: int = 1) -> Welcome:
    """Introduce a device to a station that sends `answers` after so many Hellos."""

    async def main() -> object:
        station = MemoryControlStation()
        link = station.connect()

        async def answer() -> None:
            for _ in range(after):
                await station.receive()
            for message in answers:
                await station.send(link.route, message)

        return await beside(answer(), introduce(link, HELLO))

    welcome = asyncio.run(main())
    assert isinstance(welcome, Welcome)
    return welcome


def test_repeats_hello_until_welcome(monkeypatch):
    monkeypatch.setattr("wdmoe.nodes.device.join.HELLO_AGAIN_S", 0.01)
    assert answered(WELCOME, after=4).data_port == 5556
    assert answered(dataclasses.replace(WELCOME, session=6), Pong(sequence=1), WELCOME).session == 5


class StillConnecting:
    """A link whose connection is made at the third try to send; then it answers."""

    def __init__(self):
        self.tries = 0

    async def send(self, message):
        self.tries += 1
        if self.tries < 3:
            raise TransportError("not connected")

    async def receive(self):
        while self.tries < 3:
            await asyncio.sleep(1)
        return Envelope(b"", "", WELCOME, 0)


def test_a_hello_that_could_not_be_sent_is_tried_again_soon(monkeypatch):
    """Each join took half a second for that, and the first one of a device two of them."""
    monkeypatch.setattr("wdmoe.nodes.device.join.HELLO_AGAIN_S", 1e9)
    link = StillConnecting()
    assert asyncio.run(introduce(link, HELLO)) == WELCOME
    assert link.tries == 3


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        (Goodbye(reason="revoked", retry=False), SentAwayError, "sent this device away: revoked"),
        (Goodbye(reason="starting"), TransportError, "is not ready: starting"),
        (Failure(attempt=0, reason="this side speaks 2"), TransportError, "doesn't welcome .*: this side speaks 2"),
        (Pong(sequence=1), TransportError, "doesn't welcome this device: no answer"),
        (dataclasses.replace(WELCOME, lease_s=0.0), ProtocolError, r"a lease of 0\.0 s"),
    ],
)
def test_says_why_it_is_not_welcome(monkeypatch, answer, error, reason):
    monkeypatch.setattr("wdmoe.nodes.device.join.HELLO_AGAIN_S", 0.02)
    monkeypatch.setattr("wdmoe.nodes.device.join.HELLO_PATIENCE_S", 0.1)
    with pytest.raises(error, match=reason):
        answered(answer)


def test_says_that_nobody_is_there(monkeypatch):
    monkeypatch.setattr("wdmoe.nodes.device.join.HELLO_PATIENCE_S", 0.05)
    monkeypatch.setattr("wdmoe.nodes.device.join.HELLO_AGAIN_S", 0.02)

    async def main() -> None:
        station = MemoryControlStation()
        link = station.connect()
        station.close()
        await introduce(link, HELLO)

    with pytest.raises(TransportError, match="doesn't welcome this device: the station is not connected"):
        asyncio.run(main())


def test_a_key_file_that_others_can_read_is_refused(tmp_path, monkeypatch):
    from wdmoe.transport.security.admission import Admission
    from wdmoe.transport.security.keys import station_keys

    token = Admission(tmp_path / "bs").create_token(station_keys(tmp_path / "bs"), ["tcp://127.0.0.1:1"], 60.0)
    settings = DeviceSettings(join=token.text(), state=tmp_path / "device")
    for must_enrol in (True, False):
        dialer = open_dialer(settings)
        assert dialer.must_enrol is must_enrol
        dialer.close()
    (tmp_path / "device" / "device.key").chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        open_dialer(settings)


# ---- a session


@pytest.fixture
def compute():
    thread = ComputeThread(ExpertRunner(lambda file, _: OnnxExpert(file, 1, cpu_chain())), LinkEmulation(), print)
    thread.start()
    yield thread
    thread.stop()


def in_session(script: Script, compute: ComputeThread, folder: Path) -> None:
    """Run a session until `script` is over; raises what ends the session before."""

    async def main() -> None:
        station = MemoryControlStation()
        link = station.connect()
        holdings = ExpertStore(compute._runner, ExpertCache(folder, 1 << 20), 1 << 20)
        radio = RadioSite(open_tuner=None, cache=holdings._cache, threads=1, save=None)  # never asked to listen
        session = DeviceSession(link, WELCOME, holdings, compute, None, lambda place: None, radio)
        task = asyncio.ensure_future(session.run())
        script_task = asyncio.ensure_future(script(station, link))
        await asyncio.wait({task, script_task}, return_when=asyncio.FIRST_COMPLETED)
        for done in (task, script_task):
            if done.done():
                done.result()
            done.cancel()
        await asyncio.gather(task, script_task, return_exceptions=True)

    asyncio.run(main())


def test_messages_that_make_no_sense_are_logged_and_survived(compute, tmp_path, caplog):
    async def script(station: MemoryControlStation, link: MemoryControlLink) -> None:
        twice = Place(
            generation=1,
            experts=np.zeros((2, 2), np.int32),
            sha256=np.zeros((2, 32), np.uint8),
            size=np.ones(2, np.int64),
            hidden=16,
        )
        for message in (twice, Ping(sequence=1, done=0, queued=0, rss_bytes=0), Failure(attempt=0, reason="no")):
            await station.send(link.route, message)
        for _ in range(3):
            assert isinstance((await station.receive()).message, Ping)  # and no Ready

    in_session(script, compute, tmp_path)
    assert "ignored a placement: a placement names an expert twice" in caplog.text
    assert "ignored a Ping from the base station" in caplog.text
    assert "refused a message: no" in caplog.text


def test_ready_is_repeated_in_case_one_was_lost(compute, tmp_path):
    async def script(station: MemoryControlStation, link: MemoryControlLink) -> None:
        nothing = Place(
            generation=4,
            experts=np.zeros((0, 2), np.int32),
            sha256=np.zeros((0, 32), np.uint8),
            size=np.zeros(0, np.int64),
            hidden=16,
        )
        await station.send(link.route, nothing)
        found = 0
        while found < 3:
            message = (await station.receive()).message
            if isinstance(message, Ready):
                assert message.generation == 4
                found += 1
            elif isinstance(message, Ping):
                await station.send(link.route, Pong(sequence=message.sequence))

    in_session(script, compute, tmp_path)


@pytest.mark.parametrize("answer", [None, Failure(attempt=0, reason="its key was revoked")])
def test_silence_and_mere_refusals_end_a_session(compute, tmp_path, answer):
    async def script(station: MemoryControlStation, link: MemoryControlLink) -> None:
        while True:
            await station.receive()
            if answer is not None:
                await station.send(link.route, answer)

    with pytest.raises(TransportError, match="the base station is silent for"):
        in_session(script, compute, tmp_path)


# ---- TensorRT where there is none


def test_without_an_engine_the_cpu_goes_on(rng, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("wdmoe.nodes.device.expert_opening.choose_provider", lambda wanted, probe: "tensorrt")
    expert = make_expert(rng)
    opener = expert_opener(DeviceSettings(join="", cache=tmp_path))
    assert opener.provider == "tensorrt"
    runner = ExpertRunner(opener.open)
    runner.load(ExpertId(0, 0), expert.data, expert.sha256, 16)
    model = runner._models[ExpertId(0, 0)]
    tokens = rng.standard_normal((2, 16)).astype(np.float32)
    end = time.monotonic() + 20.0
    while f"no engine for expert file {expert.sha256[:16]}" not in caplog.text:
        np.testing.assert_allclose(model.run(tokens), expert.apply(tokens), rtol=1e-4, atol=1e-5)
        assert time.monotonic() < end, "the failing build was never reported"
    opener.close()
