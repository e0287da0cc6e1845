"""What dropping experts must save, in answers that are bounded in what they drop: learnt while answering.

Answers pay from an account that fills with every token (`Bound`). Where accounts stay full the price falls, and where
they are empty it rises. So a request spends about what it may, and spends it where that gains most time.
"""

from __future__ import annotations

import math

LEARNING = 0.05  # weight of the newest token in a layer's mean worth
STEP = 0.005  # relative change of the price in a layer, where an account is empty
DAMPING = 1.0  # logarithm of how much dearer it is for an empty account at once: learning alone would swing for ever
FIRST = 2.0  # times what the first layer takes: at most half of it would be dropped


class DropPrice:
    """Of one base station: all layers and requests have the same price. Used by the model thread only."""

    def __init__(self) -> None:
        self._seconds = 0.0  # for what a token's experts of a layer are worth on average; 0: not known yet
        self._mean: dict[int, float] = {}

    def mean_worth(self, layer: int) -> float:
        """Of a token's experts in this layer; 0 where none was seen."""
        return self._mean.get(layer, 0.0)

    def seconds(self, unspent: float, allowance: float) -> float:
        """That dropping a mean token's worth must save; 0 while nothing is known.

        Args:
            unspent: what the request's account holds.
            allowance: what a token adds to it, over all layers.
        """
        return self._seconds * math.exp(DAMPING * _lack(unspent, allowance))

    def saw(self, layer: int, worth: float, tokens: int) -> None:
        """A pass brought so many tokens, whose experts are worth so much in all."""
        mean, weight = self._mean.get(layer), 1 - (1 - LEARNING) ** tokens
        self._mean[layer] = worth / tokens if mean is None else mean + weight * (worth / tokens - mean)

    def spent(self, unspent: float, allowance: float, layer_s: float) -> None:
        """A layer of an answer was decided.

        Args:
            unspent: what the request's account holds now.
            allowance: as in `seconds`.
            layer_s: what the layer takes, to begin with.
        """
        self._seconds = (self._seconds or FIRST * layer_s) * math.exp(STEP * _lack(unspent, allowance))


def _lack(unspent: float, allowance: float) -> float:
    """1 for an empty account, 0 for one with a token's allowance, -1 for one with two or more."""
    return max(1 - unspent / allowance, -1.0)
