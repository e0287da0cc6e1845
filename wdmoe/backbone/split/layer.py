"""One dense FFN becomes a shared part, experts and a router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from wdmoe.backbone.split.calibrate import Streams, activations
from wdmoe.backbone.split.cluster import co_activation_clusters, strongest
from wdmoe.backbone.split.correct import refit
from wdmoe.backbone.split.router import gate_scale, kept_weights, ridge_router
from wdmoe.backbone.split.settings import SplitSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLayer:
    """The MoE block that replaces one FFN, in the shapes of transformers' granitemoeshared."""

    router: torch.Tensor  # (experts, width)
    gate_up: torch.Tensor  # (experts, 2 * size, width), gate rows first
    down: torch.Tensor  # (experts, width, size), times top_k because gate weights sum to 1
    shared_gate_up: torch.Tensor  # (2 * shared, width)
    shared_down: torch.Tensor  # (width, shared)


def split_layer(layer: Any, streams: Streams, settings: SplitSettings) -> SplitLayer:
    """Cut one layer's FFN; both streams, which stand after its attention, move past it.

    Args:
        layer: a LlamaDecoderLayer.
    """
    before = streams.split.flatten(0, 1)
    hidden = layer.post_attention_layernorm(before)
    acts = activations(layer, hidden)
    down = layer.mlp.down_proj.weight
    weight = _token_weights(before)
    target = acts @ down.T

    size = settings.expert_size(len(down.T))
    shared, routed = strongest(acts, down, weight, len(down.T) - settings.experts * size)
    owner = co_activation_clusters(acts[:, routed] * weight.sqrt()[:, None], settings.experts, settings.seed)
    members = routed[owner.argsort(stable=True)].view(settings.experts, size)

    energy = _expert_energy(acts, down, members)
    scores = hidden @ (router := ridge_router(hidden, energy.sqrt() * weight.sqrt()[:, None], torch.ones_like(weight)))
    scale = gate_scale(scores, energy / energy.sum(1, keepdim=True).clamp_min(1e-20)) * settings.gate_temperature
    kept = kept_weights(scale * scores, settings.top_k)

    order = torch.cat([shared, members.flatten()])
    features = acts[:, order]
    features[:, len(shared) :].view(-1, settings.experts, size).mul_(kept[:, :, None])
    output_weights = down.T[order]
    if settings.correct:
        streams.step_dense(layer)
        wanted = streams.dense.flatten(0, 1) - before
        output_weights = refit(features, wanted, weight, output_weights, settings.ridge)
    del target
    streams.add_split(features @ output_weights)
    return _assemble(layer, shared, members, router * scale, output_weights, settings.top_k)


def _token_weights(hidden: torch.Tensor) -> torch.Tensor:
    """(tokens,) 1 / mean square of the hidden state: the next norm divides by it, so that errors count relatively.

    It also keeps the few tokens with huge hidden states (the first of a text) from ruling every fit.
    """
    return 1 / hidden.square().mean(1).clamp_min(1e-12)


def _expert_energy(acts: torch.Tensor, down: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """(tokens, experts) squared norm of each expert's output."""
    outputs = (acts[:, neurons] @ down[:, neurons].T for neurons in members)
    return torch.stack([output.square().sum(1) for output in outputs], dim=1)


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
