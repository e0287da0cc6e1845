"""Last step of a layer: the sum over the devices that answered, and how much of the gate weight that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.solver import combining
from wdmoe.transport.codec.messages import Activations


class Answer(NamedTuple):
    """One device's partial sums."""

    partial: Activations  # (n, hidden)
    token_rows: Int32Array  # (n,) the layer's tokens they belong to


class Share(NamedTuple):
    """The gate weights of one device's answer."""

    token_rows: Int32Array  # (n,) the layer's tokens in the order
    rows: Int32Array  # (assignments,) into token_rows
    weights: Float32Array  # (assignments,) gate weights


def arrived_weight(tokens: int, shares: Sequence[Share]) -> Float32Array:
    """(tokens,) gate weight that came, summed over experts."""
    arrived = np.zeros(tokens, np.float32)
    for share in shares:
        np.add.at(arrived, share.token_rows[share.rows], share.weights)
    return arrived


def combine(tokens: int, hidden: int, answers: Sequence[Answer], scale: Float32Array | None = None) -> Float32Array:
    """Sum the partial sums, in a fixed order so that equal replies give equal results.

    Args:
        tokens: of the layer.
        hidden: width.
        answers: by device.
        scale: (tokens,) factor for models that renormalise over the experts that answered; None: 1.
    Returns:
        (tokens, hidden) float32; rows without any answer are 0.
    """
    if scale is None and len(answers) == 1 and len(answers[0].token_rows) == tokens:
        return np.array(answers[0].partial, np.float32)  # a copy: the message's memory is not ours to hand on
    return combining.combine(tokens, hidden, answers, scale)
