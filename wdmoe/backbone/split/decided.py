"""A dense model and what was decided about it become the split model: no calibration, nothing measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from wdmoe.arrays import Float32Array
from wdmoe.backbone.split.decisions import MATRICES, Decisions
from wdmoe.backbone.split.dense import DenseModel, Weights
from wdmoe.backbone.split.layer import SplitLayer
from wdmoe.backbone.split.settings import Progress, SplitSettings, quiet
from wdmoe.errors import BundleError

_NORMS = {"input_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def split_settings(dense_neurons: int, decisions: Decisions) -> SplitSettings:
    """The settings of a split of the same form."""
    owners = decisions.tensors["assignment"][0]
    return SplitSettings(
        experts=decisions.experts,
        shared=float((owners == decisions.experts).sum()) / dense_neurons,
        top_k=decisions.top_k,
        gate_temperature=decisions.gate_temperature,
    )


def apply_decisions(
    source: DenseModel, decisions: Decisions, progress: Progress = quiet
) -> tuple[DenseModel, list[SplitLayer]]:
    """The dense model with its corrections outside the FFNs, and each layer's FFN cut.

    Args:
        source: read from the file that the decisions are about; what is not changed is shared with the result.
        progress: told ("build", fraction done).
    Returns:
        Both, for `moe_model`.
    Raises:
        BundleError: the decisions are about another model.
    """
    _check(source, decisions)
    weights = dict(source.weights)
    layers = []
    for layer in range(decisions.layers):
        weights.update(_corrected(source, decisions, layer))
        layers.append(_cut(weights, decisions, layer))
        progress("build", (layer + 1) / decisions.layers)
    if "final_norm" in decisions.tensors:
        weights["model.norm.weight"] = torch.from_numpy(np.array(decisions.tensors["final_norm"]))
    return replace(source, weights=weights), layers


def _check(source: DenseModel, decisions: Decisions) -> None:
    if source.sha256 != decisions.source_sha256:
        raise BundleError(
            f"the decisions are about a file with SHA-256 {decisions.source_sha256}, {source.name} has {source.sha256}"
        )
    config = source.config
    ours = (decisions.layers, decisions.tensors["assignment"].shape[1], decisions.tensors["router"].shape[2])
    theirs = (config.num_hidden_layers, config.intermediate_size, config.hidden_size)
    if ours != theirs:
        raise BundleError(f"the decisions are about {ours} layers, neurons and width, the model has {theirs}")


def _corrected(source: DenseModel, decisions: Decisions, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and new values of what the decisions change in a layer of the dense model."""
    at = f"model.layers.{layer}."
    for matrix in decisions.corrected:
        name = f"{at}{MATRICES[matrix]}.weight"
        yield name, torch.from_numpy(decisions.correction(matrix, layer).added_to(_array(source.weights[name])))
    for norm, module in _NORMS.items():
        if norm in decisions.tensors:
            yield f"{at}{module}.weight", torch.from_numpy(np.array(decisions.tensors[norm][layer]))


def _cut(weights: Weights, decisions: Decisions, layer: int) -> SplitLayer:
    """One FFN's matrices by experts."""
    gate, up, down = (weights[f"model.layers.{layer}.{MATRICES[name]}.weight"] for name in ("gate", "up", "down"))
    if "neuron_scale" in decisions.tensors:
        down = down * torch.from_numpy(np.array(decisions.tensors["neuron_scale"][layer]))
    owners = torch.from_numpy(np.array(decisions.tensors["assignment"][layer], dtype=np.int64))
    order = owners.argsort(stable=True)
    routed = int((owners < decisions.experts).sum())
    members, shared = order[:routed].view(decisions.experts, -1), order[routed:]
    return SplitLayer(
        router=torch.from_numpy(np.array(decisions.tensors["router"][layer])),
        gate_up=torch.cat([gate[members], up[members]], dim=1),
        down=(down.T[members].transpose(1, 2) * decisions.top_k).contiguous(),
        shared_gate_up=torch.cat([gate[shared], up[shared]]),
        shared_down=down[:, shared].contiguous(),
    )


def _array(weight: torch.Tensor) -> Float32Array:
    array: Float32Array = weight.numpy()
    return array
