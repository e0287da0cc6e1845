"""When to start another engine: at once, later when the last one ended soon, and never again when many did in a row."""

from __future__ import annotations

SOON_S = 3.0  # of life: too short to be of use
MOST_SOON = 5  # in a row
FIRST_DELAY_S = 0.5  # doubled with each one in a row that ended soon


class Patience:
    """Counts engines that ended soon."""

    def __init__(self) -> None:
        self._soon = 0

    def ended(self, lived_s: float) -> float | None:
        """An engine has ended, so long after it was opened; 0: it never was.

        Returns:
            Seconds to wait before the next one; None: give up.
        """
        self._soon = self._soon + 1 if lived_s < SOON_S else 0
        if self._soon >= MOST_SOON:
            return None
        return FIRST_DELAY_S * 2 ** (self._soon - 1) if self._soon else 0.0
