"""What was refused, counted in full and logged sparingly: a hostile peer must not fill the disk either."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping

_LOG_INTERVAL_S = 1.0
_MOST_PEERS = 1024


class Refusals:
    """Counts refusals by kind, and logs one line per peer and second at most. Thread-safe."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._spoke_at: dict[str, float] = {}
        self._silent: Counter[str] = Counter()

    @property
    def counters(self) -> Mapping[str, int]:
        """Refusals so far, by kind. A copy."""
        with self._lock:
            return dict(self._counts)

    def note(self, kind: str, peer: str, text: str) -> bool:
        """Count one refusal and perhaps log it.

        Args:
            kind: counter to raise.
            peer: fingerprint, with the address where it is known.
            text: one line, what was wrong.
        Returns:
            Whether it was logged: the caller may then also answer the peer, at the same low rate.
        """
        now = time.monotonic()
        with self._lock:
            self._counts[kind] += 1
            if now - self._spoke_at.get(peer, -_LOG_INTERVAL_S) < _LOG_INTERVAL_S:
                self._silent[peer] += 1
                return False
            if len(self._spoke_at) >= _MOST_PEERS:  # peers are invented faster than lines are read
                self._spoke_at.clear()
                self._silent.clear()
            self._spoke_at[peer] = now
            silent = self._silent.pop(peer, 0)
        more = f" ({silent} more since the last line)" if silent else ""
        self._logger.warning("refused %s: %s%s", peer, text, more)
        return True
