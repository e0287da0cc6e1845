"""The thread that computes answers again: at once for those who wait, else with a small part of one core's time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from queue import SimpleQueue

from greenlet import getcurrent

from wdmoe.errors import WdmoeError
from wdmoe.moe.verification.recompute import Recomputed, Recomputer, Sample, differs

log = logging.getLogger(__name__)

MOST_WAITING = 16  # samples that nobody waits for; further ones are skipped
DUTY = 0.05  # of one core's time for these
SETTLE_S = 0.25  # longest hold of an answer's end for samples of it
STOP_S = 10.0


class Finding(Enum):
    """What a second computation told."""

    RIGHT = "right"
    LIE = "lie"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """On one sample. `right` is what the answer should have been, None where that is unknown."""

    finding: Finding
    right: Recomputed | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    sample: Sample | None  # None: only tells that all before it is done
    done: Callable[[Verdict], None]  # on the verifier's thread
    of: Collection[object] = ()


class Verifier:
    """Owned by whoever starts it; `close` ends the thread. `now`, `later` and `settle` belong to the model thread."""

    def __init__(self, recomputer: Recomputer, post: Callable[[Callable[[], None]], None]) -> None:
        """`post` runs an action on the model thread soon; any thread may call it."""
        self._recomputer = recomputer
        self._post = post
        self._news = threading.Condition()
        self._urgent: deque[_Job] = deque()
        self._waiting: deque[_Job] = deque()
        self._rest_until_s = 0.0
        self._mean_s = 0.0
        self._closed = False
        self._told: set[str] = set()
        self.skipped = 0
        self._thread = threading.Thread(target=self._work, name="wdmoe-verifier", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what is not begun is never known."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join(STOP_S)

    # ---- on the model thread

    def now(self, given: Sample) -> Verdict:
        """Wait for the verdict. Other greenlets run meanwhile."""
        return self._wait(lambda done: self._add(self._urgent, _Job(given, done)))

    def later(self, given: Sample, done: Callable[[Verdict], None], of: Collection[object]) -> bool:
        """Have `done` called with the verdict, on the model thread, some time. False: too much is waiting, skipped.

        Args:
            of: what `settle` will name any of.
        """
        if len(self._waiting) >= MOST_WAITING:
            self.skipped += 1
            return False
        self._add(self._waiting, _Job(given, lambda verdict: self._post(lambda: done(verdict)), of))
        return True

    def settle(self, of: object) -> None:
        """Wait until what was given to `later` for `of` is known, as far as that takes no longer than SETTLE_S."""
        with self._news:
            mine = [job for job in self._waiting if any(each is of for each in job.of)]
            most = int(SETTLE_S / self._mean_s) if self._mean_s else len(mine)
            for job in mine[:most]:
                self._waiting.remove(job)
                self._urgent.append(job)
        self._wait(lambda done: self._add(self._urgent, _Job(None, done)))

    def _wait(self, start: Callable[[Callable[[Verdict], None]], None]) -> Verdict:
        current = getcurrent()
        if current.parent is None:  # the thread's main greenlet: nobody else to run
            box: SimpleQueue[Verdict] = SimpleQueue()
            start(box.put)
            return box.get()
        verdicts: list[Verdict] = []

        def resume(verdict: Verdict) -> None:
            verdicts.append(verdict)
            self._post(current.switch)

        start(resume)
        while not verdicts:
            current.parent.switch()
        return verdicts[0]

    def _add(self, queue: deque[_Job], job: _Job) -> None:
        with self._news:
            if not self._closed:
                queue.append(job)
                self._news.notify()
                return
        job.done(Verdict(Finding.UNKNOWN))

    # ---- on the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            started_s = time.monotonic()
            job.done(self._judged(job.sample))
            spent_s = time.monotonic() - started_s
            if job.sample is not None:
                self._mean_s += 0.1 * (spent_s - self._mean_s)
            if job.of:
                self._rest_until_s = time.monotonic() + spent_s * (1 / DUTY - 1)

    def _next(self) -> _Job | None:
        with self._news:
            while not self._closed:
                rest_s = self._rest_until_s - time.monotonic()
                if self._urgent:
                    return self._urgent.popleft()
                if self._waiting and rest_s <= 0:
                    return self._waiting.popleft()
                self._news.wait(rest_s if self._waiting else None)
            left = [*self._urgent, *self._waiting]
        for job in left:
            job.done(Verdict(Finding.UNKNOWN))
        return None

    def _judged(self, given: Sample | None) -> Verdict:
        if given is None:
            return Verdict(Finding.UNKNOWN)
        try:
            right = self._recomputer.run(given)
        except WdmoeError as error:
            self._tell_once(str(error))
            return Verdict(Finding.UNKNOWN)
        except Exception as error:  # the station must not end because it could not check a device
            log.exception("an answer could not be verified")
            self._tell_once(f"{type(error).__name__}: {error}")
            return Verdict(Finding.UNKNOWN)
        return Verdict(Finding.LIE if differs(given, right) else Finding.RIGHT, right)

    def _tell_once(self, line: str) -> None:
        if line not in self._told and len(self._told) < 100:
            self._told.add(line)
            log.error("an answer could not be verified: %s", line)
