"""How many orders may be doubled: a share of all that are sent, saved up for bad moments.

Where everything is slow, every answer looks late; doubling all of them would make it worse. So hedges are paid from an
account that each ordinary order fills by a little.
"""

from __future__ import annotations

SHARE = 0.04  # of the orders, in the long run
MOST = 20.0  # hedges that may be saved up, and that there are at the start: some for each device that is slow at first


class HedgeBudget:
    """A token bucket. Used by the model thread only."""

    def __init__(self) -> None:
        self._left = MOST

    def earn(self, orders: int) -> None:
        """So many ordinary orders are sent."""
        self._left = min(self._left + SHARE * orders, MOST)

    def spend(self, orders: int) -> bool:
        """Whether so many orders may go to holders of copies now; if so, they are paid for."""
        if self._left < orders:
            return False
        self._left -= orders
        return True
