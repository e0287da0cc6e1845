"""Orders out, replies in, matched: the model thread's side of the data plane.

One thread owns the station and the model. Every request runs in a greenlet of its own on that thread; while its
experts work it is parked here and another request computes. So waiting costs a switch of about a microsecond
instead of two hops between threads, and nothing needs a lock (docs/design.md has the figures).
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from greenlet import getcurrent, greenlet

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.errors import PeerBusyError, PeerGoneError, ProtocolError
from wdmoe.transport.channel import DataStation, Envelope
from wdmoe.transport.codec.messages import Activations, Failure, Message, Result, Run

log = logging.getLogger(__name__)

MAX_ORDER_S = 600.0  # no wait is longer, whatever a caller asks

# Once a connection ended, whose it was shows when something is sent to it: the first try may come before ZeroMQ has let
# go of it, hence some more. A device that is there notes a Failure of no attempt, and goes on.
_PROBE = Failure(attempt=0, reason="another connection ended; is this one there?")
_PROBE_EVERY_S = 0.005
_PROBE_FOR_S = 0.05

BLOCKED_S = 2e-3  # a receive that took longer found the socket empty: what it brought came just now


class Expected(NamedTuple):
    """When the answer to an order should come, in seconds after it was sent."""

    usual_s: float = 0.0  # what it takes on a device that is well
    copy_s: float = math.inf  # later than this, a copy elsewhere is asked
    late_s: float = math.inf  # later than this, its device counts as slow: a copy would have been clearly faster
    air_s: float = 0.0  # the part of these that is the shared band's
    prompt: bool = False  # part of a prompt; slow devices are found for prompts and for answers apart
    trial: bool = False  # nobody waits for it: it asks a slow device how fast it is by now


NOTHING_EXPECTED = Expected()


class Order(NamedTuple):
    """One device's share of a layer: a `Run` that has not been given a number yet."""

    route: bytes
    layer: int
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: Activations
    rows: Int32Array
    weights: Float32Array
    bandwidth_hz: float = 0.0
    expected: Expected = NOTHING_EXPECTED


@dataclass(slots=True, eq=False)
class Reply:
    """What became of an order. `result` is None where it was not answered in time, and `reason` says why."""

    result: Result | None = None
    reason: str = ""
    timed_out: bool = False
    malformed: bool = False  # there was an answer, to something else
    open: bool = False  # sent, and neither answered nor given up
    sent_s: float = 0.0
    answered_s: float = 0.0
    least_s: float = 0.0  # it took no less: this thread may have been too busy to take it in when it came
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(slots=True, eq=False)
class Batch:
    """The orders of one call, and the greenlet that waits for them. `Exchange.begin` makes it, `Exchange.end` ends it.

    Its fields belong to the exchange, but for `open`: how many of its orders are.
    """

    deadline_s: float
    open: int = 0
    wake_s: float = math.inf
    every: bool = False  # wake at each reply, not only after the last
    waiter: greenlet | None = None


@dataclass(slots=True)
class ExchangeCounters:
    """For `/metrics`."""

    orders: int = 0
    late_replies: int = 0
    timeouts: int = 0
    failures: int = 0
    hedges: int = 0  # of the orders: to the holder of a copy, because an answer was late
    hedges_won: int = 0  # late answers that the holders of copies were faster than
    trials: int = 0  # of the orders: to see whether a slow device is fast again


@dataclass(slots=True, eq=False)
class _Pending:
    batch: Batch | None  # None: nobody waits any more
    reply: Reply
    deadline_s: float
    order: Order = field(repr=False)


class Exchange:
    """Sends orders and waits for their replies. Every method but `post` belongs to the owner thread."""

    def __init__(
        self, station: DataStation, on_other: Callable[[Envelope], None], on_gone: Callable[[bytes], None]
    ) -> None:
        """Both callbacks run on the owner thread.

        Args:
            station: the BS end of the data plane; the caller closes it.
            on_other: gets every message that is not a reply (a device attaching).
            on_gone: gets the route of a connection that turned out to be gone.
        """
        self._station = station
        self._on_other = on_other
        self._on_gone = on_gone
        self._attempts = count(1)
        self._pending: dict[int, _Pending] = {}
        self._aside: set[int] = set()  # those of them that nobody waits for
        self._batches: set[Batch] = set()
        self._ready: deque[greenlet] = deque()
        self._posted: deque[Callable[[], None]] = deque()
        self._ended = station.ended
        self._probe_until_s = 0.0  # 0: nothing to find out
        self._empty_s = 0.0  # when the socket was last seen empty
        self._come_s = 0.0  # what is being taken in came no earlier
        self.counters = ExchangeCounters()
        # Hears what became of an order that nobody waited for any more. Called on the owner thread.
        self.on_aside: Callable[[Order, Reply], None] = lambda order, reply: None

    # ---- from any thread ----

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the owner thread soon. Thread-safe."""
        self._posted.append(action)
        self._station.wake()

    # ---- on the owner thread ----

    def send(self, route: bytes, message: Message) -> None:
        """Send something that is no order (an `Attached`). A peer that is gone is not an error here."""
        try:
            self._station.send(route, message)
        except (PeerGoneError, PeerBusyError) as error:
            log.debug("not sent: %s", error)

    def call(
        self, orders: Sequence[Order], wait_s: float, meanwhile: Callable[[], object] | None = None
    ) -> list[Reply]:
        """Send all orders and wait until each is answered, refused, or `wait_s` has passed.

        In a greenlet that `spawn` started, other greenlets run meanwhile. A reply that comes later is counted and
        thrown away, so an expert is never mixed in twice. `meanwhile` is called once the orders are on their way.
        """
        batch = self.begin(wait_s)
        try:
            replies = [self.start(batch, order) for order in orders]
            if batch.open:
                if meanwhile is not None:
                    meanwhile()
                self.wait(batch)
        finally:
            self.end(batch)
        return replies

    def begin(self, wait_s: float) -> Batch:
        """For a caller that decides while it waits: `start` orders at any time, `wait`, and `end` it in any case."""
        batch = Batch(time.monotonic() + min(wait_s, MAX_ORDER_S))
        self._batches.add(batch)
        return batch

    def start(self, batch: Batch, order: Order) -> Reply:
        """Send a further order. A peer that is gone is told by the reply."""
        return self._start(order, batch, batch.deadline_s)

    def start_aside(self, order: Order, wait_s: float) -> None:
        """Send an order that nobody waits for; `on_aside` hears of its reply, or that none came in `wait_s`."""
        reply = self._start(order, None, time.monotonic() + min(wait_s, MAX_ORDER_S))
        if not reply.open:
            self.on_aside(order, reply)

    def wait(self, batch: Batch, until_s: float = math.inf, every: bool = False) -> None:
        """Wait until all orders of a batch are settled, or its deadline or `until_s` (monotonic) has passed.

        Whatever has come by then has been taken in: an order that is still open is not answered.

        Args:
            every: return as soon as any further order is settled.
        """
        if not batch.open:
            return
        batch.wake_s, batch.every = min(until_s, batch.deadline_s), every
        current = getcurrent()
        if current.parent is None:  # the thread's main greenlet: nobody else to run
            self._pump_for(batch)
            return
        batch.waiter = current
        current.parent.switch()
        if batch.open and time.monotonic() >= batch.wake_s:
            self.pump(0.0)  # others may have computed since this one's time came

    def end(self, batch: Batch) -> None:
        """Give up at the deadline what is open; before it, leave it aside: a late reply is counted and thrown away."""
        self._batches.discard(batch)
        if not batch.open:
            return
        over = batch.deadline_s <= time.monotonic()
        for attempt in [a for a, p in self._pending.items() if p.batch is batch]:
            if over:
                self._time_out(attempt)
            else:
                self._pending[attempt].batch = None
                self._aside.add(attempt)

    def pause(self, seconds: float) -> None:
        """Do nothing for a while; in a greenlet that `spawn` started, others run meanwhile."""
        batch = self.begin(seconds)
        batch.open = 1  # nobody settles it
        try:
            self.wait(batch)
        finally:
            self._batches.discard(batch)

    def owed_s(self, route: bytes) -> float:
        """Seconds of work, on a device that is well, that a connection owes already."""
        return sum(each.order.expected.usual_s for each in self._pending.values() if each.order.route == route)

    def spawn(self, work: Callable[[], None]) -> None:
        """Start `work` in a greenlet of its own at the next `run_ready`. It must not let exceptions out."""
        self._ready.append(greenlet(work))

    def park(self) -> None:
        """In a greenlet that `spawn` started: let others run until somebody resumes this one."""
        getcurrent().parent.switch()

    def resume(self, waiter: greenlet) -> None:
        """Have a parked greenlet go on at the next `run_ready`."""
        self._ready.append(waiter)

    def run_ready(self) -> None:
        """Resume every greenlet whose wait is over, and run posted actions."""
        while self._posted:
            self._posted.popleft()()
        for _ in range(len(self._ready)):
            self._ready.popleft().switch()

    def pump(self, longest_s: float) -> None:
        """Take in what has arrived; wait up to `longest_s` for it when there is nothing else to do."""
        timeout_s = 0.0 if self._ready or self._posted else self._until_deadline(longest_s)
        if self._probe_until_s:
            timeout_s = min(timeout_s, _PROBE_EVERY_S)
        asked_s = time.monotonic()
        envelope = self._station.receive(timeout_s)
        now_s = time.monotonic()
        self._come_s = now_s if now_s - asked_s > BLOCKED_S else self._empty_s
        while envelope is not None:
            self._take(envelope)
            if not self._pending:
                break
            envelope = self._station.receive(0.0)
        else:
            self._empty_s = time.monotonic()
        if self._probe_until_s or self._station.ended != self._ended:
            self._find_gone()
        self._expire()

    def _start(self, order: Order, batch: Batch | None, deadline_s: float) -> Reply:
        attempt = next(self._attempts)
        now_s = time.monotonic()
        reply = Reply(sent_s=now_s)
        run = Run(
            attempt=attempt,
            layer=order.layer,
            remaining_s=max(deadline_s - now_s, 0.0),
            experts=order.experts,
            counts=order.counts,
            tokens=order.tokens,
            rows=order.rows,
            weights=order.weights,
            bandwidth_hz=order.bandwidth_hz,
        )
        try:
            reply.bytes_down = self._station.send(order.route, run)
        except (PeerGoneError, PeerBusyError, ProtocolError) as error:
            reply.reason = str(error)
            self.counters.failures += 1
            if isinstance(error, PeerGoneError):
                self._on_gone(order.route)
        else:
            self.counters.orders += 1
            reply.open = True
            self._pending[attempt] = _Pending(batch, reply, deadline_s, order)
            if batch is None:
                self._aside.add(attempt)
            else:
                batch.open += 1
        return reply

    def _pump_for(self, batch: Batch) -> None:
        open_ = batch.open
        while batch.open and not (batch.every and batch.open < open_):
            left_s = batch.wake_s - time.monotonic()
            self.pump(max(left_s, 0.0))  # once even if it is late: replies may have come meanwhile
            if left_s <= 0:
                return

    def _time_out(self, attempt: int) -> None:
        pending = self._pending.pop(attempt)
        pending.reply.timed_out = True
        pending.reply.reason = "no answer before the deadline"
        self.counters.timeouts += 1
        self._finish_one(attempt, pending)

    def _take(self, envelope: Envelope) -> None:
        message = envelope.message
        if not isinstance(message, (Result, Failure)):
            self._on_other(envelope)
            return
        pending = self._pending.get(message.attempt)
        if pending is None or pending.order.route != envelope.route:  # an attempt answers to its own device only
            self.counters.late_replies += 1
            return
        del self._pending[message.attempt]
        if pending.batch is None and not pending.order.expected.trial:
            self.counters.late_replies += 1
        self._settle(pending, message, envelope.size_bytes)

    def _settle(self, pending: _Pending, message: Result | Failure, size_bytes: int) -> None:
        reply = pending.reply
        reply.answered_s = time.monotonic()
        reply.least_s = max(self._come_s - reply.sent_s, 0.0)
        reply.bytes_up = size_bytes
        if isinstance(message, Failure):
            reply.reason = message.reason
        elif message.partial.shape != pending.order.tokens.shape or message.layer != pending.order.layer:
            reply.malformed = True
            reply.reason = f"answered with shape {message.partial.shape} for layer {message.layer}"
        else:
            reply.result = message
        if reply.result is None:
            self.counters.failures += 1
        self._finish_one(message.attempt, pending)

    def _find_gone(self) -> None:
        """Give up at once on what devices owe whose connection has ended, not at the deadline."""
        now_s = time.monotonic()
        if self._station.ended != self._ended:
            self._ended = self._station.ended
            self._probe_until_s = now_s + _PROBE_FOR_S
        for route in {pending.order.route for pending in self._pending.values()}:
            try:
                self._station.send(route, _PROBE)
            except PeerGoneError as error:
                self._give_up(route, str(error))
            except (PeerBusyError, ProtocolError):
                continue
        if not self._pending or now_s > self._probe_until_s:
            self._probe_until_s = 0.0

    def _give_up(self, route: bytes, reason: str) -> None:
        for attempt in [a for a, p in self._pending.items() if p.order.route == route]:
            pending = self._pending.pop(attempt)
            pending.reply.reason = reason
            self.counters.failures += 1
            self._finish_one(attempt, pending)
        self._on_gone(route)

    def _finish_one(self, attempt: int, pending: _Pending) -> None:
        pending.reply.open = False
        batch = pending.batch
        if batch is None:
            self._aside.discard(attempt)
            self.on_aside(pending.order, pending.reply)
            return
        batch.open -= 1
        if not batch.open or batch.every:
            self._resume(batch)

    def _resume(self, batch: Batch) -> None:
        waiter, batch.waiter = batch.waiter, None
        if waiter is not None:
            self._ready.append(waiter)

    def _expire(self) -> None:
        if not self._batches and not self._aside:
            return
        now_s = time.monotonic()
        for batch in self._batches:
            if batch.wake_s <= now_s:
                self._resume(batch)
        if self._aside:
            for attempt in [a for a in self._aside if self._pending[a].deadline_s <= now_s]:
                self._time_out(attempt)

    def _until_deadline(self, longest_s: float) -> float:
        if not self._batches:
            return longest_s
        nearest_s = min([batch.wake_s for batch in self._batches]) - time.monotonic()
        return max(0.0, min(longest_s, nearest_s))
