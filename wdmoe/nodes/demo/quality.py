"""What a run's decisions cost in quality: perplexity of held-out text, read by the same stations under the same rules.

Each token of the text is decided on alone, as a token of an answer is, and no emulated link waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from wdmoe.nodes.local.cluster import WindowReading

WINDOWS = 8
WINDOW_TOKENS = 65  # of which the first has no likelihood: 64 of each count
_STUDENT_T = 2.365  # half width of a 95 % interval in standard errors, of 8 windows

Reading = tuple[WindowReading, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A perplexity over another one on the same windows, with its 95 % interval over windows."""

    ratio: float
    low: float
    high: float
    tokens: int


def read_all(read: Callable[[int, int], WindowReading], tell: Callable[[int, int], None]) -> Reading:
    """All windows.

    Args:
        read: reads one window of so many tokens.
        tell: told windows done, and in all.
    """
    windows = []
    for number in range(WINDOWS):
        tell(number, WINDOWS)
        windows.append(read(number, WINDOW_TOKENS))
    return tuple(windows)


def perplexity(reading: Reading) -> float:
    """Of all tokens."""
    return math.exp(sum(each.nats for each in reading) / tokens(reading))


def tokens(reading: Reading) -> int:
    """That have a likelihood."""
    return sum(each.tokens for each in reading)


def compare(reading: Reading, plain: Reading) -> Change:
    """Window by window: the text is the same, so the interval is much narrower than that of either perplexity."""
    nats = [one.nats / one.tokens - other.nats / other.tokens for one, other in zip(reading, plain, strict=True)]
    mean, half = fmean(nats), _half_width(nats)
    return Change(ratio=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half), tokens=tokens(reading))


def _half_width(values: Sequence[float]) -> float:
    return _STUDENT_T * stdev(values) / math.sqrt(len(values))
