"""The bounds of an expert's outputs, measured when it is exported: a base station doubts answers far outside. No torch.

What experts take comes out of a norm, so its size is known without any text: random vectors of unit mean square stand
for tokens, after the norm of the experts' own layer. Real ones differ (docs/bundle.md has the margins), which is why a
base station only looks twice at an answer outside the bounds.
"""

from __future__ import annotations

import math

import numpy as np

from wdmoe.arrays import Float32Array

PROBES = 16
_SEED = 20240623


def unit_tokens(width: int) -> Float32Array:
    """(PROBES, width) random vectors of unit mean square, the same in every export."""
    tokens = np.random.default_rng(_SEED).standard_normal((PROBES, width))
    tokens /= np.sqrt(np.mean(np.square(tokens), axis=1, keepdims=True))
    return tokens.astype(np.float32)


def output_norm(outputs: Float32Array) -> tuple[float, float] | None:
    """Least and largest norm of an expert's outputs, rounded outwards to powers of two.

    So the last digits of a product, which differ from machine to machine, do not show in the bundle.

    Args:
        outputs: (probes, width)
    Returns:
        None where they are not finite.
    """
    norms = np.linalg.norm(outputs.astype(np.float64), axis=1)
    if not np.isfinite(norms).all():
        return None
    least, largest = float(norms.min()), float(norms.max())
    low = 2.0 ** math.floor(math.log2(least)) if least > 0 else 0.0
    return low, 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 0.0
