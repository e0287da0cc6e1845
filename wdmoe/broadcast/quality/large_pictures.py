"""PSNR and SSIM of large pictures, strip by strip: the same figures as of the whole, without its memory."""

from __future__ import annotations

import math

import numpy as np

from wdmoe.arrays import Pixels
from wdmoe.broadcast.quality.metrics import MOST_PSNR_DB, ssim

_WINDOW = 11  # rows and columns that one value of SSIM looks at
_STRIP = 256  # rows


def picture_psnr_db(wanted: Pixels, got: Pixels) -> float:
    """As `wdmoe.broadcast.quality.metrics.psnr_db`, of one picture (height, width, 3)."""
    squares = 0.0
    for top in range(0, len(wanted), _STRIP):
        part = wanted[top : top + _STRIP].astype(np.float32) - got[top : top + _STRIP]
        squares += float((part**2).sum(dtype=np.float64))
    mean = squares / wanted.size
    return MOST_PSNR_DB if not mean else min(MOST_PSNR_DB, 10 * math.log10(255**2 / mean))


def picture_ssim(wanted: Pixels, got: Pixels) -> float | None:
    """As `wdmoe.broadcast.quality.metrics.ssim`, of one picture; None where a side is below its window's 11 pixels."""
    if min(wanted.shape[:2]) < _WINDOW:
        return None
    total, count = 0.0, len(wanted) - _WINDOW + 1
    for top in range(0, count, _STRIP):
        values = min(_STRIP, count - top)
        rows = slice(top, top + values + _WINDOW - 1)
        total += values * float(ssim(wanted[rows][None], got[rows][None])[0])
    return total / count
