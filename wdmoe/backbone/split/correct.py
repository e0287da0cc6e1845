"""Closed-form repair: refit output weights so that what is kept stands in for what is dropped."""

from __future__ import annotations

import torch


def refit(
    features: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, start: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Weighted least squares that is pulled towards the weights there were.

    Minimises sum_t weight_t |features_t @ W - target_t|^2 + ridge * sum_i d_i |W_i - start_i|^2, where d_i is the
    weighted energy of feature i, so that a feature seen little stays what it was.

    Args:
        features: (tokens, features), zeros where a token's expert is not kept.
        target: (tokens, width).
        weight: (tokens,).
        start: (features, width).
    Returns:
        (features, width).
    """
    weighted = features * weight[:, None]
    normal = weighted.T @ features
    energy = normal.diagonal().clone()
    normal.diagonal().add_(ridge * energy + 1e-6 * energy.mean() + 1e-30)
    change = torch.cholesky_solve(weighted.T @ (target - features @ start), torch.linalg.cholesky(normal))
    return start + change
