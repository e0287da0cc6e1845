"""How long join tokens live yet. Their end is a time of day, but a step of the clock neither ends nor revives one."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

MOST_REMEMBERED = 4096


class TokenLives:
    """Remembers when each token ends on the clock that never steps, from the first time it was seen alive."""

    def __init__(self) -> None:
        self._ends: dict[str, tuple[float, float]] = {}  # key -> (expires_unix, end on the boot clock)

    def left_s(self, key: str, token: Mapping[str, Any]) -> float:
        """Seconds until a token ends, 0 or less when it has.

        One that looks dead is looked at anew each time: the clock of a board without a battery may be years off until
        the network has set it. While it is, a token lives no longer than it was made for.
        """
        expires_unix = number(token, "expires_unix")
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        remembered = self._ends.get(key)
        if remembered is not None and remembered[0] == expires_unix:
            return remembered[1] - now_s
        left_s = expires_unix - time.time()
        if "created_unix" in token:
            left_s = min(left_s, expires_unix - number(token, "created_unix"))
        if left_s > 0:
            if len(self._ends) >= MOST_REMEMBERED:
                self._ends.clear()
            self._ends[key] = (expires_unix, now_s + left_s)
        return left_s


def number(record: Mapping[str, Any], name: str, default: float = 0.0) -> float:
    """A number of a record, or `default` where there is none. 0 for what is not one, or not finite."""
    value = record.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else 0.0
