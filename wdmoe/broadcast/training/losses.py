"""What training makes small, from both users' errors and the ratio alpha that says how much the first one matters.

`sum`       mean square errors as they are: alpha is left to the fusion alone
`weighted`  alpha times the first user's error, 1 - alpha times the second's
`region`    ours [D]: the same weights, but on each picture's error in decibels, and the worse user weighs more

Regions are drawn in mean PSNR, that is in decibels of each picture. Mean square errors spend nearly all effort on the
user and on the pictures that are bad anyway; decibels give a point more of quality the same worth everywhere. A
weighted sum of qualities ends at the corners of a region that is not convex, so the users are joined by an exponential
mean, which also reaches what lies between: with a sharpness near 0 it is the weighted sum, with a large one the worse
user decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHARPNESS = 0.1  # per dB
_LEAST_ERROR = 1e-5  # 50 dB: better is not asked for


def plain_sum(error: Tensor, alpha: Tensor) -> Tensor:
    """Sum of both users' errors (block, 2), mean squares, mean over blocks; `alpha` (block,) is not looked at."""
    return error.sum(dim=1).mean()


def weighted_sum(error: Tensor, alpha: Tensor) -> Tensor:
    """Errors weighted by alpha and 1 - alpha, mean over blocks. `error`: (block, 2) mean squares; `alpha`: (block,)."""
    return (_weights(alpha) * error).sum(dim=1).mean()


def region(error: Tensor, alpha: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """Exponential mean of the users' errors in dB, weighted by alpha and 1 - alpha; mean over blocks, in dB.

    Args:
        error: (block, 2) mean squares, peak 1.
        alpha: (block,) 0 to 1; at the ends one user's error does not count at all.
        sharpness: per dB, above 0.
    """
    decibels = 10 * torch.log10(error.clamp_min(_LEAST_ERROR))
    weight = _weights(alpha)
    joined = torch.logsumexp(sharpness * decibels + torch.log(weight.clamp_min(1e-30)), dim=1) / sharpness
    return joined.mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": plain_sum,
    "weighted": weighted_sum,
    "region": region,
}


def _weights(alpha: Tensor) -> Tensor:
    return torch.stack([alpha, 1 - alpha], dim=1)
