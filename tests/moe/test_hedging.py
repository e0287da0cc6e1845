"""A device that is slow and yet alive: others answer in its place, once each, and it comes back when it is fast."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.backbone.test_spine import answer, ask, bundle, checkpoint, greedy
from tests.lab.engine_lab import Lab
from tests.transport.test_exchange import Peer, double, exchange_on, route_of
from wdmoe.arrays import FloatArray
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.moe.dispatch import Band, Hedging, Outcome, Work, dispatch
from wdmoe.receipt import Receipt
from wdmoe.transport.codec.messages import Failure, Message, Run
from wdmoe.transport.exchange import Exchange, Expected
from wdmoe.transport.memory import MemoryDataStation
from wdmoe.transport.routing import DeviceRoute

__all__ = ["bundle", "checkpoint"]  # fixtures

SLOW_S = 0.15
DEADLINE_S = 30.0  # never reached: no answer is lost here, however busy the machine is


def slow_down(lab: Lab, index: int) -> threading.Event:
    """Each answer of this device takes longer, until the event is set."""
    well = threading.Event()

    def spoil(run: Run, reply: Message) -> Message:
        if not well.is_set():
            time.sleep(SLOW_S)
        return reply

    lab.devices[index].spoil = spoil
    return well


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_slow_device_is_left_alone_until_it_is_fast_again(
    bundle: Bundle, checkpoint: Path, from_the_start: bool
) -> None:
    lab = Lab(bundle, rules={"deadline_s": DEADLINE_S}, copies=2)
    slow, want = lab.devices[1], greedy(checkpoint)
    try:
        if not from_the_start:
            assert ask(lab)[0] == want
        well = slow_down(lab, 1)
        hedges = 0
        while not lab.layers.observed.lateness.slow:
            ids, _, receipt = ask(lab)
            assert ids == want
            assert not receipt.degraded
            assert receipt.retries == 0
            hedges += receipt.hedges
        assert hedges == lab.exchange.counters.hedges > 0
        assert lab.exchange.counters.hedges_won > 0
        assert {route for route, _ in lab.layers.observed.lateness.slow} == {slow.route}
        runs, trials = slow.runs, lab.exchange.counters.trials
        ids, _, receipt = ask(lab)
        assert ids == want
        assert slow.runs - runs <= 6 + lab.exchange.counters.trials - trials  # what it still owed, and prompts
        well.set()
        while lab.layers.observed.lateness.slow:
            assert ask(lab)[0] == want
        runs = slow.runs
        assert ask(lab)[0] == want
        assert slow.runs > runs
        assert lab.exchange.counters.failures == lab.exchange.counters.timeouts == 0
    finally:
        lab.close()


def test_a_copy_that_was_slow_once_is_asked_where_its_home_is_slow_now(bundle: Bundle, checkpoint: Path) -> None:
    """Its next trial may be far away; and what it took when it was slow is no measure for the one that is slow now."""
    lab = Lab(bundle, rules={"deadline_s": DEADLINE_S}, copies=2)
    lateness, home, copy = lab.layers.observed.lateness, lab.devices[1], lab.devices[2]
    try:
        assert ask(lab)[0] == greedy(checkpoint)
        for size in (1, 2, 4):
            for _ in range(8):
                lateness.learn(copy.route, size, 1.0)
        for prompt in (False, True):
            circuit = lateness._circuit(copy.route, prompt)
            circuit.is_open, circuit.trial_s = True, math.inf
        lateness.slow = frozenset({(copy.route, False), (copy.route, True)})
        slow_down(lab, 1)
        for _ in range(10):
            ids, _, receipt = ask(lab)
            assert ids == greedy(checkpoint)
            assert (receipt.degraded, receipt.retries) == (False, 0)
        assert {route for route, prompt in lateness.slow if not prompt} == {home.route}
        runs, trials = home.runs, lab.exchange.counters.trials
        ask(lab)
        assert home.runs - runs <= 6 + lab.exchange.counters.trials - trials
    finally:
        lab.close()


def test_who_has_no_copy_elsewhere_is_waited_for_however_slow(bundle: Bundle, checkpoint: Path) -> None:
    lab = Lab(bundle, rules={"deadline_s": DEADLINE_S}, copies=1)
    try:
        slow_down(lab, 1)
        ids, _, receipt = ask(lab, max_tokens=4)
        assert ids == greedy(checkpoint, tokens=4)
        assert (receipt.hedges, receipt.degraded, lab.layers.observed.lateness.slow) == (0, False, frozenset())
    finally:
        lab.close()


def test_requests_at_the_same_time_do_not_mix_while_a_device_is_slow(bundle: Bundle, checkpoint: Path) -> None:
    lab = Lab(bundle, rules={"deadline_s": DEADLINE_S}, copies=2)
    prompts = [tuple(range(at, at + 7)) for at in (40, 60, 80, 100)]

    async def together() -> list[tuple[list[int], str, Receipt]]:
        return await asyncio.gather(*(answer(lab, prompt) for prompt in prompts))

    try:
        slow_down(lab, 1)
        hedges = 0
        while not hedges:
            answers = asyncio.run(together())
            assert [ids for ids, _, _ in answers] == [greedy(checkpoint, prompt) for prompt in prompts]
            assert not any(receipt.degraded for _, _, receipt in answers)
            hedges += sum(receipt.hedges for _, _, receipt in answers)
    finally:
        lab.close()


def late(copy_of: list[int], after_s: float, most: int = 100) -> Hedging:
    """Each answer is late after so long, and so many orders may be doubled."""
    left = [most]

    def spend(orders: int) -> bool:
        left[0] -= orders
        return left[0] >= 0

    return Hedging(
        copy_of=np.array(copy_of, np.int32),
        expect=lambda device, copy, size, air_s: Expected(copy_s=after_s, late_s=after_s, air_s=air_s),
        spend=spend,
    )


class Ring:
    """Devices A, B and C on one exchange. A has experts 0 and 1; B has a copy of 0 and C one of 1."""

    def __init__(self, stack: ExitStack) -> None:
        station = MemoryDataStation()
        stack.callback(station.close)
        self.release = threading.Event()
        stack.callback(self.release.set)
        self.a_says: Message | None = None
        self.asked: dict[str, list[Run]] = {"A": [], "B": [], "C": []}
        peers = {name: Peer(station, lambda run, name=name: self._answer(name, run)) for name in "ABC"}
        for peer in peers.values():
            stack.callback(peer.close)
        self.devices = tuple(DeviceRoute(name, name, route_of(station, peer)) for name, peer in peers.items())
        self.exchange: Exchange = exchange_on(station)
        stack.callback(self.release.set)

    def _answer(self, name: str, run: Run) -> list[Message]:
        self.asked[name].append(run)
        if name == "A":
            self.release.wait(60)
            if isinstance(self.a_says, Failure):
                return [Failure(attempt=run.attempt, reason=self.a_says.reason)]
        return [double(run)]

    def work(self) -> Work:
        experts = np.array([[0, 1], [1, -1], [-1, 0]], np.int32)
        weights = np.where(experts >= 0, np.float32(0.5), np.float32(0))
        return Work(3, np.ones((3, 4), np.float32), experts, weights, self.devices, np.array([0, 0], np.int32))

    def run(self, hedging: Hedging | None, band: Band | None = None, wait_s: float = 60.0) -> Outcome:
        return dispatch(self.exchange, self.work(), wait_s, lambda: None, band, hedging)


@pytest.fixture
def ring() -> Iterator[Ring]:
    with ExitStack() as stack:
        yield Ring(stack)


def shares(outcome: Outcome) -> dict[tuple[int, int], list[str]]:
    """(token, expert) -> devices whose answers are mixed in."""
    found: dict[tuple[int, int], list[str]] = {}
    for part in outcome.parts:
        if part.reply.result is not None:
            experts = np.repeat(part.order.experts, part.order.counts)
            for row, expert in zip(part.order.rows, experts, strict=True):
                found.setdefault((int(part.token_rows[row]), int(expert)), []).append(part.device.name)
    return found


WANTED = {(0, 0), (0, 1), (1, 1), (2, 0)}


def test_holders_of_copies_together_stand_for_one_late_device(ring: Ring) -> None:
    outcome = ring.run(late([1, 2], 0.05))
    got = shares(outcome)
    assert got.keys() == WANTED
    assert all(len(devices) == 1 for devices in got.values())
    assert {device for devices in got.values() for device in devices} == {"B", "C"}
    assert [part.device.name for part in outcome.losers] == ["A"]
    assert (len(outcome.hedges), ring.exchange.counters.hedges, ring.exchange.counters.hedges_won) == (2, 2, 1)
    ring.release.set()
    until = time.monotonic() + 10
    while outcome.losers[0].reply.open and time.monotonic() < until:
        ring.exchange.pump(0.1)
    assert ring.exchange.counters.late_replies == 1
    assert shares(outcome) == got  # the late answer changed nothing


def test_the_first_device_may_still_be_first(ring: Ring) -> None:
    release = threading.Timer(0.2, ring.release.set)
    ring.asked["B"], hold = [], ring._answer

    def only_a(name: str, run: Run) -> list[Message]:
        return hold(name, run) if name == "A" else []

    ring._answer = only_a  # type: ignore[method-assign]
    release.start()
    outcome = ring.run(late([1, 2], 0.05))
    release.join()
    got = shares(outcome)
    assert {key: names for key, names in got.items() if names != ["A"]} == {}
    assert got.keys() == WANTED
    assert sorted(part.device.name for part in outcome.losers) == ["B", "C"]
    assert ring.exchange.counters.hedges_won == 0


@pytest.mark.parametrize(
    "hedging", [late([1, -1], 0.02), late([1, 2], 0.02, most=1)], ids=["no copy of one", "no budget"]
)
def test_who_cannot_be_replaced_whole_is_waited_for(ring: Ring, hedging: Hedging) -> None:
    release = threading.Timer(0.2, ring.release.set)
    release.start()
    outcome = ring.run(hedging)
    release.join()
    assert {name for names in shares(outcome).values() for name in names} == {"A"}
    assert (len(outcome.hedges), ring.asked["B"], ring.asked["C"]) == (0, [], [])


def test_a_device_that_fails_after_it_was_late_is_covered_and_known_as_failed(ring: Ring) -> None:
    ring.a_says = Failure(attempt=0, reason="out of memory")
    ring.release.set()
    outcome = ring.run(None)
    assert [part.reply.reason for part in outcome.parts] == ["out of memory"]
    assert shares(outcome) == {}


def test_at_the_deadline_an_uncovered_share_has_failed_once(ring: Ring) -> None:
    outcome = ring.run(late([1, -1], 0.02), wait_s=0.2)
    assert [(part.device.name, part.reply.timed_out) for part in outcome.parts] == [("A", True)]
    assert outcome.losers == []


class EvenBand:
    def hertz(self, counts: list[int]) -> FloatArray:
        used = np.array(counts) > 0
        return np.where(used, 12e6 / used.sum(), 0.0)

    def token_s(self, hertz: FloatArray) -> FloatArray:
        return np.full(len(hertz), 1e-3)


def test_in_a_shared_band_copies_get_the_hertz_of_who_is_late(ring: Ring) -> None:
    ring.run(late([1, 2], 0.05), EvenBand())
    (first,), (second,), (third,) = (ring.asked[name] for name in "ABC")
    assert first.bandwidth_hz == 12e6
    assert second.bandwidth_hz + third.bandwidth_hz == pytest.approx(12e6)
