"""The station's part of a pass, cut where others work: the experts, and the attention over each request's cache.

    embedding -> before -> (attention) -> after -> (experts) -> before -> ... -> (experts) -> head

`before` and `after` take the tokens of all requests of a pass, one below the other: (tokens, width). Attention takes
some requests at a time, (rows, tokens, width), and holds no weights: layers of the same shape share one graph.

`whole` is all three in one, for a pass whose requests attention takes at once. A run of a graph costs some 0.05 ms of
its own when the weights of others went through the caches in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wdmoe.backbone.graphs.writing import latent, pieces
from wdmoe.backbone.graphs.writing.graph import FLOAT, INT32, INT64, Graph, Weights
from wdmoe.backbone.graphs.writing.plan import Attention, Gated, Layer, StationPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGraphs:
    """The graphs of one decoder layer, each with its ends."""

    before: bytes  # x -> query, and key and value where they are apart; where experts are below: x, moe -> y, query ...
    after: bytes  # x, attention -> y, and where experts follow: hidden, gate, weights, experts
    # All three in one, where the first layer is small: x, past, axis (of the rows, or of the tokens of one row)
    # -> present, and what `after` gives.
    whole: bytes | None
    shared: bytes | None  # the shared expert: x -> y, to be computed while the others are away


def layer_graphs(
    plan: StationPlan, weights: Weights, bits: int = 32, most_whole_bytes: float = math.inf
) -> Iterator[LayerGraphs]:
    """Write the graphs of all layers, one after the other, so that only one holds its weights twice.

    Args:
        plan: of the model.
        weights: its tensors.
        bits: of the large matrices: 32, 8 or 4.
        most_whole_bytes: of the first layer up to its gate, for `whole` to be written.
    """
    in_one = True
    for layer in plan.layers:
        before = _before(plan, Graph(weights, bits), layer)
        after = _after(plan, Graph(weights, bits), layer)
        if layer is plan.layers[0]:
            in_one = len(before) + len(after) <= most_whole_bytes
        yield LayerGraphs(
            before=before,
            after=after,
            whole=_whole(plan, Graph(weights, bits), layer) if in_one else None,
            shared=None if layer.shared is None else _shared(plan, Graph(weights, bits), layer.shared),
        )


def head_graph(plan: StationPlan, weights: Weights, bits: int = 32) -> bytes:
    """x, and moe where there are experts below -> logits."""
    graph = Graph(weights, bits)
    x = _residual(graph, plan, len(plan.layers))
    normed = pieces.norm(graph, x, "model.norm.weight", plan.epsilon)
    biases = ["lm_head.bias"] if graph.has("lm_head.bias") else []
    logits = pieces.scaled(graph, pieces.linear(graph, normed, [plan.head], biases), 1 / plan.logits_divisor)
    graph.tell(logits, "logits", plan.vocabulary)
    return graph.finish("head")


def attention_graph(part: Attention, rotations: int) -> bytes:
    """query, key, value, past -> attention, present. `rotations`: pairs of each head that are rotated."""
    graph = Graph({}, 32)
    values = [graph.input(name, FLOAT, ("rows", "tokens", width)) for name, width in part.widths.items()]
    attended = _attention(graph, part, values, rotations)
    graph.output(attended, FLOAT, ("rows", "tokens", part.heads * part.head_size))
    return graph.finish("attention")


def _attention(graph: Graph, part: Attention, values: Sequence[str], rotations: int) -> str:
    for name in ("past_key", "past_value"):
        graph.input(name, FLOAT, ("rows", part.kv_heads, "capacity", part.head_size))
    graph.input("seen", INT32, ("rows",))
    graph.input("longest", INT32, (1,))
    graph.input("cos", FLOAT, ("positions", rotations))
    graph.input("sin", FLOAT, ("positions", rotations))
    if part.sinks:
        graph.input("sinks", FLOAT, (part.heads,))
    attended = pieces.attention(graph, part, values)
    for name in ("present_key", "present_value"):
        graph.output(name, FLOAT, ("rows", part.kv_heads, "capacity", part.head_size))
    return attended


def _before(plan: StationPlan, graph: Graph, layer: Layer) -> bytes:
    x = _residual(graph, plan, layer.number)
    values = _query_key_value(plan, graph, layer, x)
    for value, (name, width) in zip(values, layer.attention.widths.items(), strict=True):
        graph.tell(value, name, width)
    if plan.has_experts_below(layer.number):
        graph.tell(x, "y", plan.hidden)
    return graph.finish(f"before{layer.number}")


def _after(plan: StationPlan, graph: Graph, layer: Layer) -> bytes:
    part = layer.attention
    x = graph.input("x", FLOAT, ("tokens", plan.hidden))
    _to_the_gate(plan, graph, layer, x, graph.input("attention", FLOAT, ("tokens", part.heads * part.head_size)))
    return graph.finish(f"after{layer.number}")


def _whole(plan: StationPlan, graph: Graph, layer: Layer) -> bytes:
    part = layer.attention
    x = _residual(graph, plan, layer.number)
    axis = graph.input("axis", INT64, (1,))
    values = [graph.node("Unsqueeze", [value, axis]) for value in _query_key_value(plan, graph, layer, x)]
    attended = _attention(graph, part, values, len(plan.rope.frequencies))
    width = graph.constant("attended", np.array([-1, part.heads * part.head_size], np.int64))
    _to_the_gate(plan, graph, layer, x, graph.node("Reshape", [attended, width]))
    return graph.finish(f"whole{layer.number}")


def _query_key_value(plan: StationPlan, graph: Graph, layer: Layer, x: str) -> Sequence[str]:
    part = layer.attention
    normed = pieces.norm(graph, x, f"{layer.prefix}input_layernorm.weight", plan.epsilon)
    if part.latent is None:
        return pieces.query_key_value(graph, normed, part, plan.epsilon)
    return latent.query_key_value(graph, normed, part, part.latent)


def _to_the_gate(plan: StationPlan, graph: Graph, layer: Layer, x: str, attended: str) -> None:
    """From what attention gave to the gate's outputs, or through the feed-forward network."""
    part = layer.attention
    if part.latent is not None:
        attended = latent.attended(graph, attended, part, part.latent)
    x = _added(graph, plan, x, pieces.biased(graph, attended, f"{part.prefix}o_proj"))
    normed = pieces.norm(graph, x, f"{layer.prefix}post_attention_layernorm.weight", plan.epsilon)
    if layer.dense is not None:
        x = _added(graph, plan, x, pieces.gated(graph, normed, layer.dense))
    graph.tell(x, "y", plan.hidden)
    if layer.router is not None:
        pieces.router(graph, normed, layer.router)
        graph.tell(normed, "hidden", plan.hidden)


def _shared(plan: StationPlan, graph: Graph, part: Gated) -> bytes:
    x = graph.input("x", FLOAT, ("tokens", plan.hidden))
    graph.tell(pieces.gated(graph, x, part), "y", plan.hidden)
    return graph.finish("shared")


def _residual(graph: Graph, plan: StationPlan, number: int) -> str:
    """The residual stream above a layer, with what the experts of the layer below gave."""
    x = graph.input("x", FLOAT, ("tokens", plan.hidden))
    if not plan.has_experts_below(number):
        return x
    return _added(graph, plan, x, graph.input("moe", FLOAT, ("tokens", plan.hidden)))


def _added(graph: Graph, plan: StationPlan, x: str, part: str) -> str:
    return graph.node("Add", [x, pieces.scaled(graph, part, plan.residual_multiplier)])
