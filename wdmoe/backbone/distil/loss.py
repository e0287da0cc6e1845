"""How far the split model is from the dense one, and the gradient of that."""

from __future__ import annotations

import torch
from torch.nn import functional

_TOKENS_AT_ONCE = 128  # bounds the memory of the distributions
_TINY = 1e-12


@torch.no_grad()
def divergence(
    given: torch.Tensor, wanted: torch.Tensor, head: torch.Tensor, *, value: bool
) -> tuple[float, torch.Tensor]:
    """Kullback-Leibler divergence of next-token distributions over the whole vocabulary.

    Written out, since autograd would keep several arrays of tokens x vocabulary.

    Args:
        given: (tokens, width) last hidden states of the split model.
        wanted: (tokens, width) of the dense model.
        head: (vocabulary, width).
        value: False: only the gradient is wanted, which is faster.
    Returns:
        Sum over tokens of KL(dense || split) in nats (NaN if not wanted), and its gradient for `given`.
    """
    total, gradient = 0.0 if value else float("nan"), torch.empty_like(given)
    for start in range(0, len(given), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        ours, theirs = (functional.softmax(x[part] @ head.T, -1, dtype=torch.float32) for x in (given, wanted))
        if value:
            total += float((theirs * ((theirs + _TINY).log() - (ours + _TINY).log())).sum())
        gradient[part] = ours.sub_(theirs).to(head.dtype) @ head
    return total, gradient


def stream_error(given: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
    """Sum over tokens of the squared error of hidden states relative to their energy, mean over layers.

    Args:
        given: of the split model, one (windows, length, width) a layer.
        wanted: of the dense model.
    """
    errors = [((x - y).square().sum(-1) / y.square().sum(-1)).sum() for x, y in zip(given, wanted, strict=True)]
    return torch.stack(errors).mean()
