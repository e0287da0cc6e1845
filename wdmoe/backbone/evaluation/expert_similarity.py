"""How well one expert's output stands in for another's, measured while a model reads text."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wdmoe.errors import BundleError


class ExpertSimilarity:
    """Running sums of one MoE layer. Every expert of the layer reads every token, so a pass costs more than usual."""

    def __init__(self, experts: Any, count: int) -> None:
        """Prepare.

        Args:
            experts: the layer's experts module of transformers' experts interface, with its weights in memory.
            count: experts in it.
        Raises:
            BundleError: the module's weights are elsewhere, as on a base station.
        """
        if any(tensor.is_meta for tensor in experts.parameters()):
            raise BundleError("expert similarity needs the experts' weights: record it from a checkpoint")
        self._experts = experts
        self._count = count
        self._inner = torch.zeros(count, count, dtype=torch.float64)
        self._square = torch.zeros(count, count, dtype=torch.float64)

    @torch.no_grad()
    def hear(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        """Take the layer's tokens in.

        Args:
            hidden: (tokens, width).
            chosen: (tokens, top_k) expert indices; outside 0 to count - 1 where a slot is empty.
            weights: (tokens, top_k) gate weights.
        """
        share = self._shares(chosen, weights)
        outputs = torch.stack([self._output(hidden, expert) for expert in range(self._count)])
        for expert in range(self._count):
            rows = share[expert] > 0
            heard = (outputs[:, rows] * share[expert, rows, None].sqrt()).flatten(1)
            self._inner[expert] += (heard @ heard[expert]).double().cpu()
            self._square[expert] += heard.square().sum(1).double().cpu()

    def matrix(self) -> npt.NDArray[np.float16]:
        """(experts, experts): [i, j] is the cosine between i's and j's outputs over the tokens routed to i.

        Tokens count with their squared gate weight, since that is what their output adds to the layer's. With
        expert j times the best one scalar in the place of i, an error of sqrt(1 - cosine^2) of i's part remains.
        1 on the diagonal; 0 beside it where no token was routed to i.
        """
        own = self._square.diagonal()[:, None]
        scale = (own * self._square).sqrt()
        cosine = torch.where(scale > 0, self._inner / scale.clamp_min(1e-300), 0.0).clamp(-1, 1)
        cosine.fill_diagonal_(1.0)
        alike: npt.NDArray[np.float16] = cosine.numpy().astype(np.float16)
        return alike

    def _shares(self, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(experts, tokens) squared gate weight of each expert for each token, 0 where it was not chosen."""
        empty = (chosen < 0) | (chosen >= self._count)
        gate = torch.zeros(len(chosen), self._count, device=weights.device)
        gate.scatter_add_(1, chosen.masked_fill(empty, 0).long(), weights.float().masked_fill(empty, 0))
        return gate.square().T

    def _output(self, hidden: torch.Tensor, expert: int) -> torch.Tensor:
        """(tokens, width) float32 what one expert alone makes of the tokens. `forward`: hooks must not hear this."""
        index = torch.full((len(hidden), 1), expert, dtype=torch.long, device=hidden.device)
        output: torch.Tensor = self._experts.forward(hidden, index, torch.ones_like(index, dtype=hidden.dtype))
        return output.float()
