"""The station's part of a pass, cut where the experts work: a graph from each layer's experts to the next gate.

    embedding -> [layers up to the first gate] -> experts -> [on to the next gate] -> ... -> experts -> [head]

Every segment takes the residual stream `x` and what the experts before it gave, `moe`. Shapes are (rows, tokens,
width): rows are requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wdmoe.backbone.graphs import pieces
from wdmoe.backbone.graphs.plan import Gated, Layer, StationPlan
from wdmoe.backbone.graphs.writing import FLOAT, INT32, Graph, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One graph. `layer`: whose experts follow it; -1: the head. `caches`: layers whose caches it reads and writes."""

    layer: int
    data: bytes
    caches: tuple[int, ...]
    takes_moe: bool
    shared: bytes | None = None  # the shared expert of `layer`, x -> y, to be computed while the others are away


def segments(plan: StationPlan, weights: Weights, bits: int = 32) -> Iterator[Segment]:
    """Write all graphs, one after the other, so that only one holds its weights twice.

    Args:
        plan: of the model.
        weights: gives its tensors.
        bits: of the large matrices: 32, 8 or 4.
    """
    begun: list[Layer] = []
    takes_moe = False
    for layer in plan.layers:
        begun.append(layer)
        if layer.router is not None:
            yield _segment(plan, weights, bits, tuple(begun), takes_moe)
            begun, takes_moe = [], True
    yield _head(plan, weights, bits, tuple(begun), takes_moe)


def _segment(plan: StationPlan, weights: Weights, bits: int, layers: tuple[Layer, ...], takes_moe: bool) -> Segment:
    graph = Graph(weights, bits)
    x = _begin(graph, plan, takes_moe)
    _attention_inputs(graph, plan)
    for layer in layers:
        x, normed = _through(graph, plan, layer, x)
        if layer.router is not None:
            pieces.router(graph, normed, layer.router)
            graph.tell(normed, "hidden", plan.hidden)
    graph.tell(x, "y", plan.hidden)
    last = layers[-1]
    return Segment(
        layer=last.number,
        data=graph.finish(f"layer{last.number}"),
        caches=tuple(layer.number for layer in layers),
        takes_moe=takes_moe,
        shared=None if last.shared is None else _shared(plan, weights, bits, last.shared),
    )


def _shared(plan: StationPlan, weights: Weights, bits: int, part: Gated) -> bytes:
    graph = Graph(weights, bits)
    x = graph.input("x", FLOAT, ("rows", "tokens", plan.hidden))
    graph.tell(pieces.gated(graph, x, part), "y", plan.hidden)
    return graph.finish("shared")


def _head(plan: StationPlan, weights: Weights, bits: int, layers: tuple[Layer, ...], takes_moe: bool) -> Segment:
    graph = Graph(weights, bits)
    x = _begin(graph, plan, takes_moe)
    if layers:
        _attention_inputs(graph, plan)
    for layer in layers:
        x, _ = _through(graph, plan, layer, x)
    normed = pieces.norm(graph, x, "model.norm.weight", plan.epsilon)
    logits = pieces.scaled(graph, pieces.linear(graph, normed, [plan.head]), 1 / plan.logits_divisor)
    graph.tell(logits, "logits", plan.vocabulary)
    return Segment(
        layer=-1, data=graph.finish("head"), caches=tuple(layer.number for layer in layers), takes_moe=takes_moe
    )


def _begin(graph: Graph, plan: StationPlan, takes_moe: bool) -> str:
    x = graph.input("x", FLOAT, ("rows", "tokens", plan.hidden))
    if not takes_moe:
        return x
    moe = graph.input("moe", FLOAT, ("rows", "tokens", plan.hidden))
    return _added(graph, plan, x, moe)


def _attention_inputs(graph: Graph, plan: StationPlan) -> None:
    size = len(plan.rope.frequencies)
    graph.input("seen", INT32, ("rows",))
    graph.input("longest", INT32, (1,))
    graph.input("cos", FLOAT, ("positions", size))
    graph.input("sin", FLOAT, ("positions", size))


def _through(graph: Graph, plan: StationPlan, layer: Layer, x: str) -> tuple[str, str]:
    """The residual stream after a layer but for its experts, and what these start from."""
    normed = pieces.norm(graph, x, f"{layer.prefix}input_layernorm.weight", plan.epsilon)
    x = _added(graph, plan, x, pieces.attention(graph, normed, layer.attention, plan.epsilon))
    normed = pieces.norm(graph, x, f"{layer.prefix}post_attention_layernorm.weight", plan.epsilon)
    if layer.dense is not None:
        x = _added(graph, plan, x, pieces.gated(graph, normed, layer.dense))
    return x, normed


def _added(graph: Graph, plan: StationPlan, x: str, part: str) -> str:
    return graph.node("Add", [x, pieces.scaled(graph, part, plan.residual_multiplier)])
