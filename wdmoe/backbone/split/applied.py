"""Weights of a dense model and what was decided about them become those of the split model. NumPy only.

No calibration, nothing measured, and the same bytes on every machine: `wdmoe.backbone.split.decisions` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from wdmoe.arrays import Float32Array
from wdmoe.backbone.split.decisions import MATRICES, Decisions
from wdmoe.backbone.split.settings import Progress, SplitSettings, quiet
from wdmoe.errors import BundleError

_NORMS = {"input_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """The MoE block that replaces one FFN, as `wdmoe.backbone.split.layer.SplitLayer`."""

    router: Float32Array  # (experts, width)
    gate_up: Float32Array  # (experts, 2 * size, width), gate rows first
    down: Float32Array  # (experts, width, size), times top_k because gate weights sum to 1
    shared_gate_up: Float32Array  # (2 * shared, width)
    shared_down: Float32Array  # (width, shared)


def split_settings(dense_neurons: int, decisions: Decisions) -> SplitSettings:
    """The settings of a split of the same form."""
    owners = decisions.tensors["assignment"][0]
    return SplitSettings(
        experts=decisions.experts,
        shared=float((owners == decisions.experts).sum()) / dense_neurons,
        top_k=decisions.top_k,
        gate_temperature=decisions.gate_temperature,
    )


def check_source(decisions: Decisions, name: str, sha256: str, shape: tuple[int, int, int]) -> None:
    """Refuse another model than the decisions are about.

    Args:
        name, sha256: of the dense model's file.
        shape: its layers, neurons of an FFN, and width.
    Raises:
        BundleError: it is another one.
    """
    if sha256 != decisions.source_sha256:
        raise BundleError(f"the decisions are about a file with SHA-256 {decisions.source_sha256}, {name} has {sha256}")
    ours = (decisions.layers, decisions.tensors["assignment"].shape[1], decisions.tensors["router"].shape[2])
    if ours != shape:
        raise BundleError(f"the decisions are about {ours} layers, neurons and width, the model has {shape}")


def apply_to_weights(
    weights: Mapping[str, Float32Array], decisions: Decisions, progress: Progress = quiet
) -> tuple[dict[str, Float32Array], list[LayerParts]]:
    """The dense weights with their corrections, and each layer's FFN cut.

    Args:
        weights: of the model that `check_source` let pass; what is not changed is shared with the result.
        progress: told ("build", fraction done).
    """
    made = dict(weights)
    layers = []
    for layer in range(decisions.layers):
        made.update(_corrected(made, decisions, layer))
        layers.append(_cut(made, decisions, layer))
        progress("build", (layer + 1) / decisions.layers)
    if "final_norm" in decisions.tensors:
        made["model.norm.weight"] = np.array(decisions.tensors["final_norm"])
    return made, layers


def _corrected(
    weights: Mapping[str, Float32Array], decisions: Decisions, layer: int
) -> Iterator[tuple[str, Float32Array]]:
    """Names and new values of what the decisions change in a layer of the dense model."""
    at = f"model.layers.{layer}."
    for matrix in decisions.corrected:
        name = f"{at}{MATRICES[matrix]}.weight"
        yield name, decisions.correction(matrix, layer).added_to(weights[name])
    for norm, module in _NORMS.items():
        if norm in decisions.tensors:
            yield f"{at}{module}.weight", np.array(decisions.tensors[norm][layer])


def _cut(weights: Mapping[str, Float32Array], decisions: Decisions, layer: int) -> LayerParts:
    """One FFN's matrices by experts."""
    gate, up, down = (weights[f"model.layers.{layer}.{MATRICES[name]}.weight"] for name in ("gate", "up", "down"))
    if "neuron_scale" in decisions.tensors:
        down = down * decisions.tensors["neuron_scale"][layer]
    owners = decisions.tensors["assignment"][layer]
    order = np.argsort(owners, kind="stable")
    routed = int((owners < decisions.experts).sum())
    members, shared = order[:routed].reshape(decisions.experts, -1), order[routed:]
    return LayerParts(
        router=np.array(decisions.tensors["router"][layer]),
        gate_up=np.concatenate([gate[members], up[members]], axis=1),
        down=np.ascontiguousarray(down.T[members].transpose(0, 2, 1)) * np.float32(decisions.top_k),
        shared_gate_up=np.concatenate([gate[shared], up[shared]]),
        shared_down=np.ascontiguousarray(down[:, shared]),
    )
