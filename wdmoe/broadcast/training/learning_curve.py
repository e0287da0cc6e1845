"""What a learning curve shows of a codec: quality on pairs of the pictures to choose by, at one radio."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.model import BroadcastCodec
from wdmoe.broadcast.datasets.pictures import pair_up
from wdmoe.broadcast.quality.alpha_sweep import alpha_sweep, mean_psnr
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.broadcast.quality.front_comparison import FLOOR_DB
from wdmoe.broadcast.quality.metrics import hypervolume
from wdmoe.broadcast.training.training import Row
from wdmoe.errors import ConfigError

SNR_DB, CBR, ALPHAS = (10.0, 5.0), 1 / 6, (0.0, 0.25, 0.5, 0.75, 1.0)
AREA = "hypervolume_db2"  # a column
_SHOWN = (0, 2, 4)  # places of the alphas that have columns of their own


class Curve:
    """Measures a codec on pairs of different classes."""

    def __init__(self, pixels: Pixels, labels: npt.ArrayLike, choose: npt.ArrayLike, count: int) -> None:
        """Pictures (picture, side, side, 3), their classes (picture,), numbers to choose by, and how many pairs.

        Raises:
            ConfigError: there are not so many pairs.
        """
        pairs = pair_up("different class", choose, labels)
        if not 1 <= count <= len(pairs):
            raise ConfigError(f"--curve-pairs must be from 1 to {len(pairs)}, got {count}")
        spread = np.linspace(0, len(pairs) - 1, count).round().astype(int)
        self._pixels, self._pairs = pixels, pairs[spread]

    def measure(self, codec: BroadcastCodec) -> Row:
        """Mean PSNRs and hypervolume, by column."""
        radio = Radio(snr_db=SNR_DB, seed=1)
        front = alpha_sweep(codec, self._pixels, self._pairs, ALPHAS, radio, codec.settings.kept(CBR))
        quality = mean_psnr(front)
        row = {psnr_column(user, ALPHAS[p]): float(quality[p, user - 1]) for p in _SHOWN for user in (1, 2)}
        return {**row, AREA: float(hypervolume(quality, (FLOOR_DB, FLOOR_DB)))}


def psnr_column(user: int, alpha: float) -> str:
    """The column of a user's (1 or 2) mean PSNR, dB."""
    return f"psnr_{user} alpha {alpha:g}"
