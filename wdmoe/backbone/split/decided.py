"""A dense model and what was decided about it become the split model, as tensors of torch."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from wdmoe.backbone.split.applied import LayerParts, apply_to_weights, check_source
from wdmoe.backbone.split.decisions import Decisions
from wdmoe.backbone.split.dense import DenseModel
from wdmoe.backbone.split.layer import SplitLayer
from wdmoe.backbone.split.settings import Progress, quiet


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
    config = source.config
    shape = (config.num_hidden_layers, config.intermediate_size, config.hidden_size)
    check_source(decisions, source.name, source.sha256, shape)
    arrays = {name: tensor.numpy() for name, tensor in source.weights.items()}
    made, layers = apply_to_weights(arrays, decisions, progress)
    kept = {name: source.weights[name] for name, array in made.items() if array is arrays.get(name)}
    weights = {name: kept[name] if name in kept else torch.from_numpy(array) for name, array in made.items()}
    return replace(source, weights=weights), [_tensors(layer) for layer in layers]


def _tensors(layer: LayerParts) -> SplitLayer:
    return SplitLayer(**{field.name: torch.from_numpy(getattr(layer, field.name)) for field in fields(layer)})
