"""The router: which experts help a token most, from its hidden state by one matrix."""

from __future__ import annotations

import torch

_RIDGE = 0.1  # relative to the mean diagonal of the normal equations


class RidgeSolver:
    """Ridge regression on one set of hidden states, factorised once for several targets."""

    def __init__(self, hidden: torch.Tensor) -> None:
        """`hidden`: (tokens, width), as the router sees it (after the norm)."""
        normal = hidden.T @ hidden
        normal.diagonal().add_(_RIDGE * normal.diagonal().mean() + 1e-30)
        self._factor = torch.linalg.cholesky(normal)
        self._hidden = hidden

    def solve(self, wanted: torch.Tensor) -> torch.Tensor:
        """(width, experts) such that `hidden @` it is near `wanted`, (tokens, experts)."""
        return torch.cholesky_solve(self._hidden.T @ wanted, self._factor)


def kept_mask(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """(tokens, experts): 1 at the `top_k` highest scores of each token, 0 elsewhere."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(top_k, dim=1).indices, 1.0)


def kept_weights(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Gate weights of the family (softmax over the kept logits) times `top_k`: near 1 where kept, 0 elsewhere.

    Args:
        logits: (tokens, experts).
    Returns:
        (tokens, experts), each row sums to `top_k`.
    """
    kept = logits.topk(top_k, dim=1)
    return torch.zeros_like(logits).scatter_(1, kept.indices, top_k * kept.values.softmax(1))


def gate_scale(scores: torch.Tensor, share: torch.Tensor) -> float:
    """Factor that makes softmax(factor * scores) closest to what experts really contribute.

    Least cross-entropy over a fixed grid; a policy reads this distribution as "how much does this expert matter".

    Args:
        scores: (tokens, experts) router outputs.
        share: (tokens, experts) each expert's part of a token's routed output, rows sum to 1.
    """
    spread = scores.std(dim=1).mean().clamp_min(1e-12)
    factors = torch.logspace(-1.5, 1.0, 26) / spread
    losses = [-(share * (factor * scores).log_softmax(1)).sum(1).mean() for factor in factors]
    return float(factors[int(torch.stack(losses).argmin())])
