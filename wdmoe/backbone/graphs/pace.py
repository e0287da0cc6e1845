"""How many tokens of prompts a pass may take beside those of answers, by what passes took. No I/O, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

LATELY = 9  # passes whose median is the usual one: whatever held up one of them is not usual
TOGETHER = 3  # passes with a prompt that are judged together, by their median for the same reason
USED = 0.55  # of what a stream may be delayed by: passes vary, and HTTP comes on top
FIRST_TOKENS = 8  # beside streams, before anything was measured
LITTLE = 0.5  # of what is used: then the next passes take a quarter more, else one token more


class Pace:
    """A pass with tokens of prompts may take twice as long as one without: then no stream stutters.

    What so many tokens add is no line: the first of them needs more experts, and each further one less than that.
    """

    def __init__(self, most: int) -> None:
        """`most`: tokens of prompts in a pass, whatever was measured."""
        self._most = most
        self._steps_s: dict[int, deque[float]] = {}  # by rows: of passes without a prompt
        self._room = min(FIRST_TOKENS, most)
        self._took: list[float] = []  # by passes with that much of a prompt: what it added, over what it may add

    def room(self, rows: int) -> int:
        """How many tokens of prompts may go with so many answers' tokens."""
        return self._room if rows else self._most

    def took(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """Of a pass with so many answers' and prompts' tokens."""
        if not prompt_tokens:
            self._steps_s.setdefault(rows, deque(maxlen=LATELY)).append(seconds)
        elif rows and (usual_s := self._usual_s(rows)):
            added = max(seconds - usual_s, 0.0) / (USED * usual_s)
            if prompt_tokens == self._room or added > 1:  # the last piece of a prompt says nothing of larger ones
                self._took.append(added)
        if len(self._took) == TOGETHER:
            self._room = self._next(median(self._took))
            self._took.clear()

    def _next(self, added: float) -> int:
        room = self._room
        if added > 1:
            return max(min(int(room / added), room - 1), 1)
        return min(room + (max(room // 4, 1) if added < LITTLE else 1), self._most)

    def _usual_s(self, rows: int) -> float:
        """Of a pass of so many rows, or of the most similar one that was seen; 0: none was."""
        nearest = min(self._steps_s, key=lambda seen: abs(seen - rows), default=None)
        return 0.0 if nearest is None else median(self._steps_s[nearest])


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
