"""Orders out, replies in, matched: the model thread's side of the data plane.

One thread owns the station and the model. Every request runs in a greenlet of its own on that thread; while its
experts work it is parked here and another request computes. So waiting costs a switch of about a microsecond
instead of two hops between threads, and nothing needs a lock (docs/design.md has the figures).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """One device's share of a layer: a `Run` that has not been given a number yet."""

    route: bytes
    layer: int
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: Activations
    rows: Int32Array
    weights: Float32Array
    bandwidth_hz: float = 0.0


@dataclass(slots=True, eq=False)
class Reply:
    """What became of an order. `result` is None where it was not answered in time, and `reason` says why."""

    result: Result | None = None
    reason: str = ""
    timed_out: bool = False
    malformed: bool = False  # there was an answer, to something else
    sent_s: float = 0.0
    answered_s: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(slots=True, eq=False)
class _Batch:
    """The orders of one call that are still open."""

    deadline_s: float
    replies: list[Reply]
    open: int = 0
    waiter: greenlet | None = None


@dataclass(slots=True)
class ExchangeCounters:
    """For `/metrics`."""

    orders: int = 0
    late_replies: int = 0
    timeouts: int = 0
    failures: int = 0


@dataclass(slots=True, eq=False)
class _Pending:
    batch: _Batch
    reply: Reply
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
        self._batches: set[_Batch] = set()
        self._ready: deque[greenlet] = deque()
        self._posted: deque[Callable[[], None]] = deque()
        self._ended = station.ended
        self._probe_until_s = 0.0  # 0: nothing to find out
        self.counters = ExchangeCounters()

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
        now_s = time.monotonic()
        batch = _Batch(now_s + min(wait_s, MAX_ORDER_S), [])
        for order in orders:
            batch.replies.append(self._start(order, batch, wait_s))
        if batch.open:
            self._batches.add(batch)
            try:
                if meanwhile is not None:
                    meanwhile()
                self._wait(batch)
            finally:
                self._close(batch)
        return batch.replies

    def spawn(self, work: Callable[[], None]) -> None:
        """Start `work` in a greenlet of its own at the next `run_ready`. It must not let exceptions out."""
        self._ready.append(greenlet(work))

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
        envelope = self._station.receive(timeout_s)
        while envelope is not None:
            self._take(envelope)
            envelope = self._station.receive(0.0) if self._pending else None
        if self._probe_until_s or self._station.ended != self._ended:
            self._find_gone()
        self._expire()

    def _start(self, order: Order, batch: _Batch, wait_s: float) -> Reply:
        attempt = next(self._attempts)
        reply = Reply(sent_s=time.monotonic())
        run = Run(
            attempt=attempt,
            layer=order.layer,
            remaining_s=wait_s,
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
            self._pending[attempt] = _Pending(batch, reply, order)
            batch.open += 1
        return reply

    def _wait(self, batch: _Batch) -> None:
        current = getcurrent()
        if current.parent is None:  # the thread's main greenlet: nobody else to run
            while batch.open:
                left_s = batch.deadline_s - time.monotonic()
                self.pump(max(left_s, 0.0))  # once even if it is late: replies may have come meanwhile
                if left_s <= 0:
                    return
            return
        batch.waiter = current
        current.parent.switch()

    def _close(self, batch: _Batch) -> None:
        self._batches.discard(batch)
        if not batch.open:
            return
        for attempt in [a for a, p in self._pending.items() if p.batch is batch]:
            reply = self._pending.pop(attempt).reply
            reply.timed_out = True
            reply.reason = "no answer before the deadline"
            self.counters.timeouts += 1

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
        self._settle(pending, message, envelope.size_bytes)

    def _settle(self, pending: _Pending, message: Result | Failure, size_bytes: int) -> None:
        reply, batch = pending.reply, pending.batch
        reply.answered_s = time.monotonic()
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
        self._finish_one(batch)

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
            self._finish_one(pending.batch)
        self._on_gone(route)

    def _finish_one(self, batch: _Batch) -> None:
        batch.open -= 1
        if not batch.open and batch.waiter is not None:
            self._resume(batch)

    def _resume(self, batch: _Batch) -> None:
        waiter, batch.waiter = batch.waiter, None
        if waiter is not None:
            self._ready.append(waiter)

    def _expire(self) -> None:
        if not self._batches:
            return
        now_s = time.monotonic()
        for batch in self._batches:
            if batch.deadline_s <= now_s:
                self._resume(batch)

    def _until_deadline(self, longest_s: float) -> float:
        if not self._batches:
            return longest_s
        nearest_s = min(batch.deadline_s for batch in self._batches) - time.monotonic()
        return max(0.0, min(longest_s, nearest_s))
