"""The next token from its scores. The draw of each place in an answer follows from the seed and that place alone, so
that an answer is the same whatever runs beside it, and goes on from any of its tokens. No torch."""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array, FloatArray
from wdmoe.errors import NotFiniteError
from wdmoe.records import Sampling

SORTED = 128  # tokens, where these are enough


class Chooser:
    """Chooses the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % (1 << 64)

    def choose(self, scores: Float32Array, place: int) -> int:
        """The token at `place` of the answer, from 0.

        Args:
            scores: (vocabulary,).
            place: how many tokens were made before.
        Raises:
            NotFiniteError: the best score is not a number; whatever was chosen would be garbage.
        """
        best = int(scores.argmax())  # NaN is the largest of whatever it stands among
        if not np.isfinite(scores[best]):
            raise NotFiniteError("the model's scores for the next token are not finite; the answer ends here")
        if self._sampling.temperature <= 0:
            return best
        weights = np.exp((scores - scores[best]) / np.float32(self._sampling.temperature)).astype(np.float64)
        if self._sampling.top_p < 1:
            return self._drawn(*_nucleus(weights, self._sampling.top_p), place)
        return self._drawn(weights, None, place)

    def _drawn(self, weights: FloatArray, tokens: npt.NDArray[np.intp] | None, place: int) -> int:
        """One of the tokens, or of all where these are not named, as likely as its share of the weights."""
        sums = weights.cumsum()
        uniform = np.random.Generator(np.random.Philox(key=[self._seed, place])).random()
        at = int(sums.searchsorted(uniform * sums[-1], side="right"))
        return at if tokens is None else int(tokens[at])


def _nucleus(weights: FloatArray, share: float) -> tuple[FloatArray, npt.NDArray[np.intp]]:
    """The fewest best tokens that have so much probability together; the others can't be chosen [Holtzman 2020]."""
    enough = share * weights.sum()
    best = _best(weights, enough)
    order = best[np.lexsort((best, -weights[best]))]
    ordered = weights[order]
    kept = ordered.cumsum() - ordered < enough
    return ordered[kept], order[kept]


def _best(weights: FloatArray, enough: float) -> npt.NDArray[np.intp]:
    """Some of the best that have enough together: to sort a whole vocabulary takes long."""
    for few in (SORTED, SORTED**2):
        if few < len(weights):
            best = weights.argpartition(-few)[-few:]
            if weights[best].sum() > enough:
                return best
    return np.arange(len(weights))
