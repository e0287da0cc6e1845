"""The conversation that both stations hold with their devices: real admission, real codec, both kinds of host."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lab.wire_examples import same
from wdmoe.nodes.authentication import CurveAuthentication
from wdmoe.nodes.sessions import Host, ServedFile, Sessions, Terms
from wdmoe.records import DeviceReport
from wdmoe.transport.codec.messages import Chunk, Failure, Fetch, Goodbye, Hello, Message, Ping, Pong, Ready, Welcome
from wdmoe.transport.membership import Device
from wdmoe.transport.memory import MemoryControlLink, MemoryControlStation
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.keys import KeyPair, new_key_pair

PATIENCE_S = 10.0
LEASE_S = 0.6
CONTENT = bytes(range(200))
REPORT = DeviceReport(name="kit", hardware="", system="", provider="cpu", threads=1, memory_bytes=0, flops=1.0)


class Recorder(Host):
    """Serves one file and writes down what it is told."""

    def __init__(self) -> None:
        self.news: list[str] = []

    def refuses(self, hello: Hello) -> str:
        return "no room for it" if hello.report.name == "unwanted" else ""

    def file(self, device: Device, fetch: Fetch) -> ServedFile | None:
        if fetch.layer != 7:
            return None
        return ServedFile(size=len(CONTENT), read=lambda offset, length: CONTENT[offset : offset + length])

    def joined(self, device: Device) -> None:
        self.news.append(f"{device.report.name} joined")

    def lost(self, device: Device, reason: str) -> None:
        self.news.append(f"{device.report.name} lost: {reason}")

    def changed(self) -> None:
        self.news.append("changed")

    def other(self, envelope: Any, device: Device | None) -> None:
        self.news.append(f"{device.report.name if device else 'a stranger'} sent {type(envelope.message).__name__}")


class Site:
    """Sessions over a channel in memory, with an allow list on disk."""

    def __init__(self, state: Path) -> None:
        self.channel = MemoryControlStation()
        self.admission = Admission(state)
        self.host = Recorder()
        terms = Terms(model="tiny", lease_s=LEASE_S, max_message_bytes=1 << 20)
        self.sessions = Sessions(self.channel, CurveAuthentication(self.admission), terms, self.host)

    def enrolment_key(self) -> str:
        return self.admission.create_token(new_key_pair(), ["tcp://127.0.0.1:5555"], 60.0).enrolment.public

    async def enrol(self, pair: KeyPair) -> Message:
        link = self.channel.connect(self.enrolment_key())
        return await self.says(link, Hello(session=1, report=REPORT, enrol_key=pair.public))

    async def says(self, link: MemoryControlLink, message: Message) -> Message:
        """Send it and wait for the answer."""
        await link.send(message)
        return await self.hears(link)

    async def hears(self, link: MemoryControlLink) -> Message:
        return (await asyncio.wait_for(link.receive(), PATIENCE_S)).message


@contextlib.asynccontextmanager
async def serving(state: Path) -> AsyncIterator[Site]:
    site = Site(state)
    task = asyncio.create_task(site.sessions.run())
    try:
        yield site
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def converse(state: Path, talk: Callable[[Site], Any]) -> Site:
    """Run one conversation; whatever it leaves in the host is looked at afterwards."""

    async def whole() -> Site:
        async with serving(state) as site:
            await talk(site)
        return site

    return asyncio.run(whole())


def test_a_revoked_device_is_sent_away_and_welcome_again_with_a_new_token(tmp_path: Path) -> None:
    async def talk(site: Site) -> None:
        pair = new_key_pair()
        admitted = await site.enrol(pair)
        assert isinstance(admitted, Welcome)
        assert admitted.enrolled
        link = site.channel.connect(pair.public)
        assert isinstance(await site.says(link, Hello(session=5, report=REPORT)), Welcome)

        site.admission.revoke(pair.fingerprint)
        away = await site.hears(link)
        assert isinstance(away, Goodbye)
        assert (away.reason, away.retry) == ("this device's key is revoked", False)
        assert isinstance(await site.says(link, Hello(session=5, report=REPORT)), Goodbye)

        # The broadcast station refused it here for ever: only the other station's copy of this loop pardoned.
        assert isinstance(await site.enrol(pair), Welcome)
        assert isinstance(await site.says(link, Hello(session=6, report=REPORT)), Welcome)
        assert [device.session for device in site.sessions.roster.live()] == [6]

    site = converse(tmp_path, talk)
    assert site.host.news == ["kit joined", "kit lost: this device's key is revoked", "changed", "kit joined"]


def test_a_device_that_cannot_be_enrolled_now_is_told_to_come_again(tmp_path: Path) -> None:
    """It was told never to come back, for a disk of the station that was full."""

    async def talk(site: Site) -> None:
        pair, token = new_key_pair(), site.enrolment_key()
        hello = Hello(session=1, report=REPORT, enrol_key=pair.public)
        (tmp_path / "devices").rename(tmp_path / "aside")
        away = await site.says(site.channel.connect(token), hello)
        assert same(away, Goodbye(reason="it cannot enrol devices now", retry=True))
        (tmp_path / "aside").rename(tmp_path / "devices")
        assert isinstance(await site.says(site.channel.connect(token), hello), Welcome)

    converse(tmp_path, talk)


def test_a_list_that_cannot_be_read_ends_no_session(tmp_path: Path) -> None:
    async def talk(site: Site) -> None:
        pair = new_key_pair()
        await site.enrol(pair)
        link = site.channel.connect(pair.public)
        await site.says(link, Hello(session=5, report=REPORT))
        (tmp_path / "devices").rename(tmp_path / "aside")
        for sequence in range(4):
            await asyncio.sleep(LEASE_S / 3)
            assert same(
                await site.says(link, Ping(sequence=sequence, done=0, queued=0, rss_bytes=0)), Pong(sequence=sequence)
            )
        assert isinstance(await site.says(link, Hello(session=5, report=REPORT)), Welcome)

    assert converse(tmp_path, talk).host.news == ["kit joined"]


def test_a_ping_is_answered_and_silence_ends_a_session(tmp_path: Path) -> None:
    async def talk(site: Site) -> None:
        pair = new_key_pair()
        site.admission.admit(pair.public, "kit")
        link = site.channel.connect(pair.public)
        assert isinstance(
            await site.says(link, Ping(sequence=1, done=0, queued=0, rss_bytes=0)), Goodbye
        )  # nobody knows it yet
        await site.says(link, Hello(session=5, report=REPORT))
        for sequence in range(4):
            pong = await site.says(link, Ping(sequence=sequence, done=3, queued=sequence, rss_bytes=0))
            assert same(pong, Pong(sequence=sequence))
        [device] = site.sessions.roster.live()
        assert (device.done, device.queued) == (3, 3)
        away = await site.hears(link)
        assert isinstance(away, Goodbye)
        assert "silent for" in away.reason
        assert away.retry

    site = converse(tmp_path, talk)
    assert [news.partition(":")[0] for news in site.host.news] == ["kit joined", "kit lost", "changed"]


@pytest.mark.parametrize(
    ("fetch", "answer"),
    [
        (Fetch(layer=7, expert=0, offset=0, length=64), CONTENT[:64]),
        (Fetch(layer=7, expert=0, offset=150, length=64), CONTENT[150:]),
        (Fetch(layer=7, expert=0, offset=5000, length=64), b""),
        (Fetch(layer=8, expert=0, offset=0, length=64), None),
        (Fetch(layer=7, expert=0, offset=0, length=(1 << 20) + 1), None),
    ],
)
def test_files_are_served_in_parts_to_whom_they_are_for(tmp_path: Path, fetch: Fetch, answer: bytes | None) -> None:
    async def talk(site: Site) -> None:
        pair = new_key_pair()
        site.admission.admit(pair.public, "kit")
        link = site.channel.connect(pair.public)
        await site.says(link, Hello(session=5, report=REPORT))
        got = await site.says(link, fetch)
        if answer is None:
            assert isinstance(got, Failure)
            assert "was not placed here, or too much asked" in got.reason
        else:
            assert isinstance(got, Chunk)
            assert (bytes(got.data), got.total) == (answer, len(CONTENT))

    converse(tmp_path, talk)


def test_who_cannot_take_part_is_told_why_and_strangers_go_to_the_host(tmp_path: Path) -> None:
    async def talk(site: Site) -> None:
        pair = new_key_pair()
        site.admission.admit(pair.public, "kit")
        link = site.channel.connect(pair.public)
        unwanted = DeviceReport(
            name="unwanted", hardware="", system="", provider="cpu", threads=1, memory_bytes=0, flops=1.0
        )
        away = await site.says(link, Hello(session=5, report=unwanted))
        assert same(away, Goodbye(reason="no room for it", retry=False))
        await link.send(Ready(generation=0, experts=np.empty((0, 2), np.int32)))
        await site.says(link, Hello(session=5, report=REPORT))
        await link.send(Goodbye(reason="off"))
        await link.send(Failure(attempt=0, reason="out of memory"))
        while len(site.host.news) < 5:
            await asyncio.sleep(0.01)

    site = converse(tmp_path, talk)
    assert site.host.news == [
        "a stranger sent Ready",
        "kit joined",
        "kit lost: left",
        "changed",
        "a stranger sent Failure",
    ]


def test_a_station_that_stops_says_so_to_all(tmp_path: Path) -> None:
    async def talk(site: Site) -> None:
        links = []
        for session in (1, 2):
            pair = new_key_pair()
            site.admission.admit(pair.public, f"kit {session}")
            links.append(site.channel.connect(pair.public))
            await site.says(links[-1], Hello(session=session, report=REPORT))
        await site.sessions.say_goodbye("lunch")
        for link in links:
            assert same(await site.hears(link), Goodbye(reason="lunch", retry=True))

    converse(tmp_path, talk)
