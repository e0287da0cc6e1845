"""One dense FFN becomes a shared part, experts and a router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from wdmoe.backbone.split.calibrate import Streams, activations
from wdmoe.backbone.split.cluster import co_activation_clusters, expert_energy, routed_clusters, strongest
from wdmoe.backbone.split.correct import refit
from wdmoe.backbone.split.router import RidgeSolver, gate_scale, kept_weights
from wdmoe.backbone.split.settings import SplitSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLayer:
    """The MoE block that replaces one FFN, in the shapes of transformers' granitemoeshared."""

    router: torch.Tensor  # (experts, width)
    gate_up: torch.Tensor  # (experts, 2 * size, width), gate rows first
    down: torch.Tensor  # (experts, width, size), times top_k because gate weights sum to 1
    shared_gate_up: torch.Tensor  # (2 * shared, width)
    shared_down: torch.Tensor  # (width, shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCut:
    """How one FFN is cut, and what it computes on the calibration tokens when it is."""

    shared: torch.Tensor  # (count,) neurons, ascending
    members: torch.Tensor  # (experts, size) neurons of each expert
    router: torch.Tensor  # (width, experts)
    features: torch.Tensor  # (tokens, neurons) as the gate masks them: shared, then expert by expert
    start: torch.Tensor  # (neurons, width) the dense output weights in that order
    wanted: torch.Tensor | None  # (tokens, width) output that brings the split stream back to the dense one
    weight: torch.Tensor  # (tokens,) what an error counts


def split_layer(layer: Any, streams: Streams, settings: SplitSettings) -> SplitLayer:
    """Cut one layer's FFN; both streams, which stand after its attention, move past it.

    Args:
        layer: a LlamaDecoderLayer.
    """
    cut = cut_layer(layer, streams, settings)
    output_weights = cut.start
    if cut.wanted is not None:
        output_weights = refit(cut.features, cut.wanted, cut.weight, cut.start, settings.ridge)
    streams.add_split(cut.features @ output_weights)
    return _assemble(layer, cut.shared, cut.members, cut.router, output_weights, settings.top_k)


def cut_layer(layer: Any, streams: Streams, settings: SplitSettings) -> LayerCut:
    """Decide one layer's cut and router; the dense stream moves past it, the split one is the caller's to move."""
    before = streams.split.flatten(0, 1)
    hidden = layer.post_attention_layernorm(before)
    acts = activations(layer, hidden)
    down = layer.mlp.down_proj.weight
    weight = _token_weights(before)
    size = settings.expert_size(len(down.T))
    shared, routed = strongest(acts, down, weight, len(down.T) - settings.experts * size)
    members = _experts(acts, down, hidden, weight, routed, settings)

    energy = expert_energy(acts, down, members) * weight[:, None]
    router = RidgeSolver(hidden).solve(energy.sqrt())
    scores = hidden @ router
    scale = gate_scale(scores, energy / energy.sum(1, keepdim=True).clamp_min(1e-20)) * settings.gate_temperature
    kept = kept_weights(scale * scores, settings.top_k)

    order = torch.cat([shared, members.flatten()])
    features = acts[:, order]
    features[:, len(shared) :].view(-1, settings.experts, size).mul_(kept[:, :, None])
    streams.step_dense(layer)
    return LayerCut(
        shared=shared,
        members=members,
        router=router * scale,
        features=features,
        start=down.T[order],
        wanted=None if streams.dense is None else streams.dense.flatten(0, 1) - before,
        weight=weight,
    )


def _experts(
    acts: torch.Tensor,
    down: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    routed: torch.Tensor,
    settings: SplitSettings,
) -> torch.Tensor:
    """(experts, size) neurons of each expert."""
    seen, out = acts[:, routed] * weight.sqrt()[:, None], down[:, routed]
    owner = co_activation_clusters(seen, settings.experts, settings.seed, settings.cluster_tokens)
    owner = routed_clusters(
        seen[: settings.refine_tokens],
        out,
        hidden[: settings.refine_tokens],
        owner,
        settings.top_k,
        settings.refine_rounds,
    )
    return routed[owner.argsort(stable=True)].view(settings.experts, -1)


def _token_weights(hidden: torch.Tensor) -> torch.Tensor:
    """(tokens,) 1 / mean square of the hidden state: the next norm divides by it, so that errors count relatively.

    It also keeps the few tokens with huge hidden states (the first of a text) from ruling every fit.
    """
    return 1 / hidden.square().mean(1).clamp_min(1e-12)


def _assemble(
    layer: Any,
    shared: torch.Tensor,
    members: torch.Tensor,
    router: torch.Tensor,
    output_weights: torch.Tensor,
    top_k: int,
) -> SplitLayer:
    experts, size = members.shape
    gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
    routed = output_weights[len(shared) :].view(experts, size, -1).transpose(1, 2)
    return SplitLayer(
        router=router.T.contiguous(),
        gate_up=torch.cat([gate[members], up[members]], dim=1),
        down=(routed * top_k).contiguous(),
        shared_gate_up=torch.cat([gate[shared], up[shared]]),
        shared_down=output_weights[: len(shared)].T.contiguous(),
    )
