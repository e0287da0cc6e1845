"""The experts of a bundle, run at the station to find out whether a device's answer is right."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from wdmoe.arrays import Float32Array, FloatArray, Int32Array
from wdmoe.errors import ExpertError
from wdmoe.records import ExpertId
from wdmoe.transport.codec.messages import Activations
from wdmoe.transport.exchange import Order

# Of a row's norm (or of what it would be if the experts' outputs were orthogonal, where that is more). Honest devices
# differ by their arithmetic: 6e-7 in float32, 5e-4 with activations in half precision, 0.014 where int8 weights meet
# 8-bit activations; and a device uses an engine that is off by up to 0.05 (`background_build`). A factor of 1.5 is 0.5.
TOLERANCE = 0.1
NOTHING = 1e-30  # absolute, for outputs that are zero
SESSION_SHARE = 1.6  # memory of a loaded expert over its file's size, measured


class Model(Protocol):
    """As `wdmoe.moe.expert.ExpertModel`."""

    def run(self, tokens: Activations) -> Float32Array:
        """(tokens, hidden) -> (tokens, hidden), overwritten by the next call; raises ExpertError."""
        ...


Read = Callable[[ExpertId], bytes]  # raises WdmoeError where the file is not what the manifest says
Open = Callable[[bytes], Model]  # raises ExpertError


class Sample(NamedTuple):
    """Some rows of an answer, with all that is needed to compute them again.

    Nearly every one is thrown away unused, so it is cheap: of the memory that others may write to, which is the
    layer's tokens, it has a copy, and it works nothing out.
    """

    layer: int
    tokens: Float32Array  # (n, hidden)
    named: Sequence[int] | Int32Array  # experts
    counts: Sequence[int] | int  # pairs of a token and an expert for each of `named`; one number: for all alike
    rows: Int32Array  # (pairs,) into tokens
    weights: Float32Array  # (pairs,)
    partial: Activations  # (n, hidden), what the device answered

    @property
    def experts(self) -> Int32Array:
        """(pairs,) expert of each pair."""
        return np.repeat(np.array(self.named, np.int32), self.counts)


@dataclass(frozen=True, slots=True, eq=False)
class Recomputed:
    """What the answer should have been."""

    partial: Float32Array  # (n, hidden)
    scale: FloatArray  # (n,) its norm, or what that would be if the outputs were orthogonal, where that is more
    norms: dict[int, Float32Array]  # expert -> norms of its outputs


def sample(order: Order, partial: Activations, rows: Int32Array | None) -> Sample:
    """Take some rows of an answer; None takes all."""
    if rows is None or len(rows) == len(partial):
        tokens = _copy(order.tokens)
        return Sample(order.layer, tokens, order.experts, order.counts, order.rows, order.weights, partial)
    experts = np.repeat(np.array(order.experts, np.int32), order.counts)
    place = np.full(len(partial), -1, np.int32)
    place[rows] = np.arange(len(rows), dtype=np.int32)
    at = place[order.rows]
    kept = at >= 0
    return Sample(
        order.layer, _copy(order.tokens[rows]), experts[kept], 1, at[kept], order.weights[kept], _copy(partial[rows])
    )


def differs(given: Sample, right: Recomputed) -> bool:
    """Whether some row of the answer is farther from what is right than honest devices are. NaN is far."""
    error = np.linalg.norm(given.partial.astype(np.float64) - right.partial, axis=1)
    return not bool((error <= TOLERANCE * right.scale + NOTHING).all())


class Recomputer:
    """Opens experts as they are needed and keeps the last used ones. One thread at a time uses it."""

    def __init__(self, read: Read, open_expert: Open, most_bytes: int) -> None:
        """`most_bytes` of memory for opened experts, or one if it is larger."""
        self._read = read
        self._open = open_expert
        self._most_bytes = most_bytes
        self._models: OrderedDict[ExpertId, tuple[Model, int]] = OrderedDict()
        self._bytes = 0

    def run(self, given: Sample) -> Recomputed:
        """Compute the rows of a sample.

        Raises:
            WdmoeError: an expert cannot be read, opened or run, or its outputs are not finite: nothing is known.
        """
        total = np.zeros(given.tokens.shape, np.float32)
        squares = np.zeros(len(total))
        norms: dict[int, Float32Array] = {}
        experts = given.experts
        for expert in dict.fromkeys(experts.tolist()):
            mine = experts == expert
            rows, weights = given.rows[mine], given.weights[mine]
            out = self._model(ExpertId(given.layer, expert)).run(np.ascontiguousarray(given.tokens[rows]))
            norms[expert] = np.linalg.norm(out, axis=1)
            np.add.at(total, rows, weights[:, None] * out)
            np.add.at(squares, rows, np.square(weights.astype(np.float64) * norms[expert]))
        if not np.isfinite(total).all():
            raise ExpertError(f"layer {given.layer}: the right answer is not finite")
        scale = np.maximum(np.linalg.norm(total.astype(np.float64), axis=1), np.sqrt(squares))
        return Recomputed(total, scale, norms)

    def _model(self, expert: ExpertId) -> Model:
        kept = self._models.get(expert)
        if kept is not None:
            self._models.move_to_end(expert)
            return kept[0]
        data = self._read(expert)
        size = int(SESSION_SHARE * len(data))
        while self._models and self._bytes + size > self._most_bytes:
            self._bytes -= self._models.popitem(last=False)[1][1]
        model = self._open(data)
        self._models[expert] = (model, size)
        self._bytes += size
        return model


def _copy(values: Activations) -> Float32Array:
    return np.array(values, np.float32, order="C")
