"""Both users' qualities at the points of a sweep: what every system here gives, and all that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.broadcast.quality.metrics import MS_SSIM_SIDE, ms_ssim, psnr_db, ssim

QUALITIES = ("psnr_db", "ssim", "ms_ssim")


@dataclass(frozen=True, slots=True)
class Front:
    """Both users' qualities over a sweep of the share that the first one has."""

    share: FloatArray  # (point,)
    psnr_db: FloatArray  # (point, pair, 2)
    ssim: FloatArray  # (point, pair, 2)
    ms_ssim: FloatArray  # (point, pair, 2), not a number where pictures are too small for it

    def of(self, pairs: npt.ArrayLike | slice) -> Front:
        """The front of some of the pairs."""
        return Front(self.share, *(getattr(self, name)[:, pairs] for name in QUALITIES))


def qualities_of(wanted: npt.ArrayLike, got: npt.ArrayLike) -> FloatArray:
    """(picture, quality) of pictures (picture, height, width, channel), 0 to 255, in the order of `QUALITIES`."""
    one = np.asarray(wanted)
    large = min(one.shape[1:3]) >= MS_SSIM_SIDE
    scales = ms_ssim(one, got) if large else np.full(len(one), np.nan)
    return np.stack([psnr_db(one, got), ssim(one, got), scales], axis=-1)


def front_of(share: npt.ArrayLike, found: FloatArray) -> Front:
    """A front of qualities (point, pair, user, quality)."""
    return Front(np.asarray(share, dtype=np.float64), *np.moveaxis(found, -1, 0))


def joined(fronts: Sequence[Front]) -> Front:
    """One front of the pairs of all; shares are those of the first."""
    parts = (np.concatenate([getattr(each, name) for each in fronts], axis=1) for name in QUALITIES)
    return Front(fronts[0].share, *parts)
