"""What a model asks of one MoE layer: the record that travels from the model through selection to the devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

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

    @property
    def cancelled(self) -> bool:
        """It went away."""
        ...

    def tell_waiting(self, longest_s: float) -> None:
        """Say that the answer waits for experts, for so many more seconds at most. Thread-safe."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One MoE layer for some tokens of one request."""

    layer: int  # decoder layer index
    tokens: AnyArray  # (tokens, hidden) float32, C-contiguous
    demand: Demand
    ledger: Ledger  # the request's account
    meanwhile: Callable[[], object] | None = None  # what the base station can do while the devices compute
    client: Client | None = None  # None: nobody to tell, as in an evaluation

    def of(self, rows: npt.NDArray[np.integer[Any]]) -> LayerCall:
        """For some of the tokens, once more: there is nothing left to do meanwhile."""
        return replace(self, tokens=self.tokens[rows], demand=self.demand.of(rows), meanwhile=None)
