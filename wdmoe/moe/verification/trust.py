"""How far a device is trusted, decided without I/O: which of its answers are computed again, and what a lie costs it.

Only a second computation tells a plausible lie from an answer. So new devices are looked at closely, trusted ones now
and then at random, and one that lied always. A single lie may be a flipped bit in somebody's memory; two within `WATCH`
answers are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PROBATION = 16  # first answers of a connection, each of which is computed again before it counts
WATCH = 1000  # answers after a lie, each of which is computed again before it counts
LIES_TO_QUARANTINE = 2  # within WATCH answers


class Look(Enum):
    """What happens to an answer."""

    TAKE = "take"  # it counts
    LATER = "later"  # it counts, and is computed again meanwhile
    NOW = "now"  # it is computed again, and counts if it was right


@dataclass(frozen=True, slots=True)
class Standing:
    """What a device is known for, whatever connection it comes over."""

    lies: int = 0  # in all
    last_lie: int = 0  # number of the answer at which the last one was found
    strikes: int = 0  # lies since it was last trusted
    quarantined: bool = False

    def watched(self, answers: int) -> bool:
        """Whether it lied within the last WATCH of its `answers` answers."""
        return self.strikes > 0 and answers - self.last_lie < WATCH

    def lied(self, answers: int) -> Standing:
        """After a lie was found when the device had given `answers` answers."""
        strikes = self.strikes + 1 if self.watched(answers) else 1
        return Standing(self.lies + 1, answers, strikes, self.quarantined or strikes >= LIES_TO_QUARANTINE)


def share(rate: float, answers: int) -> float:
    """The share of a device's answers that is computed again: all at first, `rate` once it has earned that.

    Args:
        rate: 0 to 1; 0 looks at none, not even of a new device.
        answers: that this connection gave before.
    """
    if rate <= 0 or answers < PROBATION:
        return 1.0 if rate > 0 else 0.0
    return max(rate, PROBATION / answers)


def look(rate: float, answers: int, *, doubtful: bool, draw: float) -> Look:
    """What happens to the next answer of a connection.

    Args:
        rate, answers: see `share`.
        doubtful: the answer is odd, or the device lied lately.
        draw: uniform in [0, 1), which the device cannot foresee.
    """
    if doubtful:
        return Look.NOW
    if answers < PROBATION and rate > 0:
        return Look.NOW
    return Look.LATER if draw < share(rate, answers) else Look.TAKE
