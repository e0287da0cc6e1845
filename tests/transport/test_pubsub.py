"""The broadcast plane over real sockets: who may listen, what is heard, and what a listener that sleeps misses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import zmq

from tests.lab.waiting import PATIENCE_S
from tests.lab.zmq_lab import Lab, lab
from wdmoe.errors import ProtocolError, RefusedError, TransportError
from wdmoe.transport.codec.messages import Pilot, Symbols
from wdmoe.transport.zmq.pubsub import Transmitter, Tuner, open_transmitter, open_tuner
from wdmoe.transport.zmq.sockets import LinkSecurity, SocketOptions

__all__ = ["lab"]


@asynccontextmanager
async def on_air(lab: Lab, options: SocketOptions | None = None) -> AsyncIterator[Transmitter]:
    """A transmitter that says Pilots all the while."""
    given = () if options is None else (options,)
    transmitter = open_transmitter(lab.context, "tcp://127.0.0.1:*", lab.security, *given)

    async def beat() -> None:
        while True:
            transmitter.send(Pilot(broadcast=1, sent=0))
            await asyncio.sleep(0.02)

    beating = asyncio.create_task(beat())
    try:
        yield transmitter
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        transmitter.close()


@asynccontextmanager
async def tuned(lab: Lab, transmitter: Transmitter, security: LinkSecurity | None = None) -> AsyncIterator[Tuner]:
    tuner = open_tuner(lab.devices, transmitter.endpoint, security or lab.admitted())
    try:
        yield tuner
    finally:
        tuner.close()


async def heard(tuner: Tuner) -> object:
    return (await asyncio.wait_for(tuner.receive(), PATIENCE_S)).message


def block(first: int, uses: int = 16) -> Symbols:
    return Symbols(broadcast=1, first=first, symbols=np.full((1, uses, 2), first % 7, np.float16))


def test_what_is_said_once_is_heard_by_all(lab: Lab) -> None:
    async def scene() -> None:
        async with on_air(lab) as station, tuned(lab, station) as one, tuned(lab, station) as other:
            for tuner in (one, other):
                assert isinstance(await heard(tuner), Pilot)  # from here on nothing is missed
            for number in range(200):
                station.send(block(number))
            for tuner in (one, other):
                symbols = []
                while len(symbols) < 200:
                    if isinstance(message := await heard(tuner), Symbols):
                        symbols.append(message)
                assert [each.first for each in symbols] == list(range(200))
                assert symbols[3].symbols.dtype == np.float16
                assert (symbols[3].symbols == 3).all()

    asyncio.run(scene())


@pytest.mark.parametrize("kind", ["stranger", "enrolment"])
def test_only_admitted_devices_may_listen(lab: Lab, kind: str) -> None:
    token = lab.admission.create_token(lab.keys, ["tcp://127.0.0.1:1"], 60.0)
    pair = token.enrolment
    if kind == "stranger":
        lab.admission._tokens.delete(pair.public)

    async def scene() -> None:
        async with on_air(lab) as station, tuned(lab, station, LinkSecurity(lab.keys.public, pair)) as tuner:
            with pytest.raises(RefusedError, match="refused key"):
                await heard(tuner)

    asyncio.run(scene())


def test_a_listener_without_encryption_hears_nothing(lab: Lab) -> None:
    async def scene() -> None:
        async with on_air(lab) as station:
            plain = lab.strangers.socket(zmq.SUB)
            plain.set(zmq.SUBSCRIBE, b"")
            plain.connect(station.endpoint)
            async with tuned(lab, station) as tuner:
                for _ in range(50):
                    await heard(tuner)
            assert not plain.poll(0)
            plain.close(0)

    asyncio.run(scene())


def test_a_listener_that_does_not_listen_misses_the_middle_and_holds_nobody_up(lab: Lab) -> None:
    async def scene() -> None:
        options = SocketOptions(queue_messages=16)
        async with on_air(lab, options) as station, tuned(lab, station) as one:
            sleeper = open_tuner(lab.devices, station.endpoint, lab.admitted("sleeper"), options)
            for tuner in (one, sleeper):
                assert isinstance(await heard(tuner), Pilot)
            for number in range(400):
                station.send(block(number, uses=30_000))  # 120 KB: soon no buffer in between has room
                while not isinstance(message := await heard(one), Symbols):
                    pass
                assert message.first == number
            firsts = [0]
            while firsts[-1] < 1000:
                if isinstance(message := await heard(sleeper), Symbols):
                    firsts += [message.first]
                else:
                    station.send(block(1000))
            sleeper.close()
            firsts = firsts[1:]
            assert firsts == sorted(set(firsts))
            assert len(firsts) < 400

    asyncio.run(asyncio.wait_for(scene(), 3 * PATIENCE_S))


def test_what_cannot_be_heard_cannot_be_said(lab: Lab) -> None:
    async def scene() -> None:
        async with on_air(lab) as station:
            with pytest.raises(ProtocolError, match="the peer accepts"):
                station.send(block(0, uses=5 << 20))
            with pytest.raises(TransportError, match="in use"):
                open_transmitter(lab.context, station.endpoint, lab.security)

    asyncio.run(scene())
    lab.door.close()
    with pytest.raises(TransportError, match="door"):
        open_transmitter(lab.context, "tcp://127.0.0.1:*", lab.security)
