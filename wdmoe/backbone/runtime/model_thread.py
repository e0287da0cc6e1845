"""The thread that owns the model: a greenlet for every task, and one exchange with the devices for them all."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from wdmoe.errors import OverloadedError, RequestError, TransportError
from wdmoe.transport.exchange import Exchange

log = logging.getLogger(__name__)

IDLE_S = 1.0  # longest sleep when nothing happens
STOP_S = 10.0  # how long running tasks may take to notice that the thread stops


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """Work for the model thread. Exactly one of `run` to its end, and `fail`, happens."""

    run: Callable[[], None]  # in a greenlet of its own; must not let exceptions out
    fail: Callable[[Exception], None]  # the task was never started, or its thread died under it
    cancel: Callable[[], None]  # asks a running task to end soon
    size_bytes: int = 0  # that it takes while it runs


class ModelThread:
    """Runs up to `max_active` tasks at the same time, as far as they fit, and keeps up to `max_waiting` behind them."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        max_active: int,
        max_waiting: int,
        room_bytes: float = math.inf,
        at_work: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Nothing runs yet.

        Args:
            room_bytes: for all tasks that run at the same time.
            at_work: open on the thread as long as it works, as `Backbone.at_work`.
        """
        self._exchange = exchange
        self._room_bytes = room_bytes
        self._max_active = max_active
        self._most = max_active + max_waiting
        self._at_work = at_work
        self._lock = threading.Lock()
        self._load = 0
        self._stopping = False
        self._failure: BaseException | None = None
        self._waiting: deque[Task] = deque()  # this and the next: model thread only
        self._active: set[Task] = set()
        self._thread = threading.Thread(target=self._work, name="wdmoe-model", daemon=True)

    @property
    def load(self) -> int:
        """Tasks accepted and not finished."""
        return self._load

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs, refuse what waits, end the thread. Idempotent, from any other thread."""
        self._stopping = True
        self._exchange.post(lambda: None)
        if self._thread.is_alive():
            self._thread.join(STOP_S + IDLE_S)

    def submit(self, task: Task) -> None:
        """Have a task run. Thread-safe.

        Raises:
            OverloadedError: as many tasks as allowed are running and waiting.
            RequestError: the thread is stopping, or the task will never fit.
            TransportError: the thread has failed.
        """
        if self._failure is not None:
            raise TransportError(f"the model thread has failed: {self._failure}")
        if self._stopping or not self._thread.is_alive():
            raise RequestError("the base station is shutting down")
        if task.size_bytes > self._room_bytes:
            raise RequestError(
                f"its keys and values take {task.size_bytes / 2**20:.0f} MiB, and the base station has "
                f"{self._room_bytes / 2**20:.0f} MiB for them: ask for fewer tokens"
            )
        with self._lock:
            if self._load >= self._most:
                raise OverloadedError(f"{self._load} requests are being served already; try again later")
            self._load += 1
        self._exchange.post(lambda: self._waiting.append(task))

    def _work(self) -> None:
        try:
            with self._at_work():
                self._loop()
        except BaseException as error:  # nothing else would say that the station is dead
            log.exception("the model thread failed")
            self._failure = error
        finally:
            self._refuse_waiting()
            self._abandon_active()

    def _loop(self) -> None:
        while not self._stopping:
            self._exchange.run_ready()
            self._start_waiting()
            self._exchange.pump(IDLE_S)
        self._refuse_waiting()
        for task in self._active:
            task.cancel()
        give_up_s = time.monotonic() + STOP_S
        while self._active and time.monotonic() < give_up_s:
            self._exchange.run_ready()
            self._exchange.pump(IDLE_S)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._active) < self._max_active and self._fits(self._waiting[0]):
            task = self._waiting.popleft()
            self._active.add(task)
            self._exchange.spawn(lambda task=task: self._run(task))  # type: ignore[misc]

    def _fits(self, task: Task) -> bool:
        """Whether there is room for it now. The first one waits, and with it all behind: none is passed for ever."""
        return task.size_bytes + sum(each.size_bytes for each in self._active) <= self._room_bytes

    def _run(self, task: Task) -> None:
        try:
            task.run()
        finally:
            self._active.discard(task)
            self._finished()

    def _refuse_waiting(self) -> None:
        while self._waiting:
            task = self._waiting.popleft()
            self._finished()  # first: whoever hears of the failure may ask for the load
            task.fail(RequestError("the base station is shutting down"))

    def _abandon_active(self) -> None:
        """Tell whoever still waits for a task that can never end now: nobody may be left hanging."""
        for task in self._active:
            self._finished()
            task.fail(TransportError(f"the model thread has ended: {self._failure or 'the base station stops'}"))
        self._active.clear()

    def _finished(self) -> None:
        with self._lock:
            self._load -= 1
