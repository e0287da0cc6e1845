"""The thread that computes: takes Run messages from the data plane, runs experts, answers.

One thread does it all because a hop between threads costs more than a small expert (docs/design.md). It also
plays the radio, where one is emulated: a message waits until it would have arrived, and so does its answer, while
the thread goes on with others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import NamedTuple

from wdmoe.config import LinkEmulation
from wdmoe.errors import ExpertError, ProtocolError, RefusedError, TransportError
from wdmoe.moe.expert import ExpertRunner
from wdmoe.nodes.device.link_emulation import REPLY_HEADER_BYTES, EmulatedLink, sleep_until
from wdmoe.transport.channel import DataLink, Envelope
from wdmoe.transport.codec.messages import Activations, Attach, Attached, Failure, Goodbye, Message, Result, Run

log = logging.getLogger(__name__)

QUEUE_RUNS = 64  # taken in and not computed yet; what exceeds it waits in the socket, where the station sees it
CONNECTING_S = 0.02  # before an Attach that could not even be sent is tried again
ATTACH_RETRY_S = 0.2
ATTACH_AGAIN_S = 1.0  # also while attached: a connection that was lost and made again is a stranger to the station
REFUSED_RETRY_S = 2.0
IDLE_S = 0.5
FINE_S = 0.002  # below this a wait sleeps: sockets only know milliseconds


class _Job(NamedTuple):  # tuples, because a frozen dataclass takes five times as long to make
    run: Run
    arrived_s: float
    ready_s: float  # when its last bit came over the (emulated) air


class _Answer(NamedTuple):
    job: _Job
    partial: Activations
    compute_s: float
    done_s: float
    due_s: float  # when its last bit is over the (emulated) air


@dataclass(frozen=True, slots=True)
class _Connection:
    open: Callable[[], DataLink] | None  # None: serve nobody
    session: int


class ComputeThread:
    """Serves one data connection at a time, until told to take another one."""

    def __init__(
        self, runner: ExpertRunner, emulation: LinkEmulation, on_crash: Callable[[BaseException], None]
    ) -> None:
        """`on_crash` is called on the thread, as its last act, when a bug ends it."""
        self._runner = runner
        self._air = EmulatedLink(emulation)
        self._on_crash = on_crash
        self._orders: SimpleQueue[_Connection | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._link: DataLink | None = None  # shared under the lock, only to wake it
        self._thread = threading.Thread(target=self._main, name="wdmoe-compute", daemon=True)
        self._jobs: deque[_Job] = deque()
        self._answers: deque[_Answer] = deque()
        self._attach_s = 0.0
        self.done = 0  # runs answered with a result
        self.expired = 0  # runs dropped because nobody waits for them any more

    @property
    def queued(self) -> int:
        """Runs taken in and not answered yet."""
        return len(self._jobs) + len(self._answers)

    def start(self) -> None:
        """Start the thread, which waits for `connect`."""
        self._thread.start()

    def connect(self, open_link: Callable[[], DataLink], session: int) -> None:
        """Drop the present connection, with what it has in work, and serve another one. Thread-safe."""
        self._order(_Connection(open_link, session))

    def hang_up(self) -> None:
        """Drop the present connection and wait for another: the station does not want this device. Thread-safe."""
        self._order(_Connection(None, 0))

    def attach_again(self) -> None:
        """Introduce this connection to the base station once more, soon. Thread-safe."""
        self._attach_s = 0.0
        self._wake()

    def stop(self) -> None:
        """End the thread after the run it is at, and wait for that. Thread-safe, idempotent."""
        self._order(None)
        if self._thread.is_alive():
            self._thread.join()

    def _order(self, connection: _Connection | None) -> None:
        self._orders.put(connection)
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._link is not None:
                self._link.wake()

    # ---- on the thread ----

    def _main(self) -> None:
        try:
            connection = self._orders.get()
            while connection is not None:
                connection = self._serve_until_next(connection)
        except BaseException as error:  # a bug must stop the node, not leave it deaf
            self._on_crash(error)

    def _serve_until_next(self, connection: _Connection) -> _Connection | None:
        """Serve one connection; returns what to do after it."""
        try:
            if connection.open is not None:
                self._serve(connection.open, connection.session)
            return self._orders.get()
        except RefusedError as error:  # the control plane meets the same refusal, if it is one of this device
            log.warning("data plane: %s; trying again in %.0f s", error, REFUSED_RETRY_S)
        try:
            return self._orders.get(timeout=REFUSED_RETRY_S)
        except Empty:
            return connection

    def _serve(self, open_link: Callable[[], DataLink], session: int) -> None:
        link = open_link()
        with self._lock:
            self._link = link
        try:
            self._attach_s = 0.0
            while self._orders.empty():
                self._step(link, session)
        finally:
            with self._lock:
                self._link = None
            link.close()
            self._jobs.clear()
            self._answers.clear()

    def _step(self, link: DataLink, session: int) -> None:
        """Do what is due: attach, answer, compute, or wait for something."""
        now_s = time.monotonic()
        if self._attach_s <= now_s:
            sent = self._send(link, Attach(session=session), quietly=True)
            self._attach_s = now_s + (ATTACH_RETRY_S if sent else CONNECTING_S)
        if self._answers and self._answers[0].due_s <= now_s:
            self._send_answer(link, self._answers.popleft())
        elif self._jobs and self._jobs[0].ready_s <= now_s:
            self._compute(link, self._jobs.popleft())
            self._take_in(link)
        else:
            self._wait(link, now_s)

    def _wait(self, link: DataLink, now_s: float) -> None:
        due_s = min(
            now_s + IDLE_S,
            self._attach_s,
            self._jobs[0].ready_s if self._jobs else now_s + IDLE_S,
            self._answers[0].due_s if self._answers else now_s + IDLE_S,
        )
        if due_s - now_s < FINE_S:
            sleep_until(due_s)
            self._take_in(link)
        else:
            envelope = link.receive(due_s - now_s - FINE_S / 2)
            if envelope is not None:
                self._take(link, envelope)

    def _take_in(self, link: DataLink) -> None:
        """Note what came while the thread was busy, so that its time runs."""
        while len(self._jobs) < QUEUE_RUNS:
            envelope = link.receive(0.0)
            if envelope is None:
                return
            self._take(link, envelope)

    def _take(self, link: DataLink, envelope: Envelope) -> None:
        message = envelope.message
        if isinstance(message, Run):
            now_s = time.monotonic()
            job = _Job(message, now_s, self._air.down.cross(now_s, envelope.size_bytes, message.bandwidth_hz))
            self._jobs.append(job)
        elif isinstance(message, Attached):
            self._attach_s = time.monotonic() + ATTACH_AGAIN_S
        elif isinstance(message, (Failure, Goodbye)):
            log.debug("data plane: the base station says: %s", message.reason)
        else:
            log.warning("data plane: ignored a %s from the base station", type(message).__name__)

    def _compute(self, link: DataLink, job: _Job) -> None:
        run, start_s = job.run, time.monotonic()
        if start_s - job.arrived_s > run.remaining_s:
            self.expired += 1
            return
        try:
            partial = self._runner.run(run)
        except ExpertError as error:
            log.warning("refused a run: %s", error)
            self._send(link, Failure(attempt=run.attempt, reason=str(error)))
            return
        done_s = time.monotonic()
        due_s = self._air.up.cross(done_s, partial.nbytes + REPLY_HEADER_BYTES, run.bandwidth_hz)
        answer = _Answer(job, partial, done_s - start_s, done_s, due_s)
        if due_s > done_s:
            self._answers.append(answer)
        else:
            self._send_answer(link, answer)

    def _send_answer(self, link: DataLink, answer: _Answer) -> None:
        job = answer.job
        now_s = time.monotonic()
        link_down_s = job.ready_s - job.arrived_s
        link_up_s = max(answer.due_s - answer.done_s, 0.0)  # by the link's rates: waking up late is residence
        result = Result(
            attempt=job.run.attempt,
            layer=job.run.layer,
            compute_s=answer.compute_s,
            residence_s=max(0.0, now_s - job.arrived_s - link_down_s - link_up_s),
            link_down_s=link_down_s,
            link_up_s=link_up_s,
            partial=answer.partial,
        )
        self.done += 1
        self._send(link, result)

    def _send(self, link: DataLink, message: Message, quietly: bool = False) -> bool:
        """Whether it went. A message that can't go is dropped: the base station's deadline covers it."""
        try:
            link.send(message)
            return True
        except (TransportError, ProtocolError) as error:
            level = logging.DEBUG if quietly else logging.WARNING
            log.log(level, "a %s was not sent: %s", type(message).__name__, error)
            return False
