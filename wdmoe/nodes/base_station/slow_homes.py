"""Decides which devices are too slow to be home to what others hold as well, and when they are tried again. No I/O.

The data plane works around a slow device at once; this makes it lasting. The slow device and the holder of the copies
change places in the routing table, so no bytes move. After a term it gets one layer back. If its pace is good then, it
gets all; if not, the next term is twice as long. So a device that is slow now and then does not flap.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from wdmoe.records import ExpertId

LOOK_EVERY_S = 1.0
TOO_SLOW = 4.0  # times the pace of the others
GOOD = 2.0  # times the pace of the others, at most: who is between the two stays where it is
LEAST_S = 0.01  # of a token: a pace below this is never slow, whatever the others do
SLOW_LOOKS = 2.0  # in a row, before its homes move
STALE_LOOK = 0.5  # counts for so much: the same pace again, since nobody asks a device that is slow
TRIAL_LOOKS = 10  # with new answers, before a trial has failed: the pace is a running mean, which takes its time
FIRST_TERM_S = 15.0
LONGEST_TERM_S = 600.0
STEADY_S = 120.0  # who was good for so long starts with the first term again
NO_LAYER = -1

HOME, AWAY, TRIAL = "home", "away", "trial"


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one device: where it is, since when, and how long the next term is that it has to leave for."""

    state: str = HOME
    since_s: float = -math.inf
    term_s: float = FIRST_TERM_S
    pace_s: float | None = None  # at the last look: the same pace again says that no answer came meanwhile
    looks: float = 0.0  # that said "slow" (at home), or that said anything (on trial)


def next_standings(
    standings: Mapping[str, Standing], paces: Mapping[str, float | None], now_s: float
) -> dict[str, Standing]:
    """What becomes of every device.

    Args:
        standings: device_id -> as this returned them last; who is missing begins at home.
        paces: device_id -> seconds that a token takes there, None where that was not measured; all live devices.
        now_s: a clock that never goes back.
    """
    lags = _lags(paces)
    return {
        device_id: replace(_next(standings.get(device_id, Standing()), pace, lags[device_id], now_s), pace_s=pace)
        for device_id, pace in paces.items()
    }


def away_from(standings: Mapping[str, Standing], targets: Mapping[ExpertId, str]) -> dict[str, int]:
    """device_id of each device that is not home to anything for the time being -> the layer that it is tried with.

    `NO_LAYER` where there is none. `targets`: expert -> home by placement.
    """
    away = {device_id: NO_LAYER for device_id, each in standings.items() if each.state != HOME}
    for expert in sorted(targets, reverse=True):
        if (home := targets[expert]) in away and standings[home].state == TRIAL:
            away[home] = expert.layer
    return away


def _lags(paces: Mapping[str, float | None]) -> dict[str, float | None]:
    """Each device's pace against the median of the others'; None where nothing is known."""
    known = {device_id: pace for device_id, pace in paces.items() if pace is not None}
    lags: dict[str, float | None] = dict.fromkeys(paces)
    for device_id, pace in known.items():
        others = [other for name, other in known.items() if name != device_id]
        if others:
            lags[device_id] = pace / max(statistics.median(others), LEAST_S / TOO_SLOW)
    return lags


def _next(now: Standing, pace: float | None, lag: float | None, now_s: float) -> Standing:
    if now.state == AWAY:
        return now if now_s - now.since_s < now.term_s else Standing(TRIAL, now_s, now.term_s)
    stale = pace == now.pace_s
    if lag is None or (stale and not now.looks):
        return now
    longer_s = min(2 * now.term_s, LONGEST_TERM_S)
    if now.state == TRIAL:
        if stale:
            return now
        if lag <= GOOD:
            return Standing(HOME, now_s, longer_s)
        looks = now.looks + 1
        return replace(now, looks=looks) if looks < TRIAL_LOOKS else Standing(AWAY, now_s, longer_s)
    if lag < TOO_SLOW:
        return replace(now, looks=0.0, term_s=FIRST_TERM_S if now_s - now.since_s > STEADY_S else now.term_s)
    looks = now.looks + (STALE_LOOK if stale else 1)
    return replace(now, looks=looks) if looks < SLOW_LOOKS else Standing(AWAY, now_s, now.term_s)
