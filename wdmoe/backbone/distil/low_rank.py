"""A low-rank correction in 8-bit whole numbers."""

from __future__ import annotations

import torch

_LARGEST = 127


def eight_bits(a: torch.Tensor, b: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """int8 factors and scales with `row_scale[:, None] * (b8 @ a8) * column_scale` near `b @ a`.

    The factors are balanced and then turned by a random rotation, so that every one of their entries carries about as
    much as the others: an error of about 1 % of the product, where rounding the factors as they come may cost more.

    Args:
        a: (rank, in) float32.
        b: (out, rank) float32.
    Returns:
        `a` (rank, in) and `b` (out, rank) int8, `row_scale` (out,) and `column_scale` (in,) float32.
    """
    left, right = _balanced(a.double(), b.double())
    turn = _rotation(left.shape[1], seed)
    left, right = left @ turn, turn.T @ right
    row_scale = (left.abs().amax(1) / _LARGEST).clamp_min(1e-20).float()
    column_scale = (right.abs().amax(0) / _LARGEST).clamp_min(1e-20).float()
    return {
        "a": _whole(right / column_scale),
        "b": _whole(left / row_scale[:, None]),
        "row_scale": row_scale,
        "column_scale": column_scale,
    }


def _balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, rank) and (rank, in) of the same product, both with the square roots of its singular values."""
    outer, inner = torch.linalg.qr(b), torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(outer.R @ inner.R.T, full_matrices=False)
    root = values.sqrt()
    return outer.Q @ left * root, (root[:, None] * right) @ inner.Q.T


def _rotation(size: int, seed: int) -> torch.Tensor:
    chooser = torch.Generator().manual_seed(seed)
    turn: torch.Tensor = torch.linalg.qr(torch.randn(size, size, generator=chooser, dtype=torch.float64)).Q
    return turn


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
