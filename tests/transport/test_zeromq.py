"""The real channels between real sockets: delivery, failures as values of our own, closing, waking."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.lab.wire_examples import a_run, every_kind, same
from tests.lab.zmq_lab import WAIT_S, Lab, ask, hear, lab, until
from wdmoe.errors import PeerBusyError, PeerGoneError, ProtocolError, RefusedError, TransportError
from wdmoe.transport.channel import ControlLink, ControlStation, DataLink, DataStation, Envelope
from wdmoe.transport.codec.messages import Attach, Attached, Chunk, Failure, Message, Ping, Pong
from wdmoe.transport.security.keys import new_key_pair
from wdmoe.transport.security.zap import Door
from wdmoe.transport.zmq.channels import (
    ZmqControlLink,
    ZmqControlStation,
    open_control_link,
    open_control_station,
    open_data_link,
    open_data_station,
)
from wdmoe.transport.zmq.sockets import LinkSecurity, SocketOptions, StationSecurity, endpoint_of, new_context

__all__ = ["lab"]


def test_data_plane_carries_every_message_both_ways(lab: Lab) -> None:
    station, security = lab.station(), lab.admitted()
    link = lab.link(station.endpoint, security)
    typed: tuple[DataStation, DataLink] = (station, link)
    asked = ask(link, station)
    assert asked.key == security.keys.public, "who it is was proven by the handshake"
    for message in every_kind():
        assert typed[0].send(asked.route, message) == hear(link).size_bytes
        link.send(message)
        heard = hear(station)
        assert heard.route == asked.route
        assert same(heard.message, message)


def test_large_tensors_arrive_whole_and_aligned(lab: Lab, rng: np.random.Generator) -> None:
    station = lab.station()
    link = lab.link(station.endpoint)
    asked = ask(link, station)
    for hidden in (1, 7, 33, 4096, 100_000):
        run = a_run(count=3, hidden=hidden, tokens=rng.standard_normal((3, hidden)).astype(np.float16))
        station.send(asked.route, run)
        heard = hear(link).message
        assert same(heard, run)
        assert all(getattr(heard, name).flags.aligned for name in ("tokens", "rows", "weights"))


def test_an_array_may_change_once_send_has_returned(lab: Lab) -> None:
    station = lab.station()
    link = lab.link(station.endpoint)
    asked = ask(link, station)
    data = np.ones(1 << 20, np.uint8)
    station.send(asked.route, Chunk(layer=0, expert=0, offset=0, total=1 << 20, data=data))
    data[:] = 0
    heard = hear(link).message
    assert isinstance(heard, Chunk)
    assert heard.data.all()


def test_too_large_is_refused_before_it_is_sent(lab: Lab) -> None:
    station = lab.station(options=SocketOptions(max_message_bytes=10_000))
    link = lab.link(station.endpoint, options=SocketOptions(max_message_bytes=10_000))
    asked = ask(link, station)
    for send in (link.send, lambda message: station.send(asked.route, message)):
        with pytest.raises(ProtocolError, match="10000"):
            send(a_run(hidden=5000))
    assert same(ask(link, station, a_run()).message, a_run()), "the connection is still good"


def test_timeouts_and_wakes(lab: Lab) -> None:
    station = lab.station()
    link = lab.link(station.endpoint)
    assert station.receive(0.0) is None
    assert station.receive(0.05) is None
    for end in (station, link):
        threading.Timer(0.1, end.wake).start()
        assert end.receive(600.0) is None
    station.wake()
    station.wake()
    assert station.receive(600.0) is None, "two wakes while nobody waits are one"
    assert station.receive(0.05) is None
    station.wake()
    assert same(ask(link, station).message, Attach(session=1)), "a message goes before a wake"


def test_spinning_finds_messages_wakes_and_the_end_of_time(lab: Lab) -> None:
    options = SocketOptions(spin_s=0.02)
    station = lab.station(options=options)
    link = lab.link(station.endpoint, options=options)
    asked = ask(link, station)
    assert station.receive(0.1) is None
    assert station.receive(0.005) is None
    station.wake()
    assert station.receive(600.0) is None
    station.send(asked.route, Attached(session=1))
    assert same(hear(link).message, Attached(session=1))


def test_closing_is_idempotent_and_a_late_wake_is_harmless(lab: Lab) -> None:
    station = lab.station()
    link = lab.link(station.endpoint)
    ask(link, station)
    for end in (link, station):
        end.close()
        end.close()
        end.wake()


def test_a_link_without_a_station_is_busy_not_broken(lab: Lab, free_port: int) -> None:
    link = lab.link(f"tcp://127.0.0.1:{free_port}")
    with pytest.raises(PeerBusyError):
        link.send(Attach(session=1))
    assert link.receive(0.3) is None
    station = lab.station(f"tcp://127.0.0.1:{free_port}")
    ask(link, station)


def test_a_station_that_restarts_is_found_again(lab: Lab) -> None:
    station = lab.station()
    endpoint = station.endpoint
    link = lab.link(endpoint)
    first = ask(link, station)
    station.close()
    until(lambda: _can_bind(endpoint), "the port to be free")
    again = lab.station(endpoint)
    assert ask(link, again).route != first.route
    with pytest.raises(PeerGoneError):
        again.send(first.route, Attached(session=1))


def test_addresses_that_cannot_be_bound_are_one_line_with_advice(lab: Lab) -> None:
    station = lab.station()
    for bind, advice in (
        (station.endpoint, "port is in use"),
        ("tcp://192.0.2.1:5555", "no such address"),
        ("tcp://127.0.0.1", "looks like tcp://"),
        ("127.0.0.1:5555", "looks like tcp://"),
        ("inproc://x", "looks like tcp://"),
        ("tcp://nosuchinterface:5555", "no such interface"),
        ("tcp://127.0.0.1:99999", "looks like tcp://"),
    ):
        with pytest.raises(TransportError, match=advice) as caught:
            lab.station(bind)
        assert bind in str(caught.value)
        assert "\n" not in str(caught.value)
    for endpoint in ("127.0.0.1:5555", "tcp://127.0.0.1", "nonsense"):
        with pytest.raises(TransportError, match="looks like tcp://"):
            lab.link(endpoint)


def test_keys_that_are_none_are_one_line(lab: Lab) -> None:
    with pytest.raises(TransportError, match="Z85"):
        lab.link("tcp://127.0.0.1:5555", LinkSecurity("short", new_key_pair()))


def test_a_second_door_and_a_closed_door_are_refused(lab: Lab) -> None:
    with pytest.raises(TransportError, match="already"):
        Door(lab.context, lab.admission)
    lab.door.close()
    lab.door.close()
    with pytest.raises(TransportError, match="door"):
        lab.station()


def test_an_insecure_channel_works_and_needs_checksums(tmp_path: Path) -> None:
    context = new_context()
    station = open_data_station(context, "tcp://127.0.0.1:*", None)
    link = open_data_link(context, station.endpoint, None)
    asked = ask(link, station)
    assert asked.key == ""
    station.send(asked.route, a_run())
    assert same(hear(link).message, a_run())
    station.close()
    link.close()
    context.term()


def test_revoking_cuts_a_live_connection_off(lab: Lab) -> None:
    station = lab.station()
    link, other = lab.link(station.endpoint, lab.admitted("thief")), lab.link(station.endpoint)
    ask(link, station)
    ask(other, station)
    lab.admission.revoke("thief")

    def is_deaf() -> bool:
        link.send(Attach(session=1))
        return station.receive(0.1) is None

    until(is_deaf)
    assert station.counters["revoked_key"] >= 1
    assert _answer(link, Failure).reason == "its key was revoked"
    ask(other, station)


def test_the_enrolment_key_opens_only_the_control_plane(lab: Lab) -> None:
    station = lab.station()
    token = lab.admission.create_token(lab.keys, [station.endpoint], 60.0)
    link = lab.link(station.endpoint, LinkSecurity(token.server_key, token.enrolment))
    with pytest.raises(RefusedError, match=token.enrolment.fingerprint):
        link.receive(WAIT_S)
    assert lab.door.counters == {"enrolment_key_on_data_plane": 1}


def test_control_plane_enrols_and_talks(lab: Lab) -> None:
    async def join() -> None:
        station = open_control_station(lab.context, "tcp://127.0.0.1:*", lab.security)
        typed_station: ControlStation = station
        token = lab.admission.create_token(lab.keys, [station.endpoint], 60.0, uses=1)
        link = open_control_link(lab.devices, station.endpoint, LinkSecurity(token.server_key, token.enrolment))
        envelope = await _ask_control(link, station)
        assert lab.admission.kind_of(envelope.key) == "enrolment"
        own = new_key_pair()
        lab.admission.enrol(envelope.key, own.public, "kit")
        link.close()
        link = open_control_link(lab.devices, station.endpoint, LinkSecurity(token.server_key, own))
        typed_link: ControlLink = link
        envelope = await _ask_control(link, station)
        assert envelope.key == own.public
        for message in every_kind():
            await typed_station.send(envelope.route, message)
            assert same((await typed_link.receive()).message, message)
            await typed_link.send(message)
            assert same((await typed_station.receive()).message, message)
        link.close()
        link.close()
        station.close()

    asyncio.run(asyncio.wait_for(join(), WAIT_S))


def test_control_plane_many_messages_while_both_ends_send(lab: Lab) -> None:
    """ZeroMQ's descriptor is edge-triggered: a send may swallow the news of an arrival."""

    async def storm() -> None:
        station = open_control_station(lab.context, "tcp://127.0.0.1:*", lab.security)
        link = open_control_link(lab.devices, station.endpoint, lab.admitted())
        route = (await _ask_control(link, station)).route
        most = 2000

        async def pump(send: object, receive: object) -> None:
            heard = sent = 0
            assert callable(send)
            assert callable(receive)
            while heard < most:
                while sent < most and sent < heard + 4:  # ZeroMQ promises half a queue
                    await send(Pong(sequence=sent))
                    sent += 1
                assert same((await receive()).message, Pong(sequence=heard))
                heard += 1

        await asyncio.gather(
            pump(link.send, link.receive), pump(lambda message: station.send(route, message), station.receive)
        )
        link.close()
        station.close()

    asyncio.run(asyncio.wait_for(storm(), 60))


def test_a_cancelled_control_receive_loses_nothing(lab: Lab) -> None:
    async def cancel() -> None:
        station = open_control_station(lab.context, "tcp://127.0.0.1:*", lab.security)
        link = open_control_link(lab.devices, station.endpoint, lab.admitted())
        await _ask_control(link, station)
        for number in range(200):
            waiting = asyncio.ensure_future(station.receive())
            await link.send(Pong(sequence=number))
            await asyncio.sleep(0.0005 * (number % 3))
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert same((await waiting).message, Pong(sequence=number))
                continue
            assert same((await station.receive()).message, Pong(sequence=number))
        link.close()
        station.close()

    asyncio.run(asyncio.wait_for(cancel(), 60))


def test_control_sends_fail_as_data_sends_do(lab: Lab, free_port: int) -> None:
    async def fail() -> None:
        station = open_control_station(lab.context, "tcp://127.0.0.1:*", lab.security)
        with pytest.raises(PeerGoneError):
            await station.send(b"\x00nobody", Pong(sequence=1))
        link = open_control_link(lab.devices, f"tcp://127.0.0.1:{free_port}", lab.admitted())
        with pytest.raises(PeerBusyError):
            await link.send(Pong(sequence=1))
        link.close()
        station.close()

    asyncio.run(asyncio.wait_for(fail(), WAIT_S))


def test_one_door_serves_both_planes_while_their_owners_are_busy(lab: Lab) -> None:
    station = lab.station()
    link = lab.link(station.endpoint)
    time.sleep(0.3)  # nobody receives: the handshake must be done by others
    link.send(Attach(session=1))
    assert same(hear(station).message, Attach(session=1))


def test_endpoints_with_a_wildcard_say_the_port(lab: Lab) -> None:
    station = lab.station("tcp://*:*")
    port = int(station.endpoint.rsplit(":", 1)[1])
    assert port > 0
    ask(lab.link(f"tcp://127.0.0.1:{port}"), station)


def test_station_security_shows_no_secret(lab: Lab) -> None:
    assert lab.keys.secret not in repr(StationSecurity(lab.keys, lab.door))
    assert lab.keys.secret not in repr(LinkSecurity(lab.keys.public, lab.keys))
    context = new_context()
    try:
        with context.socket(0) as pair:
            pair.bind("inproc://x")
            assert endpoint_of(pair) == "inproc://x"
    finally:
        context.term()


async def _ask_control(link: ZmqControlLink, station: ZmqControlStation, message: Message | None = None) -> Envelope:
    while True:
        with contextlib.suppress(PeerBusyError):
            await link.send(message or Ping(sequence=0, done=0, queued=0, rss_bytes=0))
            return await station.receive()
        await asyncio.sleep(0.02)


def _answer(link: object, kind: type) -> Failure:
    assert hasattr(link, "receive")
    limit = time.monotonic() + WAIT_S
    while time.monotonic() < limit:
        envelope = link.receive(1.0)
        if envelope is not None and isinstance(envelope.message, kind):
            return envelope.message
    raise AssertionError(f"no {kind.__name__} came")


def _can_bind(endpoint: str) -> bool:
    port = int(endpoint.rsplit(":", 1)[1])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True
