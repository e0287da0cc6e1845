"""Pieces of a decoder layer, written into a graph: what each takes and gives are names of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wdmoe.backbone.graphs.writing.graph import CONTRIB, INT32, Graph
from wdmoe.backbone.graphs.writing.plan import Attention, Gated, Router
from wdmoe.backbone.graphs.writing.quantise import BLOCK, quantised

NEVER = np.array(-np.inf, np.float32)


def scaled(graph: Graph, x: str, factor: float) -> str:
    """x times a number."""
    return (
        x if factor == 1.0 else graph.node("Mul", [x, graph.constant(f"times{factor}", np.array(factor, np.float32))])
    )


def norm(graph: Graph, x: str, weight: str, epsilon: float) -> str:
    """Normalisation over the last axis: by the root mean square, or where there is a bias by mean and deviation."""
    bias = f"{weight.removesuffix('weight')}bias"
    if graph.has(bias):
        return graph.node("LayerNormalization", [x, graph.tensor(weight), graph.tensor(bias)], axis=-1, epsilon=epsilon)
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
    gate, up = graph.name("gate"), graph.name("up")
    graph.nodes("Split", [biased(graph, x, *names)], [gate, up], axis=-1)
    active = graph.node("Mul", [graph.node("Mul", [gate, graph.node("Sigmoid", [gate])]), up])
    down = biased(graph, active, part.down)
    if not part.scored:
        return down
    score = linear(graph, x, [f"{part.scored}.weight"], exact=True)
    return graph.node("Mul", [graph.node("Sigmoid", [score]), down])


def biased(graph: Graph, x: str, *names: str) -> str:
    """x times the matrices of modules, side by side, plus their biases where they have some."""
    biases = [f"{name}.bias" for name in names if graph.has(f"{name}.bias")]
    return linear(graph, x, [f"{name}.weight" for name in names], biases)


def split(graph: Graph, x: str, *sizes: int) -> Sequence[str]:
    """Parts of the last axis."""
    parts = [graph.name("part") for _ in sizes]
    name = f"sizes{'+'.join(map(str, sizes))}"
    graph.nodes("Split", [x, graph.constant(name, np.array(sizes, np.int64))], parts, axis=-1)
    return parts


def grouped(graph: Graph, x: str, count: int) -> str:
    """(tokens, width) -> (tokens, count, width / count)."""
    return graph.node("Reshape", [x, graph.constant(f"grouped{count}", np.array([0, count, -1], np.int64))])


def flat(graph: Graph, x: str) -> str:
    """The way back."""
    return graph.node("Reshape", [x, graph.constant("flat", np.array([0, -1], np.int64))])


def query_key_value(graph: Graph, x: str, part: Attention, epsilon: float) -> Sequence[str]:
    """What attention takes of each token, as `Attention.widths` says."""
    packed = biased(graph, x, *(f"{part.prefix}{each}_proj" for each in "qkv"))
    values = _normed(graph, packed, part, epsilon) if part.norm else [packed]
    return [_clipped(graph, value, part.clip) for value in values] if part.clip else values


def attention(graph: Graph, part: Attention, values: Sequence[str]) -> str:
    """Attention over the rows' caches, rotation included. values: (rows, tokens, width) each, as `Attention.widths`."""
    apart = [*values, "", ""][:3]
    inputs = [*apart, "past_key", "past_value", "seen", "longest", "cos", "sin"]
    more: dict[str, Any] = {"local_window_size": part.window} if part.window else {}
    graph.nodes(
        "GroupQueryAttention", inputs + (["", "", "sinks"] if part.sinks else []),
        ["attention", "present_key", "present_value"], domain=CONTRIB, num_heads=part.heads,
        kv_num_heads=part.kv_heads, scale=part.scale, do_rotary=1, rotary_interleaved=int(part.interleaved), **more,
    )  # fmt: skip
    return "attention"


def _clipped(graph: Graph, x: str, most: float) -> str:
    bounds = [graph.constant(f"bound{bound}", np.array(bound, np.float32)) for bound in (-most, most)]
    return graph.node("Clip", [x, *bounds])


def _normed(graph: Graph, packed: str, part: Attention, epsilon: float) -> Sequence[str]:
    query, key, value = split(graph, packed, *part.widths.values())
    heads = ((query, "q_norm", part.heads), (key, "k_norm", part.kv_heads))
    return [*(_head_norm(graph, x, part, name, count, epsilon) for x, name, count in heads), value]


def _head_norm(graph: Graph, x: str, part: Attention, name: str, heads: int, epsilon: float) -> str:
    weight = f"{part.prefix}{name}.weight"
    if part.norm == "row":
        return norm(graph, x, weight, epsilon)
    return flat(graph, norm(graph, grouped(graph, x, heads), weight, epsilon))


def router(graph: Graph, x: str, part: Router) -> None:
    """Outputs of the segment: `gate` scores, `experts` and their `weights`, by row and token."""
    biases = [f"{part.prefix}bias"] if graph.has(f"{part.prefix}bias") else []
    scores = linear(graph, x, [f"{part.prefix}weight"], biases, exact=True)
    chosen, weights = (_near if part.rule == "near" else _best)(graph, scores, part)
    weights = scaled(graph, weights, part.factor)
    graph.tell(scores, "gate", graph.shape(f"{part.prefix}weight.T")[1])
    graph.tell(weights, "weights", part.top_k)
    graph.node("Cast", [chosen], "experts", to=INT32)
    graph.output("experts", INT32, ("tokens", part.top_k))


def _best(graph: Graph, scores: str, part: Router) -> tuple[str, str]:
    """The best experts, and their weights."""
    choice = ranked = _ranked(graph, scores, part)
    if part.correction:
        correction = graph.constant(part.correction, graph.value(part.correction).reshape(-1))
        choice = graph.node("Add", [ranked, correction])
    if part.groups > 1:
        choice = _in_best_groups(graph, choice, part)
    top, chosen = graph.name("top"), graph.name("chosen")
    graph.nodes("TopK", [choice, graph.constant("k", np.array([part.top_k], np.int64))], [top, chosen], axis=-1)
    weights = top if choice == ranked else graph.node("GatherElements", [ranked, chosen], axis=-1)
    if part.rule == "best":
        weights = graph.node("Softmax", [weights], axis=-1)
    elif part.renormalise:
        total = graph.node("ReduceSum", [weights, graph.constant("last", np.array([-1], np.int64))])
        weights = graph.node("Div", [weights, total])
    return chosen, weights


def _near(graph: Graph, scores: str, part: Router) -> tuple[str, str]:
    """Experts one after the other; the weight of each is its share among those near it [Liu et al., GRIN, 2024]."""
    count = graph.shape(f"{part.prefix}weight.T")[1]
    numbers = graph.constant("numbers", np.arange(count, dtype=np.int64))
    never, closeness = graph.constant("never", NEVER), graph.constant("closeness", np.array(part.closeness, np.float32))
    sizes, left, choices, weights = graph.node("Abs", [scores]), scores, [], []
    for _ in range(part.top_k):
        best, choice = graph.name("best"), graph.name("choice")
        graph.nodes("TopK", [left, graph.constant("k1", np.array([1], np.int64))], [best, choice], axis=-1)
        gap = graph.node("Div", [graph.node("Sub", [best, scores]), graph.node("Max", [sizes, best])])
        near = graph.node("Where", [graph.node("Greater", [gap, closeness]), never, left])
        weights.append(graph.node("ReduceMax", [graph.node("Softmax", [near], axis=-1)], axes=[-1], keepdims=1))
        choices.append(choice)
        left = graph.node("Where", [graph.node("Equal", [numbers, choice]), never, left])
    return graph.node("Concat", choices, axis=-1), graph.node("Concat", weights, axis=-1)


def _ranked(graph: Graph, scores: str, part: Router) -> str:
    """What experts are ranked by."""
    if part.rule == "best":
        return scores
    return graph.node("Softmax", [scores], axis=-1) if part.rule == "softmax" else graph.node("Sigmoid", [scores])


def _in_best_groups(graph: Graph, choice: str, part: Router) -> str:
    """The same, without experts of groups that are not among the best by the sum of their best."""
    groups = grouped(graph, choice, part.groups)
    best, least = graph.name("best"), graph.name("least")
    some, few = (graph.constant(f"k{k}", np.array([k], np.int64)) for k in (part.group_best, part.group_k))
    graph.nodes("TopK", [groups, some], [best, graph.name("places")], axis=-1)
    last = graph.constant("last", np.array([-1], np.int64))
    sums = graph.node("ReduceSum", [best, last], keepdims=0)
    graph.nodes("TopK", [sums, few], [least, graph.name("places")], axis=-1)
    worst = graph.node("ReduceMin", [least], axes=[-1], keepdims=1)
    high = graph.node("Unsqueeze", [graph.node("GreaterOrEqual", [sums, worst]), last])
    return flat(graph, graph.node("Where", [high, groups, graph.constant("never", NEVER)]))
