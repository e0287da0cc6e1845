"""What a model asks of one MoE layer: the record that travels from the model through selection to the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import AnyArray, Float32Array, Int32Array
from wdmoe.receipt import Ledger


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What the model's own gate asks for in one layer."""

    experts: Int32Array  # (tokens, top_k), -1 where the family's routing leaves a slot empty
    weights: Float32Array  # (tokens, top_k), 0 where empty
    gate: AnyArray | None  # (tokens, experts) router scores, for policies and substitutes; None where unknown

    def of(self, rows: npt.NDArray[np.integer[Any]]) -> Demand:
        """For some of the tokens."""
        return Demand(self.experts[rows], self.weights[rows], None if self.gate is None else self.gate[rows])


class Client(Protocol):
    """Whoever waits for the answer."""

    def tell_waiting(self, longest_s: float) -> None:
        """Say that the answer waits for experts, for so many more seconds at most. Thread-safe."""
        ...


class Caller(NamedTuple):
    """A request: its account, and whoever waits for it. client None: nobody, as in an evaluation."""

    ledger: Ledger
    client: Client | None = None


class Callers:
    """The requests that some tokens are of, in the order of the tokens."""

    def __init__(self, each: Sequence[Caller], sizes: Sequence[int]) -> None:
        """`sizes`: how many tokens, at least one, are of each."""
        self.each = tuple(each)
        self.sizes = tuple(sizes)
        self._ends = tuple(accumulate(sizes))

    def parts(self) -> Iterator[tuple[Caller, slice]]:
        """Each with its tokens."""
        return zip(self.each, map(slice, (0, *self._ends), self._ends), strict=False)

    def among(self, rows: npt.NDArray[np.integer[Any]]) -> Sequence[tuple[Caller, int]]:
        """Those of whom some of these tokens are, with how many. rows: ascending, at least one."""
        if len(self.each) == 1:
            return ((self.each[0], len(rows)),)
        counts = np.diff(np.searchsorted(rows, self._ends), prepend=0).tolist()
        return [(caller, count) for caller, count in zip(self.each, counts, strict=True) if count]

    def of(self, rows: npt.NDArray[np.integer[Any]]) -> Callers:
        """Of these tokens. rows: as for `among`."""
        found = self.among(rows)
        return Callers([caller for caller, _ in found], [count for _, count in found])


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One MoE layer for some tokens of one request or of several."""

    layer: int  # decoder layer index
    tokens: AnyArray  # (tokens, hidden) float32, C-contiguous
    demand: Demand
    callers: Callers
    meanwhile: Callable[[], object] | None = None  # what the base station can do while the devices compute
    more: bool = False  # another layer follows at once: what need not be booked before it may be booked in it

    def of(self, rows: npt.NDArray[np.integer[Any]]) -> LayerCall:
        """For some of the tokens, ascending, once more: there is nothing left to do meanwhile."""
        return LayerCall(self.layer, self.tokens[rows], self.demand.of(rows), self.callers.of(rows))
