"""Keys and values of former requests, for later ones that begin with the same tokens: the next turn of a chat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wdmoe.arrays import Int32Array
from wdmoe.backbone.graphs.cache import Former, Row

LEAST_TOKENS = 16  # in common; for fewer a copy is not worth its while


@dataclass(slots=True, eq=False)
class _Kept:
    tokens: Int32Array
    former: Former


class Prefixes:
    """The least recently used go first where there is no more room. One thread uses it."""

    def __init__(self, most_bytes: int) -> None:
        """`most_bytes`: of all that is kept; 0: nothing is."""
        self._most_bytes = most_bytes
        self._kept: list[_Kept] = []  # the most recently used last

    @property
    def size_bytes(self) -> int:
        """Of all that is kept."""
        return sum(each.former.size_bytes for each in self._kept)

    def begin(self, tokens: Int32Array, row: Row) -> int:
        """Fill an empty row with what is known of the tokens, but never of the last one: its scores are wanted.

        Returns:
            How many tokens that were.
        """
        best, longest = None, LEAST_TOKENS - 1
        for each in self._kept:
            common = _common(each.tokens, tokens[:-1])
            if common > longest:
                best, longest = each, common
        if best is None:
            return 0
        row.take(best.former, longest)
        self._kept.remove(best)
        self._kept.append(best)
        return longest

    def forget(self) -> None:
        """Keep nothing of what there is."""
        self._kept.clear()

    def wants(self, row: Row) -> bool:
        """Whether there is room for what is in a row, and it is worth its while."""
        return row.seen >= LEAST_TOKENS and row.seen_bytes <= self._most_bytes

    def keep(self, tokens: Int32Array, former: Former) -> None:
        """What a request left. tokens: those that it has seen."""
        # What begins it is in it.
        self._kept = [each for each in self._kept if _common(each.tokens, tokens) < len(each.tokens)]
        while self._kept and self.size_bytes + former.size_bytes > self._most_bytes:
            del self._kept[0]
        self._kept.append(_Kept(tokens, former))


def _common(one: Int32Array, other: Int32Array) -> int:
    """So many first tokens are the same."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if differ.size else length
