"""Whether two groups of requests take turns: one computes attention while the experts of the other work. No I/O.

That pays where the wait for devices is long, and costs where it is not, as weights are read once for each group. So it
is tried where passes mostly wait, and stays for a while where it made more tokens a second.
"""

from __future__ import annotations

WINDOW = 24  # passes that are judged together,
SKIPPED = 4  # but for the first of them
WAITS = 0.6  # share of a pass that is spent on devices, from which it is tried
BETTER = 1.05  # times as fast, or one group stays
STAYS = 40  # windows, before it is judged again
LEAST_REQUESTS = 2


class Alternation:
    """Told of each pass; says how many groups there shall be."""

    def __init__(self, allowed: bool = True) -> None:
        self.groups = 1
        self._allowed = allowed
        self._requests = 0
        self._stays = 0  # windows
        self._alone_rate = 0.0  # tokens a second in one group
        self._restart(0.0)

    def took(self, requests: int, tokens: int, away_s: float, took_s: float, now_s: float) -> None:
        """A pass is over.

        Args:
            requests: that are answered now, in all groups.
            tokens: of answers that the pass computed.
            away_s: that it waited for devices.
            took_s: that it took in all.
            now_s: of a clock.
        """
        if requests != self._requests:
            self._requests = requests
            self._changed(now_s)
        self._passes += 1
        if self._passes <= SKIPPED:
            self._since_s = now_s
            return
        self._tokens += tokens
        self._away_s += away_s
        self._took_s += took_s
        if self._passes == WINDOW:
            self._judge(self._tokens / max(now_s - self._since_s, 1e-9), self._away_s / max(self._took_s, 1e-9))
            self._restart(now_s)

    def _changed(self, now_s: float) -> None:
        """What was being measured was of other requests; what was decided holds for a similar number."""
        if self._requests < LEAST_REQUESTS or not self._stays:
            self.groups, self._stays = 1, 0
        self._restart(now_s)

    def _judge(self, rate: float, away: float) -> None:
        if self._stays:
            self._stays -= 1
            if not self._stays:
                self.groups = 1
        elif self.groups == 1:
            self._alone_rate = rate
            if self._allowed and self._requests >= LEAST_REQUESTS and away > WAITS:
                self.groups = 2
        else:
            self._stays = STAYS
            self.groups = 2 if rate > BETTER * self._alone_rate else 1

    def _restart(self, now_s: float) -> None:
        self._passes = self._tokens = 0
        self._away_s = self._took_s = 0.0
        self._since_s = now_s
