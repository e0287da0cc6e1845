"""Orders and replies over the in-process transport: matched once, waited for no longer than asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from wdmoe.transport.codec.messages import Attach, Failure, Message, Result, Run
from wdmoe.transport.exchange import Exchange, Expected, Order, Reply
from wdmoe.transport.memory import Faults, MemoryDataLink, MemoryDataStation

HIDDEN = 4


def order(route: bytes, value: float = 1.0, tokens: int = 1) -> Order:
    return Order(
        route=route,
        layer=3,
        experts=(2,),
        counts=(tokens,),
        tokens=np.full((tokens, HIDDEN), value, np.float32),
        rows=np.arange(tokens, dtype=np.int32),
        weights=np.ones(tokens, np.float32),
    )


def double(run: Run) -> Message:
    return Result(
        attempt=run.attempt,
        layer=run.layer,
        compute_s=0.0,
        residence_s=0.0,
        link_down_s=0.0,
        link_up_s=0.0,
        partial=run.tokens * 2,
    )


class Peer:
    """A device's data plane in a thread: answers each Run with what `answer` says, several times if it says so."""

    def __init__(self, station: MemoryDataStation, answer: Callable[[Run], list[Message]]) -> None:
        self.link: MemoryDataLink = station.connect(key="device")
        self._answer = answer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            envelope = self.link.receive(0.05)
            if envelope is not None and isinstance(envelope.message, Run):
                for reply in self._answer(envelope.message):
                    self.link.send(reply)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.link.close()


@pytest.fixture
def station() -> Iterator[MemoryDataStation]:
    station = MemoryDataStation()
    yield station
    station.close()


def exchange_on(station: MemoryDataStation) -> Exchange:
    return Exchange(station, lambda envelope: None, lambda route: None)


def route_of(station: MemoryDataStation, peer: Peer) -> bytes:

    peer.link.send(Attach(session=1))
    envelope = station.receive(5)
    assert envelope is not None
    return envelope.route


def value(reply: Reply) -> float:
    assert reply.result is not None, reply.reason
    return float(reply.result.partial[0, 0])


def test_replies_belong_to_their_orders(station: MemoryDataStation) -> None:
    peer = Peer(station, lambda run: [double(run)])
    try:
        route = route_of(station, peer)
        replies = exchange_on(station).call([order(route, v) for v in (1.0, 2.0, 3.0)], 5.0)
        assert [value(reply) for reply in replies] == [2.0, 4.0, 6.0]
    finally:
        peer.close()


def test_a_second_reply_is_never_mixed_in(station: MemoryDataStation) -> None:
    peer = Peer(station, lambda run: [double(run), double(run)])
    try:
        exchange = exchange_on(station)
        route = route_of(station, peer)
        for v in range(5):
            assert value(exchange.call([order(route, v)], 5.0)[0]) == 2.0 * v
        exchange.pump(0.2)
        assert exchange.counters.late_replies >= 4
    finally:
        peer.close()


def test_silence_ends_at_the_deadline_and_the_late_reply_is_dropped(station: MemoryDataStation) -> None:
    late = threading.Event()

    def answer(run: Run) -> list[Message]:
        if run.tokens[0, 0] == 7:
            late.wait(10)
        return [double(run)]

    peer = Peer(station, answer)
    try:
        exchange = exchange_on(station)
        route = route_of(station, peer)
        reply = exchange.call([order(route, 7)], 0.1)[0]
        assert reply.result is None
        assert reply.timed_out
        late.set()
        assert value(exchange.call([order(route, 8)], 5.0)[0]) == 16.0
        assert exchange.counters.late_replies == 1
    finally:
        late.set()
        peer.close()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: Failure(attempt=run.attempt, reason="no such expert"), "no such expert"),
        (lambda run: double(Run(**{**_fields(run), "layer": run.layer + 1})), "layer 4"),
        (lambda run: double(Run(**{**_fields(run), "tokens": np.zeros((2, HIDDEN), np.float32)})), "shape (2, 4)"),
    ],
)
def test_a_wrong_answer_is_refused_with_its_reason(
    station: MemoryDataStation, spoil: Callable[[Run], Message], said: str
) -> None:
    peer = Peer(station, lambda run: [spoil(run)])
    try:
        reply = exchange_on(station).call([order(route_of(station, peer))], 5.0)[0]
        assert reply.result is None
        assert said in reply.reason
    finally:
        peer.close()


def _fields(run: Run) -> dict[str, object]:
    return {name: getattr(run, name) for name in Run.__slots__}


def test_a_peer_that_is_gone_is_reported_at_once(station: MemoryDataStation) -> None:
    gone: list[bytes] = []
    exchange = Exchange(station, lambda envelope: None, gone.append)
    reply = exchange.call([order(b"nobody")], 60.0)[0]
    assert reply.result is None
    assert gone == [b"nobody"]


def test_a_peer_that_goes_before_it_answers_is_not_waited_for(station: MemoryDataStation) -> None:
    """The others are: their answers stay good, and what finds out who is gone disturbs nobody."""
    gone: list[bytes] = []
    going, staying = (Peer(station, lambda run: []), Peer(station, lambda run: [double(run)]))
    try:
        routes = [route_of(station, peer) for peer in (going, staying)]
        exchange = Exchange(station, lambda envelope: None, gone.append)
        closing = threading.Timer(0.2, going.link.close)
        closing.start()
        replies = exchange.call([order(routes[0]), order(routes[1], 3.0)], 250.0)  # the test would end before
        closing.join()
        assert replies[0].result is None
        assert not replies[0].timed_out
        assert "no connection" in replies[0].reason
        assert value(replies[1]) == 6.0
        assert gone == [routes[0]]
        assert value(exchange.call([order(routes[1], 4.0)], 5.0)[0]) == 8.0
        assert (exchange.counters.failures, exchange.counters.timeouts) == (1, 0)
    finally:
        going.close()
        staying.close()


def test_an_end_that_concerns_no_order_costs_none(station: MemoryDataStation) -> None:
    slow = Peer(station, lambda run: [double(run)] if bystander.link.close() is None and not time.sleep(0.1) else [])
    bystander = Peer(station, lambda run: [])
    try:
        exchange = exchange_on(station)
        assert value(exchange.call([order(route_of(station, slow))], 250.0)[0]) == 2.0
    finally:
        slow.close()
        bystander.close()


def test_greenlets_overlap_their_waits(station: MemoryDataStation) -> None:
    """Two requests wait at the same time: the second is sent before the first is answered."""
    seen: list[float] = []
    both = threading.Event()

    def answer(run: Run) -> list[Message]:
        seen.append(float(run.tokens[0, 0]))
        held.append(run)
        if len(held) < 2:
            return []
        both.set()
        return [double(r) for r in held]

    held: list[Run] = []
    peer = Peer(station, answer)
    try:
        exchange = exchange_on(station)
        route = route_of(station, peer)
        done: list[float] = []
        for v in (1.0, 2.0):
            exchange.spawn(lambda v=v: done.append(value(exchange.call([order(route, v)], 10.0)[0])))
        until = time.monotonic() + 10
        while len(done) < 2 and time.monotonic() < until:
            exchange.run_ready()
            exchange.pump(0.1)
        assert both.is_set()
        assert sorted(done) == [2.0, 4.0]
    finally:
        peer.close()


def test_posted_actions_run_on_the_owner_thread(station: MemoryDataStation) -> None:
    exchange = exchange_on(station)
    ran_on: list[int] = []
    poster = threading.Thread(target=lambda: exchange.post(lambda: ran_on.append(threading.get_ident())))
    poster.start()
    poster.join()
    exchange.pump(5.0)
    exchange.run_ready()
    assert ran_on == [threading.get_ident()]


def test_loss_and_duplication_in_the_air_never_hang_or_double() -> None:
    station = MemoryDataStation(faults=Faults(loss=0.2, duplicate=0.3, jitter_s=0.002), rng=np.random.default_rng(5))
    peer = Peer(station, lambda run: [double(run)])
    try:
        exchange = Exchange(station, lambda envelope: None, lambda route: None)
        route = None
        while route is None:
            peer.link.send(Attach(session=1))
            envelope = station.receive(0.05)
            route = envelope.route if envelope else None
        outcomes = [exchange.call([order(route, v)], 0.1)[0] for v in range(60)]
        good = [(v, reply) for v, reply in enumerate(outcomes) if reply.result is not None]
        assert all(value(reply) == 2.0 * v for v, reply in good)
        assert 10 < len(good) < 60
    finally:
        peer.close()
        station.close()


def _held(held: list[Run]) -> Callable[[Run], list[Message]]:
    """Answers nothing until it is told to."""

    def answer(run: Run) -> list[Message]:
        held.append(run)
        return []

    return answer


def test_further_orders_may_start_later_and_the_first_answer_that_suffices_ends_the_wait(
    station: MemoryDataStation,
) -> None:
    held: list[Run] = []
    aside: list[tuple[Order, Reply]] = []
    late, copy = Peer(station, _held(held)), Peer(station, lambda run: [double(run)])
    try:
        routes = [route_of(station, peer) for peer in (late, copy)]
        exchange = exchange_on(station)
        exchange.on_aside = lambda order, reply: aside.append((order, reply))
        batch = exchange.begin(200.0)
        first = exchange.start(batch, order(routes[0], 1.0))
        begun_s = time.monotonic()
        exchange.wait(batch, begun_s + 0.05)
        assert first.open
        assert time.monotonic() - begun_s >= 0.05
        second = exchange.start(batch, order(routes[1], 2.0))
        while second.open:
            exchange.wait(batch, every=True)
        exchange.end(batch)
        assert value(second) == 4.0
        assert first.open
        assert not first.timed_out
        late.link.send(double(held[0]))
        while first.open:
            exchange.pump(1.0)
        assert [(order.route, value(reply)) for order, reply in aside] == [(routes[0], 2.0)]
        assert (exchange.counters.late_replies, exchange.counters.timeouts) == (1, 0)
    finally:
        late.close()
        copy.close()


def test_what_nobody_waits_for_any_more_still_has_its_deadline(station: MemoryDataStation) -> None:
    aside: list[Reply] = []
    silent, gone = Peer(station, lambda run: []), Peer(station, lambda run: [])
    try:
        route = route_of(station, silent)
        exchange = exchange_on(station)
        exchange.on_aside = lambda order, reply: aside.append(reply)
        exchange.start_aside(order(route), 0.1)
        exchange.start_aside(order(b"nobody"), 100.0)
        exchange.start_aside(order(route_of(station, gone)), 100.0)
        gone.close()
        until = time.monotonic() + 10
        while len(aside) < 3 and time.monotonic() < until:
            exchange.pump(0.05)
        assert [reply.timed_out for reply in aside] == [False, False, True]
        assert all(reply.result is None and reply.reason for reply in aside)
    finally:
        silent.close()


def test_a_pause_keeps_nobody_else_from_working(station: MemoryDataStation) -> None:
    peer = Peer(station, lambda run: [double(run)])
    try:
        exchange = exchange_on(station)
        route = route_of(station, peer)
        done: list[str] = []

        def sleep() -> None:
            exchange.pause(0.3)
            done.append("slept")

        def work() -> None:
            for v in range(5):
                value(exchange.call([order(route, float(v))], 10.0)[0])
            done.append("worked")

        exchange.spawn(sleep)
        exchange.spawn(work)
        until = time.monotonic() + 10
        while len(done) < 2 and time.monotonic() < until:
            exchange.run_ready()
            exchange.pump(0.1)
        assert done == ["worked", "slept"]
    finally:
        peer.close()


def test_a_reply_that_lay_in_the_socket_is_not_its_device_being_slow(station: MemoryDataStation) -> None:
    """The thread was busy: it says how long the device took at least, and finds the reply before it calls it late."""
    peer = Peer(station, lambda run: [double(run)])
    try:
        exchange = exchange_on(station)
        route = route_of(station, peer)
        exchange.pump(0.01)
        busy_s = 0.3
        reply = exchange.call([order(route)], 10.0, lambda: time.sleep(busy_s))[0]
        assert reply.answered_s - reply.sent_s >= busy_s
        assert reply.least_s < busy_s
        batch = exchange.begin(10.0)
        second = exchange.start(batch, order(route))
        time.sleep(busy_s)
        exchange.wait(batch, time.monotonic() - 1)
        exchange.end(batch)
        assert value(second) == 2.0
    finally:
        peer.close()


def test_a_connection_owes_the_usual_time_of_its_open_orders(station: MemoryDataStation) -> None:
    peer = Peer(station, lambda run: [])
    try:
        exchange = exchange_on(station)
        route = route_of(station, peer)
        for usual_s in (0.25, 0.5):
            exchange.start_aside(order(route)._replace(expected=Expected(usual_s=usual_s)), 100.0)
        assert (exchange.owed_s(route), exchange.owed_s(b"other")) == (0.75, 0.0)
    finally:
        peer.close()
