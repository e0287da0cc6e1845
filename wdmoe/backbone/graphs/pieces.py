"""Pieces of a decoder layer, written into a graph: what each takes and gives are names of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wdmoe.backbone.graphs.plan import Attention, Gated, Router
from wdmoe.backbone.graphs.quantise import BLOCK, quantised
from wdmoe.backbone.graphs.writing import CONTRIB, FLOAT, INT32, Graph


def scaled(graph: Graph, x: str, factor: float) -> str:
    """x times a number."""
    return (
        x if factor == 1.0 else graph.node("Mul", [x, graph.constant(f"times{factor}", np.array(factor, np.float32))])
    )


def norm(graph: Graph, x: str, weight: str, epsilon: float) -> str:
    """Root mean square normalisation over the last axis."""
    return graph.node("SimplifiedLayerNormalization", [x, graph.tensor(weight)], axis=-1, epsilon=epsilon)


def linear(graph: Graph, x: str, weights: Sequence[str], biases: Sequence[str] = (), exact: bool = False) -> str:
    """x times matrices as checkpoints hold them, (out, in) each, side by side."""
    matrix = np.concatenate([graph.value(name) for name in weights])
    out, width = matrix.shape
    name = weights[0] if len(weights) == 1 else f"{weights[0]}+{len(weights) - 1}"
    if graph.bits == 32 or exact or width % BLOCK:
        y = graph.node("MatMul", [x, graph.constant(f"{name}.T", matrix.T)])
    else:
        whole, scale = quantised(matrix, graph.bits)
        parts = [graph.constant(f"{name}.q{graph.bits}", whole), graph.constant(f"{name}.scale", scale)]
        y = graph.node(
            "MatMulNBits", [x, *parts], domain=CONTRIB, K=width, N=out, bits=graph.bits, block_size=BLOCK,
            accuracy_level=4,
        )  # fmt: skip
    if not biases:
        return y
    bias = np.concatenate([graph.value(each) for each in biases])
    return graph.node("Add", [y, graph.constant(f"{name}.bias", bias)])


def gated(graph: Graph, x: str, part: Gated) -> str:
    """silu(gate) * up, and down."""
    names = [part.gate, part.up] if part.up else [part.gate]
    joined = linear(graph, x, names)
    half = sum(len(graph.value(name)) for name in names) // 2
    gate, up = graph.name("gate"), graph.name("up")
    graph.nodes(
        "Split", [joined, graph.constant(f"halves{half}", np.array([half, half], np.int64))], [gate, up], axis=-1
    )
    active = graph.node("Mul", [graph.node("Mul", [gate, graph.node("Sigmoid", [gate])]), up])
    down = linear(graph, active, [part.down])
    if not part.scored:
        return down
    return graph.node("Mul", [graph.node("Sigmoid", [linear(graph, x, [part.scored], exact=True)]), down])


def attention(graph: Graph, x: str, part: Attention, epsilon: float) -> str:
    """Attention over the rows' caches. Inputs of the segment: past, lengths and the tables of the rotation."""
    names = [f"{part.prefix}{each}_proj" for each in "qkv"]
    weights = [f"{name}.weight" for name in names]
    biases = [f"{name}.bias" for name in names if graph.has(f"{name}.bias")]
    sizes = [part.heads * part.head_size, *[part.kv_heads * part.head_size] * 2]
    packed = linear(graph, x, weights, biases)
    if part.clip and not part.norm:
        packed = _clipped(graph, packed, part.clip)
    query, key, value = (packed, "", "") if not part.norm else _normed(graph, packed, sizes, part, epsilon)
    number = part.prefix.split(".")[-3]
    past_key, past_value = f"past_key.{number}", f"past_value.{number}"
    shape = ("rows", part.kv_heads, "past", part.head_size)
    graph.input(past_key, FLOAT, shape)
    graph.input(past_value, FLOAT, shape)
    present = [f"present_key.{number}", f"present_value.{number}"]
    for name in present:
        graph.output(name, FLOAT, ("rows", part.kv_heads, "present", part.head_size))
    inputs = [query, key, value, past_key, past_value, "seen", "longest", "cos", "sin"]
    if part.sinks:
        inputs += ["", "", graph.tensor(f"{part.prefix}sinks")]
    out = graph.name("attention")
    more: dict[str, Any] = {"local_window_size": part.window} if part.window else {}
    more |= {"rotary_interleaved": 1} if part.interleaved else {}
    graph.nodes(
        "GroupQueryAttention", inputs, [out, *present], domain=CONTRIB, num_heads=part.heads,
        kv_num_heads=part.kv_heads, scale=part.scale, do_rotary=1, **more,
    )  # fmt: skip
    o = f"{part.prefix}o_proj"
    return linear(graph, out, [f"{o}.weight"], [f"{o}.bias"] if graph.has(f"{o}.bias") else [])


def _clipped(graph: Graph, x: str, most: float) -> str:
    bounds = [graph.constant(f"bound{bound}", np.array(bound, np.float32)) for bound in (-most, most)]
    return graph.node("Clip", [x, *bounds])


def _normed(graph: Graph, packed: str, sizes: list[int], part: Attention, epsilon: float) -> tuple[str, str, str]:
    parts = [graph.name(each) for each in ("query", "key", "value")]
    graph.nodes("Split", [packed, graph.constant(f"sizes{sizes}", np.array(sizes, np.int64))], parts, axis=-1)
    normed = []
    for x, name, heads in zip(parts[:2], ("q_norm", "k_norm"), (part.heads, part.kv_heads), strict=True):
        weight = f"{part.prefix}{name}.weight"
        if part.norm == "head":
            split = graph.constant(f"heads{heads}", np.array([0, 0, heads, part.head_size], np.int64))
            flat = graph.constant("flat", np.array([0, 0, -1], np.int64))
            y = norm(graph, graph.node("Reshape", [x, split]), weight, epsilon)
            normed.append(graph.node("Reshape", [y, flat]))
        else:
            normed.append(norm(graph, x, weight, epsilon))
    triple = [*normed, parts[2]]
    if part.clip:
        triple = [_clipped(graph, each, part.clip) for each in triple]
    return triple[0], triple[1], triple[2]


def router(graph: Graph, x: str, part: Router) -> None:
    """Outputs of the segment: `gate` scores, `experts` and their `weights`, by row and token."""
    biases = [f"{part.prefix}bias"] if graph.has(f"{part.prefix}bias") else []
    weight = f"{part.prefix}weight" if graph.has(f"{part.prefix}weight") else f"{part.prefix}layer.weight"
    scores = linear(graph, x, [weight], biases, exact=True)
    experts = len(graph.value(weight))
    ranked = _ranked(graph, scores, part)
    choice = ranked
    if part.correction:
        correction = graph.constant(part.correction, graph.value(part.correction).reshape(experts))
        choice = graph.node("Add", [ranked, correction])
    if part.groups > 1:
        choice = _in_best_groups(graph, choice, part, experts)
    top, chosen = graph.name("top"), graph.name("chosen")
    graph.nodes("TopK", [choice, graph.constant("k", np.array([part.top_k], np.int64))], [top, chosen], axis=-1)
    weights = top if choice == ranked else graph.node("GatherElements", [ranked, chosen], axis=-1)
    if part.rule == "best":
        weights = graph.node("Softmax", [weights], axis=-1)
    elif part.renormalise:
        total = graph.node("ReduceSum", [weights, graph.constant("last", np.array([-1], np.int64))])
        weights = graph.node("Div", [weights, total])
    weights = scaled(graph, weights, part.factor)
    graph.tell(scores, "gate", experts)
    graph.tell(weights, "weights", part.top_k)
    graph.node("Cast", [chosen], "experts", to=INT32)
    graph.output("experts", INT32, ("rows", "tokens", part.top_k))


def _ranked(graph: Graph, scores: str, part: Router) -> str:
    """What experts are ranked by."""
    if part.rule == "best":
        return scores
    return graph.node("Softmax", [scores], axis=-1) if part.rule == "softmax" else graph.node("Sigmoid", [scores])


def _in_best_groups(graph: Graph, choice: str, part: Router, experts: int) -> str:
    """The same, without experts of groups that are not among the best by the sum of their two best."""
    shape = graph.constant("grouped", np.array([0, 0, part.groups, experts // part.groups], np.int64))
    grouped = graph.node("Reshape", [choice, shape])
    best, of_group, least = graph.name("best"), graph.name("places"), graph.name("least")
    graph.nodes("TopK", [grouped, graph.constant("two", np.array([2], np.int64))], [best, of_group], axis=-1)
    last = graph.constant("last", np.array([-1], np.int64))
    sums = graph.node("ReduceSum", [best, last])
    k = graph.constant("groups", np.array([part.group_k], np.int64))
    of_all = graph.constant("of", np.array([0, 0, part.groups], np.int64))
    graph.nodes("TopK", [graph.node("Reshape", [sums, of_all]), k], [least, graph.name("places")], axis=-1)
    worst = graph.node("ReduceMin", [least], axes=[-1], keepdims=1)
    high = graph.node("GreaterOrEqual", [sums, graph.node("Unsqueeze", [worst, last])])
    kept = graph.node("Where", [high, grouped, graph.constant("never", np.array(-np.inf, np.float32))])
    return graph.node("Reshape", [kept, graph.constant("flat", np.array([0, 0, -1], np.int64))])
