"""The memory of a pass of so many tokens, bound to the sessions of all layers once: a run makes and binds nothing.

One pass uses it at a time. What others may keep is copied out: the tokens that go to devices, and what the gate said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.graphs.cache import Row, Slab
from wdmoe.backbone.graphs.sessions import LayerSessions, Session, StationSessions, Value, as_value
from wdmoe.layer_call import Demand

KEPT_SPANS = 16  # of a pass of this size, bound to rows
Binding = Any  # onnxruntime.IOBinding
DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32}


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Neighbouring rows of a slab, with as many new tokens each: several tokens only where it is one row."""

    rows: Sequence[Row]
    tokens: int  # of each row

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.rows) * self.tokens


class Buffers:
    """Of a pass: two of the residual stream, and one of each output of the graphs, which all layers share."""

    def __init__(self, sessions: StationSessions, tokens: int) -> None:
        """`tokens`: of the pass, span by span."""
        self.tokens = tokens
        self._sessions = sessions
        self._embedding, self._multiplier = sessions.embedding, np.float32(sessions.plan.embedding_multiplier)
        hidden = (tokens, sessions.plan.hidden)
        self._x = (np.empty(hidden, np.float32), np.empty(hidden, np.float32))
        self.moe: Float32Array = np.zeros(hidden, np.float32)
        self._outputs: dict[tuple[str, int], npt.NDArray[Any]] = {}
        self._steps: list[_Steps] = []
        side = 0  # of the residual stream
        for layer in sessions.layers:
            self._steps.append(step := self._bind(layer, side))
            side = step.side
        self.last: Float32Array = self._x[side]  # the residual stream above all layers
        self._attentions: dict[tuple[int, int, int, int, int], _Attention] = {}

    # ---- a pass, in this order

    def begin(self, ids: Int32Array) -> None:
        """Look the tokens up. ids: (tokens,)."""
        np.multiply(self._embedding[ids], self._multiplier, out=self._x[0])

    def attention(self, span: Span, place: int) -> _Attention:
        """The attention of some rows, whose tokens begin at `place`, in each layer."""
        first = span.rows[0]
        key = (id(first.slab), first.index, len(span.rows), span.tokens, place)
        found = self._attentions.pop(key, None)
        if found is None:
            found = _Attention(self._sessions, self._outputs, span, place)
        self._attentions[key] = found
        if len(self._attentions) > KEPT_SPANS:
            del self._attentions[next(iter(self._attentions))]
        found.begin(span)
        return found

    def before(self, index: int) -> None:
        """A layer up to its attention."""
        self._steps[index].before.run()

    def after(self, index: int) -> None:
        """From its attention to its gate, or through its feed-forward network."""
        self._steps[index].after.run()

    def hidden(self) -> Float32Array:
        """(tokens, hidden) what the experts of the last layer are given."""
        found: Float32Array = self._outputs["hidden", self._sessions.plan.hidden].copy()
        return found

    def demand(self, index: int) -> Demand:
        """What the gate of a layer asks for."""
        return self._steps[index].demand()

    def shared(self, index: int) -> Shared | None:
        """The shared expert of a layer, to be computed by whoever has time first."""
        bound = self._steps[index].shared
        return None if bound is None else Shared(bound, self._outputs["y", self._sessions.plan.hidden])

    def take(self, out: Float32Array, shared: Shared | None) -> None:
        """What the experts of a layer gave: (tokens, hidden)."""
        if shared is None:
            np.copyto(self.moe, out)
        else:
            shared.compute()
            np.add(out, shared.out, out=self.moe)

    def forget(self, slab: Slab) -> None:
        """Nothing of it may be kept."""
        self._attentions = {key: each for key, each in self._attentions.items() if each.slab is not slab}

    # ---- binding

    def _bind(self, layer: LayerSessions, side: int) -> _Steps:
        before = _Bound(layer.before, {"x": self._x[side], **({"moe": self.moe} if layer.below else {})})
        if layer.below:
            side = 1 - side
            before.output("y", self._x[side])
        self._bind_outputs(before, layer.before)
        part = layer.layer.attention
        attended = self._output("attention", part.heads * part.head_size)
        after = _Bound(layer.after, {"x": self._x[side], "attention": attended})
        side = 1 - side
        after.output("y", self._x[side])
        said = self._bind_outputs(after, layer.after)
        shared = None
        if layer.shared is not None:
            shared = _Bound(layer.shared, {"x": said["hidden"]})
            self._bind_outputs(shared, layer.shared, but="")
        return _Steps(before, after, shared, said, side)

    def _bind_outputs(self, bound: _Bound, session: Session, but: str = "y") -> Mapping[str, npt.NDArray[Any]]:
        """All outputs but one, by name."""
        said = {}
        for each in session.get_outputs():
            if each.name != but:
                said[each.name] = self._output(each.name, each.shape[-1], DTYPES[each.type])
                bound.output(each.name, said[each.name])
        return said

    def _output(self, name: str, width: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        if (name, width) not in self._outputs:
            self._outputs[name, width] = np.zeros((self.tokens, width), dtype)
        return self._outputs[name, width]


class Shared:
    """A layer's shared expert, computed while the others are away or, at the latest, when it is needed."""

    def __init__(self, bound: _Bound, out: Float32Array) -> None:
        self._bound = bound
        self.out = out
        self._done = False

    def compute(self) -> None:
        """Unless that was done."""
        if not self._done:
            self._bound.run()
            self._done = True


class _Bound:
    """A session with memory for its ends."""

    def __init__(self, session: Session, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        self._session = session
        self._binding: Binding = session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, as_value(array))

    def input(self, name: str, value: Value) -> None:
        self._binding.bind_ortvalue_input(name, value)

    def output(self, name: str, array: npt.NDArray[Any]) -> None:
        self._binding.bind_ortvalue_output(name, as_value(array))

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """A layer, bound."""

    before: _Bound
    after: _Bound
    shared: _Bound | None
    said: Mapping[str, npt.NDArray[Any]]
    side: int  # of the residual stream above it

    def demand(self) -> Demand:
        said = self.said
        return Demand(said["experts"].copy(), said["weights"].copy(), said["gate"].copy())


class _Attention:
    """Some rows of a slab, bound in every layer."""

    def __init__(
        self,
        sessions: StationSessions,
        outputs: Mapping[tuple[str, int], npt.NDArray[Any]],
        span: Span,
        place: int,
    ) -> None:
        self.slab = span.rows[0].slab
        self._seen = np.zeros(len(span.rows), np.int32)
        self._longest = np.zeros(1, np.int32)
        self._layers = [self._bind(sessions, outputs, number, span, place) for number in range(len(sessions.layers))]

    def begin(self, span: Span) -> None:
        """Say how far the rows are."""
        for at, row in enumerate(span.rows):
            self._seen[at] = row.seen + span.tokens - 1
        self._longest[0] = self._seen.max() + 1

    def run(self, index: int) -> None:
        """Of one layer."""
        self._layers[index].run()

    def _bind(
        self,
        sessions: StationSessions,
        outputs: Mapping[tuple[str, int], npt.NDArray[Any]],
        number: int,
        span: Span,
        place: int,
    ) -> _Bound:
        layer, first = sessions.layers[number], span.rows[0].index
        part, slab = layer.layer.attention, self.slab
        past = {
            "key": slab.keys[number][first : first + len(span.rows)],
            "value": slab.values[number][first : first + len(span.rows)],
        }

        def its(name: str, width: int) -> npt.NDArray[Any]:
            return outputs[name, width][place : place + span.size].reshape(len(span.rows), span.tokens, width)

        inputs = {name: its(name, width) for name, width in part.widths.items()}
        inputs |= {f"past_{kind}": array for kind, array in past.items()}
        bound = _Bound(layer.attention, inputs | {"seen": self._seen, "longest": self._longest})
        bound.input("cos", sessions.cos)
        bound.input("sin", sessions.sin)
        if layer.sinks is not None:
            bound.input("sinks", layer.sinks)
        width = part.heads * part.head_size
        bound.output("attention", its("attention", width))
        for kind, array in past.items():  # the same memory: nothing is copied but what is new
            bound.output(f"present_{kind}", array)
        return bound
