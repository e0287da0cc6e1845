"""What a policy ranks assignments by, from a gate's scores: how much an expert matters to a token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.solver import _native


def rank_weights(
    scores: npt.NDArray[np.floating],
    experts: npt.NDArray[np.integer],
    temperature: float = 1.0,
    rank: str = "probability",
) -> FloatArray:
    """Weights of the chosen assignments, >= 0.

    "probability": the softmax of the scores over the temperature, as gates are usually read. It says how a token's
    output is split among experts, and counts every token alike. "energy": the square of the score, for routers that
    predict the norm of an expert's output, as those of `wdmoe-node split` do; it also says which tokens need their
    experts at all [D].

    Args:
        scores: (..., tokens, experts) before any softmax.
        experts: (..., tokens, top_k), -1 where there is none.
        temperature: > 0; for probabilities only.
        rank: one of `wdmoe.config.RANKS`.
    Returns:
        (..., tokens, top_k), 0 where there is no expert.
    """
    given = _native.floats("scores", scores)
    if rank == "energy":
        weights = np.maximum(given, 0.0) ** 2
    else:
        weights = np.exp((given - given.max(axis=-1, keepdims=True)) / temperature)
        weights /= weights.sum(axis=-1, keepdims=True)
    _native.regular("experts", experts)
    picked = np.take_along_axis(weights, np.maximum(experts, 0).astype(np.int64), axis=-1)
    return np.where(experts >= 0, picked, 0.0)
