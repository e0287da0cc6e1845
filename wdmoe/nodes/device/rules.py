"""What a device decides, without I/O: what to load and unload, how much fits, when to try again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from wdmoe.errors import ProtocolError
from wdmoe.records import ExpertId
from wdmoe.transport.codec.messages import Place

FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 2.0
LONGEST_RETRY_REFUSED_S = 10.0


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
        failures: in a row, at least 1.
        refused: the last one was a refusal, which seldom passes by itself.
        chance: where the jitter comes from.
    """
    longest_s = LONGEST_RETRY_REFUSED_S if refused else LONGEST_RETRY_S
    return chance.uniform(0, min(longest_s, FIRST_RETRY_S * 2.0 ** min(failures, 16)))
