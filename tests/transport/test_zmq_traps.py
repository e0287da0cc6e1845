"""ZeroMQ's traps, Z1 to Z15 of docs/wire.md: each is closed, or shown not to apply."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import psutil
import pytest
import zmq

from tests.lab.tcp_relay import Relay
from tests.lab.wire_examples import a_run, same
from tests.lab.zmq_lab import WAIT_S, Lab, ask, hear, lab, until
from tests.transport.test_exchange import order
from wdmoe.errors import PeerBusyError, PeerGoneError, RefusedError, TransportError
from wdmoe.transport.channel import Envelope
from wdmoe.transport.codec.framing import join
from wdmoe.transport.codec.messages import Attach, Attached
from wdmoe.transport.codec.wire import encode
from wdmoe.transport.exchange import Exchange
from wdmoe.transport.security.keys import new_key_pair
from wdmoe.transport.zmq.channels import ZmqDataStation, open_data_link, open_data_station
from wdmoe.transport.zmq.sockets import LinkSecurity, SocketOptions, new_context

__all__ = ["lab"]
FAST = SocketOptions(heartbeat_ms=50, handshake_ms=500, reconnect_ms=20, reconnect_most_ms=100, connect_timeout_ms=300)


def port_of(station: ZmqDataStation) -> int:
    return int(station.endpoint.rsplit(":", 1)[1])


@pytest.fixture
def relayed(lab: Lab) -> Iterator[tuple[ZmqDataStation, Relay]]:
    station = lab.station(options=FAST)
    with closing(Relay(port_of(station))) as relay:
        yield station, relay


def raw_dealer(
    lab: Lab, security: LinkSecurity | None, endpoint: str, routing_id: bytes = b"", queue: int = 1000
) -> zmq.Socket[bytes]:
    """A peer that does not use our code, nor an I/O thread of ours."""
    dealer = lab.strangers.socket(zmq.DEALER)
    dealer.rcvhwm = queue
    dealer.linger = 0
    if security is not None:
        dealer.curve_serverkey = security.server_key.encode()
        dealer.curve_publickey = security.keys.public.encode()
        dealer.curve_secretkey = security.keys.secret.encode()
    if routing_id:
        dealer.routing_id = routing_id
    dealer.connect(endpoint)
    return dealer


def gone(station: ZmqDataStation, route: bytes) -> bool:
    """Whether the station knows that a peer is away."""
    with suppress(PeerBusyError):
        try:
            station.send(route, Attached(session=0))
        except PeerGoneError:
            return True
    return False


def test_z1_a_refused_key_is_an_error_and_a_new_link_is_the_cure(lab: Lab) -> None:
    station = lab.station()
    pair = new_key_pair()
    link = lab.link(station.endpoint, LinkSecurity(lab.keys.public, pair))
    with pytest.raises(RefusedError, match=pair.fingerprint):
        link.receive(WAIT_S)
    assert lab.door.counters == {"unknown_key": 1}, "asked once, never again"
    lab.admission.admit(pair.public, "kit")
    with pytest.raises(RefusedError):
        link.receive(WAIT_S)
    ask(lab.link(station.endpoint, LinkSecurity(lab.keys.public, pair)), station)


def test_z1_a_wrong_server_key_is_an_error_within_a_bound(lab: Lab) -> None:
    station = lab.station()
    link = lab.link(station.endpoint, LinkSecurity(new_key_pair().public, lab.admitted().keys))
    with pytest.raises(RefusedError, match="another server key"):
        link.receive(WAIT_S)


def test_z1_something_else_on_the_port_is_an_error(lab: Lab) -> None:
    context = new_context()
    plain = open_data_station(context, "tcp://127.0.0.1:*", None)
    link = lab.link(plain.endpoint)
    with pytest.raises(RefusedError):
        link.receive(WAIT_S)
    plain.close()
    context.term()


def test_z2_who_it_is_comes_from_the_handshake_not_from_a_claim(lab: Lab) -> None:
    station, honest, liar = lab.station(), lab.admitted("honest"), lab.admitted("liar")
    with raw_dealer(lab, liar, station.endpoint, routing_id=honest.keys.public.encode()) as dealer:
        dealer.send(join(encode(Attach(session=1))))
        assert hear(station).key == liar.keys.public


def test_z3_a_claimed_routing_id_takes_nothing_over(lab: Lab) -> None:
    station = lab.station()
    link = lab.link(station.endpoint)
    asked = ask(link, station)
    with raw_dealer(lab, lab.admitted("thief"), station.endpoint, routing_id=asked.route) as thief:
        thief.send(join(encode(Attach(session=666))))
        assert station.receive(0.5) is None, "the thief is accepted and ignored"
        station.send(asked.route, a_run())
        assert same(hear(link).message, a_run()), "and the owner goes on"
        assert thief.poll(100) == 0


def test_z4_a_device_that_comes_back_while_the_station_is_busy_is_heard(lab: Lab) -> None:
    station, security = lab.station(), lab.admitted()
    ask(lab.link(station.endpoint, security), station)
    for session in (2, 3):  # nobody receives meanwhile
        link = lab.link(station.endpoint, security)
        until(lambda link=link, session=session: _sent(link, session))
    heard = {hear(station).message.session for _ in range(2)}  # type: ignore[union-attr]
    assert heard == {2, 3}


def test_z5_too_large_messages_cut_only_their_sender(lab: Lab) -> None:
    """That our own ends refuse before sending is in test_zeromq."""
    station = lab.station(options=SocketOptions(max_message_bytes=10_000))
    link = lab.link(station.endpoint)
    ask(link, station)
    with raw_dealer(lab, lab.admitted("fat"), station.endpoint) as dealer:
        dealer.send(bytes(50_000))

        def refused() -> bool:
            # Each frame fits, and a message has one. Again and again: what is on its way when ZeroMQ cuts the
            # connection for the message before is lost with it.
            with suppress(zmq.Again):
                dealer.send_multipart([b"\x02" * 9_000] * 3, zmq.NOBLOCK)
            return station.receive(0.1) is None and bool(station.counters.get("invalid_message"))

        until(refused, "the refusal")
    ask(link, station)


def test_z6_nowhere_and_full_are_errors_of_their_own(lab: Lab) -> None:
    station = lab.station()
    with pytest.raises(PeerGoneError):
        station.send(b"\x00\x01\x02\x03\x04", Attached(session=1))
    with raw_dealer(lab, lab.admitted("full"), station.endpoint, queue=1) as dealer:
        dealer.send(join(encode(Attach(session=1))))
        asked = hear(station)
        run = a_run(hidden=1 << 20)

        def flood() -> None:  # the peer reads nothing: queues and TCP buffers fill up
            for _ in range(1000):
                station.send(asked.route, run)

        with pytest.raises(PeerBusyError):
            flood()


def test_z7_a_stopped_process_is_noticed(lab: Lab) -> None:
    station, security = lab.station(options=FAST), lab.admitted()
    code = f"""
        from wdmoe.transport.security.keys import KeyPair
        from wdmoe.transport.codec.messages import Attach
        from wdmoe.transport.zmq.sockets import LinkSecurity, SocketOptions, new_context
        from wdmoe.transport.zmq.channels import open_data_link
        security = LinkSecurity({security.server_key!r}, KeyPair({security.keys.public!r}, {security.keys.secret!r}))
        link = open_data_link(new_context(), {station.endpoint!r}, security, SocketOptions(heartbeat_ms=50))
        while True:
            try:
                link.send(Attach(session=1))
            except Exception:
                pass
            link.receive(0.1)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        asked = hear(station)
        station.send(asked.route, Attached(session=1))
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: gone(station, asked.route), "the stopped peer to be given up")
        while station.receive(0.2) is not None:
            pass
        os.kill(process.pid, signal.SIGCONT)
        assert hear(station).key == asked.key, "it comes back by itself"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("silent", [False, True])
def test_z7_an_order_to_a_peer_that_ends_is_given_up(
    lab: Lab, relayed: tuple[ZmqDataStation, Relay], silent: bool
) -> None:
    """A socket tells its owner nothing of this. A closed connection shows at once, a silent one after a heartbeat."""
    station, relay = relayed
    link = lab.link(relay.endpoint, options=FAST)
    route = ask(link, station).route
    gone_routes: list[bytes] = []
    exchange = Exchange(station, lambda envelope: None, gone_routes.append)

    def end() -> None:
        time.sleep(0.2)
        if silent:
            relay.cut = True
        else:
            link.close()

    ending = threading.Thread(target=end)
    ending.start()
    reply = exchange.call([order(route)], 250.0)[0]  # the test would end before
    ending.join()
    assert reply.result is None
    assert not reply.timed_out
    assert gone_routes == [route]


def test_z8_after_a_partition_both_sides_find_each_other(lab: Lab, relayed: tuple[ZmqDataStation, Relay]) -> None:
    station, relay = relayed
    link = lab.link(relay.endpoint, options=FAST)
    asked = ask(link, station)
    relay.cut = True
    until(lambda: gone(station, asked.route), "the station to notice")
    until(lambda: _busy(link), "the device to notice")
    relay.cut = False
    assert ask(link, station).key == asked.key


def test_z9_black_holed_peers_give_their_descriptors_back(lab: Lab, relayed: tuple[ZmqDataStation, Relay]) -> None:
    station, relay = relayed
    routes = [ask(lab.link(relay.endpoint, options=FAST), station).route for _ in range(8)]

    def open_to_station() -> int:
        port = port_of(station)
        connections = psutil.Process().net_connections("tcp")
        return sum(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in connections if c.laddr)

    relay.cut = True
    until(lambda: all(gone(station, route) for route in routes), "all to be given up")
    until(lambda: open_to_station() == 0, "their descriptors")


def test_z10_silent_and_garbage_clients_are_cut(lab: Lab) -> None:
    station = lab.station(options=FAST)
    for greeting in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(200), b"\xff" + bytes(8) + b"\x7f\x03\x00"):
        with socket.create_connection(("127.0.0.1", port_of(station)), timeout=WAIT_S) as client:
            client.sendall(greeting)
            with suppress(ConnectionError):
                while client.recv(1000):  # the station's own greeting; b"" or a reset once it hangs up
                    pass
    ask(lab.link(station.endpoint), station)


def test_z11_a_flood_of_connections_leaves_room_for_a_device(lab: Lab) -> None:
    station = lab.station(options=FAST)
    flood = [socket.create_connection(("127.0.0.1", port_of(station)), timeout=WAIT_S) for _ in range(200)]
    try:
        ask(lab.link(station.endpoint), station)
    finally:
        for client in flood:
            client.close()


def test_z12_a_flipped_bit_never_arrives_as_a_tensor(lab: Lab, relayed: tuple[ZmqDataStation, Relay]) -> None:
    station, relay = relayed
    link = lab.link(relay.endpoint, options=FAST)
    _flip_one_and_check(relay, lambda: link.send(a_run(hidden=1000)), station, link)
    ask(link, station)


def test_z12_without_encryption_the_checksum_finds_it() -> None:
    context = new_context()
    station = open_data_station(context, "tcp://127.0.0.1:*", None)
    with closing(Relay(port_of(station))) as relay:
        link = open_data_link(context, relay.endpoint, None)
        _flip_one_and_check(relay, lambda: link.send(a_run(hidden=1000)), station, link)
        assert station.counters == {"invalid_message": 1}
        link.close()
    station.close()
    context.term()


def test_z13_a_first_message_that_meets_a_full_queue_is_sent_again(lab: Lab) -> None:
    station = lab.station()
    link = lab.link(station.endpoint)
    with pytest.raises(PeerBusyError):  # no handshake is this quick
        link.send(Attach(session=1))
    ask(link, station)


def test_z14_encryption_is_on_unless_it_was_left_out_by_name(lab: Lab) -> None:
    """Its cost is measured by tools/bench/decode: microseconds at one token, so there is no reason to turn it off."""
    station = lab.station()
    link = lab.link(station.endpoint)
    for end in (station, link):
        assert end._messages.socket.get(zmq.MECHANISM) == zmq.CURVE
    assert station._messages.socket.get(zmq.ZAP_ENFORCE_DOMAIN) == 1


def test_z15_routing_ids_cannot_be_guessed() -> None:
    """libzmq aborts the process when a peer has claimed the number that the next connection is due for."""
    code = """
        import time
        from wdmoe.errors import TransportError
        from wdmoe.transport.codec.messages import Attach
        from wdmoe.transport.zmq.sockets import new_context
        from wdmoe.transport.zmq.channels import open_data_link, open_data_station
        context = new_context()
        station = open_data_station(context, "tcp://127.0.0.1:*", None)
        link = open_data_link(context, station.endpoint, None)
        while True:
            try:
                link.send(Attach(session=1))
                break
            except TransportError:
                time.sleep(0.01)
        print(station.receive(20).route.hex())
    """
    routes = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, timeout=WAIT_S
        ).stdout
        for _ in range(2)
    }
    assert len(routes) == 2


def test_without_its_door_a_station_lets_nobody_in(lab: Lab) -> None:
    """A CURVE server without a ZAP handler accepts any key, unless its domain is enforced."""
    station = lab.station(options=FAST)
    security = lab.admitted()
    ask(lab.link(station.endpoint, security), station)
    lab.door.close()
    link = lab.link(station.endpoint, lab.admitted("late"), options=FAST)
    with pytest.raises(RefusedError, match="lets nobody in"):
        link.receive(WAIT_S)
    with pytest.raises(TransportError, match="door"):
        lab.station()


def _sent(link: object, session: int) -> bool:
    assert hasattr(link, "send")
    with suppress(PeerBusyError):
        link.send(Attach(session=session))
        return True
    return False


def _busy(link: object) -> bool:
    return not _sent(link, 1)


def _flip_one_and_check(relay: Relay, send: object, station: ZmqDataStation, link: object) -> None:
    assert callable(send)
    heard: list[Envelope] = []
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            if (envelope := station.receive(0.05)) is not None:
                heard.append(envelope)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        sent = 0

        def settled() -> bool:
            """All that was sent is here: many of them in one piece would be taken for the large frame."""
            nonlocal sent
            sent += not heard and _sent(link, 1)
            return 0 < len(heard) == sent

        until(settled, "the link")
        relay.flip_frames_above = 3000
        send()
        assert relay.flipped.wait(WAIT_S)
        time.sleep(0.3)  # were it delivered, it would be here by now
    finally:
        stop.set()
        listener.join()
    assert all(isinstance(envelope.message, Attach) for envelope in heard)


def test_z21_both_ends_close_with_a_full_queue_between_them() -> None:
    """With a frame for each tensor this aborted, or hung in the end of a context, within some twenty rounds."""
    code = """
        from contextlib import suppress
        from tests.lab.wire_examples import a_run
        from wdmoe.errors import TransportError
        from wdmoe.transport.codec.messages import Attach
        from wdmoe.transport.zmq.sockets import new_context
        from wdmoe.transport.zmq.channels import open_data_link, open_data_station

        run = a_run(hidden=30_000)
        for _ in range(40):
            near, far = new_context(), new_context()
            station = open_data_station(near, "tcp://127.0.0.1:*", None)
            links = [open_data_link(far, station.endpoint, None) for _ in range(4)]
            routes = []
            while len(routes) < len(links):
                for link in links:
                    with suppress(TransportError):
                        link.send(Attach(session=1))
                while (envelope := station.receive(0.02)) is not None:
                    routes = sorted({*routes, envelope.route})
            for route in routes:
                with suppress(TransportError):
                    for _ in range(100):
                        station.send(route, run)
            for link in links:
                link.receive(1)
            for end in (*links, station):
                end.close()
            far.term()
            near.term()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], timeout=WAIT_S, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
