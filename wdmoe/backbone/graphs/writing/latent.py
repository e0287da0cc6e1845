"""Latent attention (MLA) as attention of many queries over one key a token, written into a graph.

A head's key is K c with the token's latent vector c, so its score q K c is that of the query q K with c itself. Its
output is the mean of V c, which is V times the mean of c. So the cache holds c once, and not a key and a value of each
head; attention takes some more arithmetic [DeepSeek-V2, 2024, section 2.1].
"""

from __future__ import annotations

from collections.abc import Sequence

from wdmoe.arrays import Float32Array
from wdmoe.backbone.graphs.writing.graph import Graph
from wdmoe.backbone.graphs.writing.pieces import biased, flat, grouped, norm, split
from wdmoe.backbone.graphs.writing.plan import Attention, Latent

EPSILON = 1e-6  # of norms of latent vectors, whatever config.json says of the others


def query_key_value(graph: Graph, x: str, part: Attention, latent: Latent) -> Sequence[str]:
    """What attention takes of each token. The rotated part of each head comes first, where attention looks for it."""
    both = biased(graph, x, f"{part.prefix}kv_a_proj_with_mqa")
    vector, rotated = split(graph, both, latent.rank, latent.rotated)
    vector = norm(graph, vector, f"{part.prefix}kv_a_layernorm.weight", EPSILON)
    key = graph.node("Concat", [rotated, vector], axis=-1)
    return [graph.node("Concat", [_query(graph, x, part, latent), key, key], axis=-1)]


def attended(graph: Graph, attention: str, part: Attention, latent: Latent) -> str:
    """What each head read: of attention's output, which are means of the vectors."""
    _, means = split(graph, grouped(graph, attention, part.heads), latent.rotated, latent.rank)
    values = _matrices(graph, part, latent)[:, latent.plain :].transpose(0, 2, 1)
    return flat(graph, _by_head(graph, means, f"{part.prefix}values", values))


def _query(graph: Graph, x: str, part: Attention, latent: Latent) -> str:
    if graph.has(f"{part.prefix}q_proj.weight"):
        query = biased(graph, x, f"{part.prefix}q_proj")
    else:
        narrow = biased(graph, x, f"{part.prefix}q_a_proj")
        narrow = norm(graph, narrow, f"{part.prefix}q_a_layernorm.weight", EPSILON)
        query = biased(graph, narrow, f"{part.prefix}q_b_proj")
    plain, rotated = split(graph, grouped(graph, query, part.heads), latent.plain, latent.rotated)
    keys = _matrices(graph, part, latent)[:, : latent.plain]
    plain = _by_head(graph, plain, f"{part.prefix}keys", keys)
    return flat(graph, graph.node("Concat", [rotated, plain], axis=-1))


def _matrices(graph: Graph, part: Attention, latent: Latent) -> Float32Array:
    """(heads, plain + value, rank): from the vector to a head's key, and below it to its value."""
    return graph.value(f"{part.prefix}kv_b_proj.weight").reshape(part.heads, -1, latent.rank)


def _by_head(graph: Graph, x: str, name: str, matrices: Float32Array) -> str:
    """(tokens, heads, in) times (heads, in, out). The matrices stay as they are: no operator takes fewer bits here."""
    turned = graph.node("Transpose", [x], perm=[1, 0, 2])
    y = graph.node("MatMul", [turned, graph.constant(name, matrices)])
    return graph.node("Transpose", [y], perm=[1, 0, 2])
