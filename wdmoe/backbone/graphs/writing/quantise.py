"""Weights in 8 or 4 bits by blocks along a matrix's input side, as ONNX Runtime's MatMulNBits takes them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array

BLOCK = 32


def quantised(matrix: Float32Array, bits: int) -> tuple[npt.NDArray[np.uint8], Float32Array]:
    """Symmetric, one scale for each block of 32.

    Args:
        matrix: (out, in), `in` divisible by 32.
        bits: 8 or 4.
    Returns:
        (out, in / 32, 32 * bits / 8) bytes, of which zero stands in the middle, and (out * in / 32) scales.
    """
    out, width = matrix.shape
    middle = 1 << (bits - 1)
    blocks = matrix.reshape(out, width // BLOCK, BLOCK)
    # The number of largest magnitude takes the end that has one step more, whatever its sign.
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    scale = np.take_along_axis(blocks, at, axis=-1) / -middle
    scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    whole = np.clip(np.rint(blocks / scale) + middle, 0, 2 * middle - 1).astype(np.uint8)
    if bits == 4:
        whole = whole[..., 0::2] | (whole[..., 1::2] << 4)
    return whole, scale.reshape(-1).astype(np.float32)
