"""Keys and values of active requests: a row each, in slabs of rows that attention can take together.

A row has room for so many tokens from the start. What was never written takes no memory: the system gives pages as they
are first touched, and takes a slab's back with its last row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wdmoe.arrays import Float32Array
from wdmoe.backbone.graphs.writing.plan import StationPlan

SLAB_ROWS = 8  # attention over more rows at once is no faster by row
LEAST_TOKENS = 256  # of a row's room, which is a power of two times this


class Slab:
    """Some rows of one size. `keys` and `values` by layer: (rows, heads, capacity, head_size)."""

    def __init__(self, plan: StationPlan, capacity: int) -> None:
        self.capacity = capacity
        self.token_bytes = token_bytes(plan)
        shapes = [(SLAB_ROWS, each.attention.kv_heads, capacity, each.attention.head_size) for each in plan.layers]
        self.keys: Sequence[Float32Array] = [np.zeros(shape, np.float32) for shape in shapes]
        self.values: Sequence[Float32Array] = [np.zeros(shape, np.float32) for shape in shapes]
        self.free = list(range(SLAB_ROWS))  # ascending

    @property
    def empty(self) -> bool:
        """No row is used."""
        return len(self.free) == SLAB_ROWS


@dataclass(frozen=True, slots=True, eq=False)
class Former:
    """What a request left: keys and values by layer, (heads, tokens, head_size)."""

    keys: Sequence[Float32Array]
    values: Sequence[Float32Array]

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return sum(array.nbytes for array in (*self.keys, *self.values))


@dataclass(slots=True, eq=False)
class Row:
    """Of one request. `seen`: so many of its tokens are in it."""

    slab: Slab
    index: int
    seen: int = 0

    @property
    def seen_bytes(self) -> int:
        """Of what is in it."""
        return self.seen * self.slab.token_bytes

    def take(self, former: Former, tokens: int) -> None:
        """Begin with the first tokens of another request of this model."""
        for own, other in ((self.slab.keys, former.keys), (self.slab.values, former.values)):
            for its, given in zip(own, other, strict=True):
                its[self.index, :, :tokens] = given[:, :tokens]
        self.seen = tokens

    def copy(self) -> Former:
        """What is in it."""
        keys, values = (
            [array[self.index, :, : self.seen].copy() for array in arrays]
            for arrays in (self.slab.keys, self.slab.values)
        )
        return Former(keys, values)


class Rows:
    """Gives rows out. One thread uses it."""

    def __init__(self, plan: StationPlan, dropped: Callable[[Slab], None] = lambda slab: None) -> None:
        """`dropped`: told of a slab that has no row any more; whoever keeps anything of it lets go."""
        self._plan = plan
        self._dropped = dropped
        self._slabs: list[Slab] = []

    def size_bytes(self, tokens: int) -> int:
        """The most that a row for so many tokens takes."""
        return token_bytes(self._plan) * capacity(tokens)

    @property
    def slabs(self) -> int:
        """That there are now."""
        return len(self._slabs)

    def enter(self, tokens: int) -> Row:
        """A row for a request of so many tokens in all. Low ones first, so that used ones are neighbours."""
        size = capacity(tokens)
        slab = next((each for each in self._slabs if each.capacity == size and each.free), None)
        if slab is None:
            slab = Slab(self._plan, size)
            self._slabs.append(slab)
        return Row(slab, slab.free.pop(0))

    def leave(self, row: Row) -> None:
        """Its request is over."""
        slab = row.slab
        slab.free = sorted((*slab.free, row.index))
        if slab.empty:
            self._slabs.remove(slab)
            self._dropped(slab)


def token_bytes(plan: StationPlan) -> int:
    """Of one token's keys and values."""
    return sum(2 * 4 * each.attention.kv_heads * each.attention.head_size for each in plan.layers)


def capacity(tokens: int) -> int:
    """Room for so many."""
    return LEAST_TOKENS << max((tokens - 1) // LEAST_TOKENS, 0).bit_length()
