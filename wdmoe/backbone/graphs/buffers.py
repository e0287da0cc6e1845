"""The memory of a pass of so many tokens: what comes in and out of its graphs.

One pass uses it at a time. What others may keep is copied out: the tokens that go to devices, and what the gate said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.graphs.binding import Bound
from wdmoe.backbone.graphs.sessions import LayerSessions, Session, StationSessions
from wdmoe.layer_call import Demand

DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32}


class Buffers:
    """Two of the residual stream, and one of each output of the graphs, which all layers share."""

    def __init__(self, sessions: StationSessions, tokens: int) -> None:
        """`tokens`: of the pass, span by span."""
        self.tokens = tokens
        self._embedding, self._multiplier = sessions.embedding, np.float32(sessions.plan.embedding_multiplier)
        self._width = sessions.plan.hidden
        hidden = (tokens, self._width)
        self.x = (np.empty(hidden, np.float32), np.empty(hidden, np.float32))
        self.moe: Float32Array = np.zeros(hidden, np.float32)
        self._outputs: dict[tuple[str, int], npt.NDArray[Any]] = {}
        self._said = [self.outputs(layer.after) for layer in sessions.layers]
        self._shared = [self._bind_shared(layer) for layer in sessions.layers]

    def output(self, name: str, width: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """(tokens, width) memory of an output."""
        if (name, width) not in self._outputs:
            self._outputs[name, width] = np.zeros((self.tokens, width), dtype)
        return self._outputs[name, width]

    def bound(self, session: Session, inputs: Mapping[str, npt.NDArray[Any]], y: Float32Array | None = None) -> Bound:
        """A graph with these inputs and this residual stream above it. The caches are the caller's."""
        bound = Bound(session, inputs)
        if y is not None:
            bound.output("y", y)
        for name, array in self.outputs(session).items():
            bound.output(name, array)
        return bound

    def outputs(self, session: Session) -> Mapping[str, npt.NDArray[Any]]:
        """Of all outputs of a graph but the residual stream and the caches, by name."""
        return {
            each.name: self.output(each.name, each.shape[-1], DTYPES[each.type])
            for each in session.get_outputs()
            if each.name != "y" and not each.name.startswith("present")
        }

    def begin(self, ids: Int32Array) -> None:
        """Look the tokens up. ids: (tokens,)."""
        np.multiply(self._embedding[ids], self._multiplier, out=self.x[0])

    def hidden(self) -> Float32Array:
        """(tokens, hidden) what the experts of the last layer are given."""
        found: Float32Array = self._outputs["hidden", self._width].copy()
        return found

    def demand(self, index: int) -> Demand:
        """What the gate of a layer asks for."""
        said = self._said[index]
        return Demand(said["experts"].copy(), said["weights"].copy(), said["gate"].copy())

    def shared(self, index: int) -> Shared | None:
        """The shared expert of a layer, to be computed by whoever has time first."""
        bound = self._shared[index]
        return None if bound is None else Shared(bound, self._outputs["shared", self._width])

    def take(self, out: Float32Array, shared: Shared | None) -> None:
        """What the experts of a layer gave: (tokens, hidden)."""
        if shared is None:
            np.copyto(self.moe, out)
        else:
            shared.compute()
            np.add(out, shared.out, out=self.moe)

    def _bind_shared(self, layer: LayerSessions) -> Bound | None:
        if layer.shared is None:
            return None
        given = {"x": self._outputs["hidden", self._width]}
        return self.bound(layer.shared, given, self.output("shared", self._width))


class Shared:
    """A layer's shared expert, computed while the others are away or, at the latest, when it is needed."""

    def __init__(self, bound: Bound, out: Float32Array) -> None:
        self._bound = bound
        self.out = out
        self._done = False

    def compute(self) -> None:
        """Unless that was done."""
        if not self._done:
            self._bound.run()
            self._done = True
