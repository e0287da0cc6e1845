"""When is an answer late, and which connections are slow? Plain arithmetic on seconds; the clock is an argument.

A device that stopped is silent; one that is slow answers, but too late to be worth the wait. What is too late follows
from what the same work takes elsewhere. So a small board beside a large one is no fault: it is slow where a holder of
copies would be clearly faster, several times in a row. Its experts are then asked of the copies, and every now and then
an order that nobody waits for is its trial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from wdmoe.transport.exchange import Expected

LEAST_S = 0.02  # no answer is late before: a busy machine delays any process so long now and then
DEVIATIONS = 4.0  # above the mean: as far as the usual spread goes
CLEARLY = 2.0  # times what a copy takes at most
LATE_TO_OPEN = 3  # late answers in a row, with some in time between them a few more
GOOD_TO_CLOSE = 3  # trials in time, in a row
FORGIVES = 0.5  # of a late answer, by one in time
FIRST_TRIAL_S = 0.5
NEXT_TRIAL_S = 0.05  # after a good one
LONGEST_TRIAL_S = 30.0
STEADY_S = 60.0  # who is fast for so long starts afresh


@dataclass(slots=True)
class Spread:
    """Running mean and mean deviation of what some work takes, as TCP keeps them of a round trip [Jacobson 1988]."""

    mean_s: float
    deviation_s: float

    @classmethod
    def of_first(cls, seconds: float) -> Spread:
        """All that is known is one time: it may well take twice as long."""
        return cls(seconds, seconds / 2)

    def learn(self, seconds: float) -> None:
        """One more time. A single one far out moves little, several in a row move all: else one hiccup of a copy would
        make every answer look early for a while."""
        error = min(seconds - self.mean_s, max(DEVIATIONS * self.deviation_s, LEAST_S))
        self.mean_s += error / 8
        self.deviation_s += (abs(error) - self.deviation_s) / 4

    @property
    def most_s(self) -> float:
        """The usual spread reaches so far."""
        return self.mean_s + DEVIATIONS * self.deviation_s


@dataclass(slots=True)
class Circuit:
    """Whether a connection counts as slow. It opens and closes only after several answers that say so."""

    is_open: bool = False
    late: float = 0.0
    good: int = 0
    pause_s: float = 0.0  # between trials
    trial_s: float = 0.0  # when the next one may go
    closed_s: float = -math.inf

    def answered(self, late: bool, now_s: float) -> None:
        """An answer that somebody waited for. Of a slow connection, which nobody else could replace, it is a trial."""
        if self.is_open:
            if not late:
                self.tried(late, now_s)
            return
        self.late = self.late + 1 if late else max(self.late - FORGIVES, 0.0)
        if self.late >= LATE_TO_OPEN:
            again = now_s - self.closed_s < STEADY_S
            self.pause_s = min(self.pause_s * 2, LONGEST_TRIAL_S) if again and self.pause_s else FIRST_TRIAL_S
            self.is_open, self.good, self.trial_s = True, 0, now_s + self.pause_s

    def tried(self, late: bool, now_s: float) -> None:
        """A trial came back, or did not."""
        if not self.is_open:
            return
        if late:
            self.good, self.pause_s = 0, min(self.pause_s * 2, LONGEST_TRIAL_S)
            self.trial_s = now_s + self.pause_s
            return
        self.good, self.trial_s = self.good + 1, now_s + NEXT_TRIAL_S
        if self.good >= GOOD_TO_CLOSE:
            self.is_open, self.late, self.closed_s = False, 0.0, now_s


@dataclass(slots=True)
class _Seen:
    spreads: dict[int, Spread] = field(default_factory=dict)  # by the power of two of an order's assignments
    circuits: dict[bool, Circuit] = field(default_factory=dict)  # of answers, and of prompts


class Lateness:
    """What every connection takes for orders of every size, and which are slow. Used by the model thread only."""

    def __init__(self) -> None:
        self._seen: dict[bytes, _Seen] = {}
        self.slow: frozenset[tuple[bytes, bool]] = frozenset()  # (connection, for prompts). Any thread may read it

    def is_slow(self, route: bytes) -> bool:
        """For answers or for prompts. Any thread."""
        slow = self.slow
        return (route, False) in slow or (route, True) in slow

    def learn(self, route: bytes, size: int, seconds: float) -> None:
        """An order of so many assignments took so long, beside a shared band's air."""
        spreads, power = self._of(route).spreads, size.bit_length()
        spread = spreads.get(power)
        if spread is None:
            spreads[power] = Spread.of_first(seconds)
        else:
            spread.learn(seconds)

    def expect(
        self, route: bytes, copy: bytes, size: int, *, owed_s: float, air_s: float, prompt: bool, unknown_s: float
    ) -> Expected:
        """When the answer to an order should come.

        Args:
            route: who gets it.
            copy: who else could. If that was never measured or is slow itself, what the others take stands for it;
                `route` itself: nobody else is asked.
            size: assignments in it.
            owed_s: what its device has to do before, see `Exchange.owed_s`.
            air_s: what it takes in a shared band.
            prompt: as in `Expected`.
            unknown_s: when to ask the copy if nothing at all was measured.
        """
        own, other = self._spread(route, size), self._of_copy(route, copy, size, prompt)
        before_s = owed_s + air_s
        late_s = math.inf if other is None else before_s + max(CLEARLY * other.most_s, LEAST_S)
        copy_s = unknown_s if own is None else before_s + max(own.most_s, LEAST_S)
        usual = other or own
        usual_s = 0.0 if usual is None else usual.mean_s
        return Expected(usual_s=usual_s, copy_s=min(copy_s, late_s), late_s=late_s, air_s=air_s, prompt=prompt)

    def answered(self, route: bytes, expected: Expected, seconds: float, now_s: float) -> None:
        """Somebody waited for this order, and it took at least so long."""
        if expected.late_s == math.inf:
            return
        late, circuit = seconds > expected.late_s, self._circuit(route, expected.prompt)
        if late or circuit.late or circuit.is_open:  # else there is nothing to note, as nearly always
            circuit.answered(late, now_s)
            self._noted(route, expected.prompt, circuit)

    def tried(self, route: bytes, expected: Expected, seconds: float, now_s: float) -> None:
        """A trial took at least so long; infinity: it failed."""
        circuit = self._circuit(route, expected.prompt)
        circuit.tried(seconds > expected.late_s, now_s)
        self._noted(route, expected.prompt, circuit)

    def trial_due(self, route: bytes, prompt: bool, now_s: float) -> bool:
        """Whether a slow connection may be tried now; the next trial then has to wait for this one."""
        if (route, prompt) not in self.slow:
            return False
        circuit = self._circuit(route, prompt)
        if circuit.trial_s > now_s:
            return False
        circuit.trial_s = now_s + LONGEST_TRIAL_S
        return True

    def forget_all_but(self, routes: set[bytes]) -> None:
        """Drop connections that are gone."""
        self._seen = {route: seen for route, seen in self._seen.items() if route in routes}
        self.slow = frozenset(each for each in self.slow if each[0] in routes)

    def _of(self, route: bytes) -> _Seen:
        seen = self._seen.get(route)
        if seen is None:
            seen = self._seen[route] = _Seen()
        return seen

    def _circuit(self, route: bytes, prompt: bool) -> Circuit:
        circuits = self._of(route).circuits
        circuit = circuits.get(prompt)
        if circuit is None:
            circuit = circuits[prompt] = Circuit()
        return circuit

    def _noted(self, route: bytes, prompt: bool, circuit: Circuit) -> None:
        was_open = (route, prompt) in self.slow
        if circuit.is_open != was_open:
            self.slow ^= {(route, prompt)}
        if was_open and not circuit.is_open:
            # What it took while it was slow says nothing of it now, nor of what others should take.
            self._of(route).spreads.clear()

    def _of_copy(self, route: bytes, copy: bytes, size: int, prompt: bool) -> Spread | None:
        """What an order should take elsewhere."""
        if (copy, prompt) in self.slow:
            return self._typical(route, size)
        return None if copy == route else self._spread(copy, size) or self._typical(route, size)

    def _spread(self, route: bytes, size: int) -> Spread | None:
        """Of orders of this size; else of the next larger ones, or of the next smaller ones in proportion."""
        seen, wanted = self._seen.get(route), size.bit_length()
        if seen is None or not seen.spreads:
            return None
        spread = seen.spreads.get(wanted)
        if spread is not None:
            return spread
        larger = [known for known in seen.spreads if known > wanted]
        if larger:
            return seen.spreads[min(larger)]
        nearest = max(seen.spreads)
        known, times = seen.spreads[nearest], 2.0 ** (wanted - nearest)
        return Spread(known.mean_s * times, known.deviation_s * times)

    def _typical(self, but: bytes, size: int) -> Spread | None:
        """The one in the middle of all connections but one, and but the slow ones where there are others."""
        others = [route for route in self._seen if route != but]
        well = [route for route in others if not self.is_slow(route)]
        spreads = [spread for route in well or others if (spread := self._spread(route, size))]
        return sorted(spreads, key=lambda spread: spread.most_s)[len(spreads) // 2] if spreads else None
