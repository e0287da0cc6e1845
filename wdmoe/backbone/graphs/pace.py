"""How many tokens of prompts a pass may take beside those of answers, by what passes took. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence

LEARNT = 0.2  # weight of the newest pass
USED = 0.6  # of what a stream may be delayed by: passes vary, and HTTP comes on top
FIRST_TOKENS = 8  # beside streams, before anything was measured


class Pace:
    """A pass with tokens of prompts may take twice as long as one without: then no stream stutters."""

    def __init__(self, most: int) -> None:
        """`most`: tokens of prompts in a pass, whatever was measured."""
        self._most = most
        self._step_s: dict[int, float] = {}  # by rows: of passes without a prompt
        self._token_s = 0.0  # what each token of a prompt adds

    def room(self, rows: int) -> int:
        """How many tokens of prompts may go with so many answers' tokens."""
        if not rows:
            return self._most
        step_s = self._usual_s(rows)
        if not step_s or not self._token_s:
            return min(FIRST_TOKENS, self._most)
        return max(min(int(USED * step_s / self._token_s), self._most), 1)

    def took(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """Of a pass with so many answers' and prompts' tokens."""
        if not prompt_tokens:
            self._step_s[rows] = _learnt(self._step_s.get(rows, 0.0), seconds)
        elif rows and (usual_s := self._usual_s(rows)):
            self._token_s = _learnt(self._token_s, max(seconds - usual_s, 0.0) / prompt_tokens)
        elif not self._token_s:
            self._token_s = seconds / prompt_tokens

    def _usual_s(self, rows: int) -> float:
        """Of a pass of so many rows, or of the most similar one that was seen; 0: none was."""
        nearest = min(self._step_s, key=lambda seen: abs(seen - rows), default=None)
        return 0.0 if nearest is None else self._step_s[nearest]


def shares(room: int, wanted: Sequence[int]) -> list[int]:
    """Divide tokens among prompts, none more than it wants and none favoured; what does not divide goes to the first.

    Args:
        room: tokens in all.
        wanted: (prompts,) tokens that are left of each.
    """
    given = [0] * len(wanted)
    left, order = room, sorted(range(len(wanted)), key=lambda at: (wanted[at], -at))
    for place, at in enumerate(order):
        others = len(order) - place
        given[at] = min(wanted[at], left // others)
        left -= given[at]
    for at, want in enumerate(wanted):
        more = min(want - given[at], left)
        given[at] += more
        left -= more
    return given


def _learnt(before: float, seen: float) -> float:
    return before + LEARNT * (seen - before) if before else seen
