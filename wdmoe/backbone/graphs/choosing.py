"""The next token from its scores. The noise of each place in an answer follows from the seed and that place alone, so
that an answer is the same whatever runs beside it, and goes on from any of its tokens."""

from __future__ import annotations

import secrets

import numpy as np

from wdmoe.arrays import Float32Array
from wdmoe.errors import NotFiniteError
from wdmoe.records import Sampling


class Chooser:
    """Chooses the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % (1 << 64)

    def choose(self, scores: Float32Array, place: int) -> int:
        """The token at `place` of the answer, from 0.

        Raises:
            NotFiniteError: the best score is not a number; whatever was chosen would be garbage.
        """
        best = int(scores.argmax())  # NaN is the largest of whatever it stands among
        if not np.isfinite(scores[best]):
            raise NotFiniteError("the model's scores for the next token are not finite; the answer ends here")
        if self._sampling.temperature <= 0:
            return best
        scaled = scores.astype(np.float64) / self._sampling.temperature
        if self._sampling.top_p < 1:
            scaled = _nucleus(scaled, self._sampling.top_p)
        # Gumbel-max: the largest of the noisy scores is a sample of their softmax [Maddison et al., NeurIPS 2014].
        uniform = np.random.Generator(np.random.Philox(key=[self._seed, place])).random(len(scaled))
        noise = -np.log(-np.log(np.clip(uniform, 1e-300, 1 - 1e-16)))
        return int((scaled + noise).argmax())


def _nucleus(scores: np.ndarray, share: float) -> np.ndarray:
    """The fewest best tokens that have so much probability together; the others can't be chosen [Holtzman 2020]."""
    order = np.argsort(scores, kind="stable")[::-1]
    weights = np.exp(scores[order] - scores[order[0]])
    before = np.cumsum(weights) - weights
    kept = order[before < share * weights.sum()]
    out = np.full_like(scores, -np.inf)
    out[kept] = scores[kept]
    return out
