"""Between which norms an honest answer lies, for each expert: from the bundle, and widened by what was seen.

An answer outside is odd, which is a reason to look and no proof: the first token of a text has activations unlike all
others in many models.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from wdmoe.arrays import Float32Array, FloatArray
from wdmoe.records import ExpertId
from wdmoe.solver.combining import odd_row
from wdmoe.transport.codec.messages import Activations
from wdmoe.transport.exchange import Order

# How far outside the export's probes a real token may be before it is odd; docs/bundle.md has what was measured.
ABOVE = 8.0
BELOW = 1 / 256
LEAST_SHARE = 0.5  # of what a sum of outputs would measure if they were orthogonal; 0.83 was the least that was seen
TINY = 1e-30  # without bounds only an answer of zeros is odd


class Oddity(IntEnum):
    """Why a row of an answer is odd; the numbers of `odd_row`."""

    NONE = 0
    NOT_FINITE = 1
    TOO_SMALL = 2
    TOO_LARGE = 3


_ODDITIES = tuple(Oddity)  # by number: a look-up takes a tenth of the time of `Oddity(number)`

Bounds = Mapping[ExpertId, tuple[float, float]]  # least and largest norm of an expert's outputs in the export's probes


class NormBand:
    """The bands of all experts of a model."""

    def __init__(self, experts_per_layer: Mapping[int, int], bounds: Bounds) -> None:
        """An expert without bounds may have any norm but 0."""
        self._low: dict[int, FloatArray] = {}
        self._high: dict[int, FloatArray] = {}
        for layer, count in experts_per_layer.items():
            of_layer = [bounds.get(ExpertId(layer, expert)) for expert in range(count)]
            self._low[layer] = np.array([TINY if each is None else max(BELOW * each[0], TINY) for each in of_layer])
            self._high[layer] = np.array([np.inf if each is None else ABOVE * each[1] for each in of_layer])

    def oddity(self, order: Order, partial: Activations) -> tuple[Oddity, int]:
        """What is odd about an answer, and in which of its rows."""
        low, high = self._low[order.layer], self._high[order.layer]
        kind, row = odd_row(partial, order.experts, order.counts, order.rows, order.weights, low, high, LEAST_SHARE)
        return _ODDITIES[kind], row

    def widen(self, layer: int, norms: Mapping[int, Float32Array], factor: float) -> None:
        """Take in the norms of outputs that the station computed itself.

        Args:
            norms: expert -> (tokens,)
            factor: of the odd answer's norm over what these would have given: outputs may cancel each other.
        """
        low, high = self._low[layer], self._high[layer]
        for expert, seen in norms.items():
            low[expert] = min(low[expert], 0.9 * factor * float(seen.min()))
            high[expert] = max(high[expert], 1.1 * float(seen.max()))
