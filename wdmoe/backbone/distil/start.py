"""Where training begins: the cut and the routers, layer by layer, and what of the closed-form correction fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from wdmoe.backbone.distil.student import Cut
from wdmoe.backbone.split.calibrate import Streams, dense_model
from wdmoe.backbone.split.correct import refit
from wdmoe.backbone.split.dense import DenseModel
from wdmoe.backbone.split.layer import LayerCut, cut_layer
from wdmoe.backbone.split.settings import Progress, SplitSettings


@dataclass(frozen=True, slots=True)
class Start:
    """The cut, and per layer the factors of the correction of its down projection (rank, in) and (out, rank)."""

    cut: Cut
    factors: list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def decide_start(
    source: DenseModel, windows: torch.Tensor, settings: SplitSettings, rank: int, progress: Progress
) -> Start:
    """Decide cut and routers as `split_checkpoint` does, but correct with a rank only.

    Args:
        windows: (windows, length) int64 of calibration text.
        rank: of the corrections.
        progress: told ("cut", fraction done).
    """
    model = dense_model(source)
    streams = Streams(model, windows, with_dense=True)
    owners, routers, factors = [], [], []
    for index, layer in enumerate(model.model.layers):
        progress("cut", index / len(model.model.layers))
        streams.attend(layer)
        cut = cut_layer(layer, streams, settings)
        inner, outer = _projected(cut, settings.ridge, rank)
        streams.add_split(cut.features @ (cut.start + inner @ outer.T))
        owners.append(_owners(cut))
        routers.append(cut.router.T.contiguous())
        factors.append((_in_place(inner, cut).T.contiguous(), outer.contiguous()))
    progress("cut", 1.0)
    return Start(Cut(torch.stack(owners), torch.stack(routers), settings.top_k), factors)


def _projected(cut: LayerCut, ridge: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(neurons, rank) and (width, rank) whose product is the full correction in the directions where it does most.

    Of all projections of its output onto `rank` directions, the one that keeps most of its weighted energy.
    """
    wanted: Any = cut.wanted  # there is a dense stream
    change = refit(cut.features, wanted, cut.weight, cut.start, ridge) - cut.start
    output = (cut.features @ change) * cut.weight.sqrt()[:, None]
    directions = torch.linalg.eigh((output.T @ output).double()).eigenvectors[:, -rank:].float()
    left, values, right = torch.linalg.svd(change @ directions, full_matrices=False)
    root = values.sqrt()  # as much in one factor as in the other: both are trained at one rate
    return left * root, directions @ right.T * root


def _order(cut: LayerCut) -> torch.Tensor:
    return torch.cat([cut.shared, cut.members.flatten()])


def _in_place(rows: torch.Tensor, cut: LayerCut) -> torch.Tensor:
    """(neurons, n) in the order of `features` -> in the order of the dense model."""
    return torch.empty_like(rows).index_copy_(0, _order(cut), rows)


def _owners(cut: LayerCut) -> torch.Tensor:
    """(neurons,) expert of each; the number of experts where it is shared."""
    experts, size = cut.members.shape
    owners = torch.full((len(cut.shared) + experts * size,), experts)
    owners[cut.members.flatten()] = torch.arange(experts).repeat_interleave(size)
    return owners
