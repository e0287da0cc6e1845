"""Where the time of a demo goes: one phase after the other, without gaps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Phases:
    """A stopwatch. Phases of the same name add up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = self._since_s = clock()
        self._spent_s: dict[str, float] = {}
        self.first_token_s: float | None = None  # from the start; None: there was none yet

    def end(self, name: str) -> float:
        """The phase that began when the last one ended is over. Returns how long it was, in seconds."""
        now_s = self._clock()
        spent_s, self._since_s = now_s - self._since_s, now_s
        self._spent_s[name] = self._spent_s.get(name, 0.0) + spent_s
        return spent_s

    def add(self, name: str, spent_s: float) -> None:
        """A phase from before the start."""
        self._spent_s[name] = spent_s

    def token(self) -> None:
        """A token is in sight."""
        if self.first_token_s is None:
            self.first_token_s = self._clock() - self._began_s

    @property
    def spent_s(self) -> Mapping[str, float]:
        """Seconds of each phase, in their order."""
        return dict(self._spent_s)

    @property
    def total_s(self) -> float:
        """Of all phases."""
        return sum(self._spent_s.values())
