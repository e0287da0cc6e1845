"""What a device decides, without I/O: what to load and unload, how much fits, when to try again."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from wdmoe.errors import ProtocolError
from wdmoe.records import ExpertId
from wdmoe.transport.codec.messages import Place

FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 2.0
LONGEST_RETRY_REFUSED_S = 60.0
MOST_REASONS = 64
TELL_AGAIN_S = 600.0  # what was told once is told again so rarely


@dataclass(frozen=True, slots=True)
class WantedExpert:
    """One expert of a placement."""

    expert: ExpertId
    sha256: str  # hex
    size: int  # bytes of the file


@dataclass(frozen=True, slots=True)
class Changes:
    """How to get from what is loaded to what a placement wants."""

    unload: tuple[ExpertId, ...]
    load: tuple[WantedExpert, ...]
    kept: tuple[ExpertId, ...]
    too_much: tuple[ExpertId, ...]  # doesn't fit into the memory offered


def wanted_experts(place: Place) -> tuple[WantedExpert, ...]:
    """Read a placement in its own order.

    Raises:
        ProtocolError: it names an expert twice.
    """
    ids = [ExpertId(layer, expert) for layer, expert in place.experts.tolist()]
    if len(set(ids)) < len(ids):
        raise ProtocolError("a placement names an expert twice")
    hashes = [row.tobytes().hex() for row in place.sha256]
    return tuple(map(WantedExpert, ids, hashes, place.size.tolist()))


def changes(wanted: tuple[WantedExpert, ...], loaded: Mapping[ExpertId, str], memory_bytes: int) -> Changes:
    """Compare a placement with what is loaded (SHA-256 by expert).

    Experts count with their file's size; the first ones of the placement get the memory.
    """
    load: list[WantedExpert] = []
    kept: list[ExpertId] = []
    too_much: list[ExpertId] = []
    used = 0
    for item in wanted:
        if used + item.size > memory_bytes:
            too_much.append(item.expert)
            continue
        used += item.size
        if loaded.get(item.expert) == item.sha256:
            kept.append(item.expert)
        else:
            load.append(item)
    unload = tuple(sorted(set(loaded).difference(kept)))
    return Changes(unload, tuple(load), tuple(kept), tuple(too_much))


def retry_delay_s(failures: int, refused: bool, chance: random.Random) -> float:
    """Wait before the next try: doubling, capped, with full jitter, so that devices don't return all at once.

    Args:
        failures: in a row and of this sort, at least 1.
        refused: they were refusals, which seldom pass by themselves.
        chance: where the jitter comes from.
    """
    longest_s = LONGEST_RETRY_REFUSED_S if refused else LONGEST_RETRY_S
    return chance.uniform(0, min(longest_s, FIRST_RETRY_S * 2.0 ** min(failures, 16)))


class Retries:
    """Counts what failed since it last went well, and says when to try again and whether to log it."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.failures = 0  # in a row, of any sort
        self._refusals = 0  # in a row: a station that is back after an hour and lost its list is asked again soon
        self._told: dict[str, float] = {}  # reason -> when it was told last

    def succeeded(self) -> None:
        """It went well: start over."""
        self.failures = self._refusals = 0
        self._told.clear()

    def failed(self, reason: str, refused: bool, now_s: float) -> tuple[float, bool]:
        """Wait so many seconds, and whether to tell of it: at first, and of a reason that goes on only rarely."""
        self.failures += 1
        self._refusals = self._refusals + 1 if refused else 0
        count = self._refusals if refused else self.failures
        if len(self._told) >= MOST_REASONS:  # a station that makes up a new one each time
            self._told.clear()
        tell = now_s - self._told.get(reason, -math.inf) >= TELL_AGAIN_S
        if tell:
            self._told[reason] = now_s
        return retry_delay_s(count, refused, self._chance), tell
