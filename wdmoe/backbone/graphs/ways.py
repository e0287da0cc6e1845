"""How a pass goes through a layer up to its gate: in one graph where attention takes all rows at once, else in parts.

Rows that stand next to each other in a slab and have one new token each are a span, as are several tokens of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array
from wdmoe.backbone.graphs.binding import Bound
from wdmoe.backbone.graphs.buffers import Buffers
from wdmoe.backbone.graphs.cache import Row, Slab
from wdmoe.backbone.graphs.sessions import StationSessions, as_value

KEPT_SPANS = 16  # of a pass of this size, bound to rows
Kind = TypeVar("Kind", bound="OfSpan")


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Neighbouring rows of a slab, with as many new tokens each: several tokens only where it is one row."""

    rows: Sequence[Row]
    tokens: int  # of each row

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.rows) * self.tokens


class Way(Protocol):
    """Through all layers of a pass."""

    last: Float32Array  # (tokens, hidden) the residual stream above all of them

    def run(self, index: int) -> None:
        """A layer up to its gate, or through its feed-forward network."""
        ...


class Ways:
    """Of passes of so many tokens, one at a time."""

    def __init__(self, sessions: StationSessions, tokens: int) -> None:
        self.buffers = Buffers(sessions, tokens)
        self._sessions = sessions
        self._in_one = all(layer.whole is not None for layer in sessions.layers)
        self._parts: Parts | None = None  # most passes never need them
        self._bound: dict[tuple[object, ...], OfSpan] = {}

    def through(self, spans: Sequence[Span]) -> Way:
        """For these rows, whose tokens stand in this order."""
        if self._in_one and len(spans) == 1:
            return self._kept(InOne, spans[0], 0)
        if self._parts is None:
            self._parts = Parts(self._sessions, self.buffers)
        return InParts(self._parts, [self._kept(Attentions, span, place) for span, place in _placed(spans)])

    def forget(self, slab: Slab) -> None:
        """Nothing of it may be kept."""
        self._bound = {key: each for key, each in self._bound.items() if each.slab is not slab}

    def _kept(self, kind: type[Kind], span: Span, place: int) -> Kind:
        """Bound to these rows, as before if they were."""
        first = span.rows[0]
        key = (kind, id(first.slab), first.index, len(span.rows), span.tokens, place)
        found = self._bound.pop(key, None)
        if not isinstance(found, kind):
            found = kind(self._sessions, self.buffers, span, place)
        self._bound[key] = found
        if len(self._bound) > KEPT_SPANS:
            del self._bound[next(iter(self._bound))]
        found.begin(span)
        return found


class OfSpan:
    """Graphs of all layers, bound to the rows of a span."""

    def __init__(self, sessions: StationSessions, buffers: Buffers, span: Span, place: int) -> None:
        """`place`: of the span's first token in the pass."""
        self.slab = span.rows[0].slab
        self._seen = np.zeros(len(span.rows), np.int32)
        self._longest = np.zeros(1, np.int32)
        self._axis = np.array([0 if len(span.rows) == 1 else 1], np.int64)  # of the rows, or of their one token
        self._span, self._place = span, place
        self._layers = list(self._bind(sessions, buffers))

    def begin(self, span: Span) -> None:
        """Say how far the rows are."""
        for at, row in enumerate(span.rows):
            self._seen[at] = row.seen + span.tokens - 1
        self._longest[0] = self._seen.max() + 1

    def run(self, index: int) -> None:
        """Of one layer."""
        self._layers[index].run()

    def _bind(self, sessions: StationSessions, buffers: Buffers) -> Iterator[Bound]:
        raise NotImplementedError

    def _bind_cache(self, bound: Bound, sessions: StationSessions, number: int) -> None:
        """The rows' keys and values. What is new is written where it stays: nothing else is copied."""
        first, rows = self._span.rows[0].index, len(self._span.rows)
        for kind, of_layers in (("key", self.slab.keys), ("value", self.slab.values)):
            its = of_layers[number][first : first + rows]
            bound.input(f"past_{kind}", as_value(its))
            bound.output(f"present_{kind}", its)
        bound.input("seen", as_value(self._seen))
        bound.input("longest", as_value(self._longest))
        bound.input("cos", sessions.cos)
        bound.input("sin", sessions.sin)
        sinks = sessions.layers[number].sinks
        if sinks is not None:
            bound.input("sinks", sinks)


class InOne(OfSpan):
    """Each layer in one graph: a pass of one span."""

    last: Float32Array

    def _bind(self, sessions: StationSessions, buffers: Buffers) -> Iterator[Bound]:
        self.last = buffers.x[len(sessions.layers) % 2]
        for number, layer in enumerate(sessions.layers):
            side = number % 2
            moe = {"moe": buffers.moe} if layer.below else {}
            given: dict[str, npt.NDArray[Any]] = {"x": buffers.x[side], "axis": self._axis, **moe}
            bound = buffers.bound(layer.whole, given, buffers.x[1 - side])
            self._bind_cache(bound, sessions, number)
            yield bound


class Attentions(OfSpan):
    """The attention of a span."""

    def _bind(self, sessions: StationSessions, buffers: Buffers) -> Iterator[Bound]:
        place, span = self._place, self._span

        def its(name: str, width: int) -> npt.NDArray[Any]:
            array = buffers.output(name, width)
            return array[place : place + span.size].reshape(len(span.rows), span.tokens, width)

        for number, layer in enumerate(sessions.layers):
            part = layer.layer.attention
            bound = Bound(layer.attention, {name: its(name, width) for name, width in part.widths.items()})
            bound.output("attention", its("attention", part.heads * part.head_size))
            self._bind_cache(bound, sessions, number)
            yield bound


class Parts:
    """Of each layer what takes all tokens of a pass: up to attention, and from there to the gate."""

    def __init__(self, sessions: StationSessions, buffers: Buffers) -> None:
        self.layers: list[tuple[Bound, Bound]] = []
        side = 0  # of the residual stream
        for layer in sessions.layers:
            if layer.below:
                given = {"x": buffers.x[side], "moe": buffers.moe}
                side = 1 - side
                before = buffers.bound(layer.before, given, buffers.x[side])
            else:
                before = buffers.bound(layer.before, {"x": buffers.x[side]})
            part = layer.layer.attention
            attended = buffers.output("attention", part.heads * part.head_size)
            given = {"x": buffers.x[side], "attention": attended}
            side = 1 - side
            self.layers.append((before, buffers.bound(layer.after, given, buffers.x[side])))
        self.last: Float32Array = buffers.x[side]


class InParts:
    """Each layer in parts, with attention span by span."""

    def __init__(self, parts: Parts, attentions: Sequence[Attentions]) -> None:
        self._parts, self._attentions = parts, attentions
        self.last = parts.last

    def run(self, index: int) -> None:
        """See `Way`."""
        before, after = self._parts.layers[index]
        before.run()
        for attention in self._attentions:
            attention.run(index)
        after.run()


def _placed(spans: Sequence[Span]) -> Iterator[tuple[Span, int]]:
    """Each span with the place of its first token."""
    place = 0
    for span in spans:
        yield span, place
        place += span.size
