"""Where the waveform comes from: the codec's encoder over two pictures, some blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.blocks import BlockPlan
from wdmoe.broadcast.codec.model import BroadcastCodec, as_pictures
from wdmoe.broadcast.codec.tiling import SIDE, Grid
from wdmoe.errors import BundleError


@dataclass(frozen=True, slots=True)
class SymbolSource:
    """Two pictures to be sent. Raises ConfigError where the codec has no such rate."""

    codec: BroadcastCodec
    pair: tuple[Pixels, Pixels]
    snr_db: tuple[float, float]
    alpha: float
    cbr: float

    def __post_init__(self) -> None:
        self.codec.settings.kept(self.cbr)

    @property
    def plan(self) -> BlockPlan:
        """Which tiles share a block."""
        first, second = (Grid(*picture.shape[:2]) for picture in self.pair)
        return BlockPlan((first, second))

    @property
    def uses(self) -> int:
        """Complex channel uses of a block."""
        settings = self.codec.settings
        return (SIDE // settings.patch) ** 2 * settings.kept(self.cbr)

    def symbols(self, first: int, last: int) -> npt.NDArray[np.float16]:
        """Blocks `first` to before `last`: (block, use, 2), mean power 1 in each.

        Raises:
            BundleError: the model gives something else.
        """
        plan, kept = self.plan, self.codec.settings.kept(self.cbr)
        blocks = last - first
        with torch.inference_mode():
            symbols = self.codec.encode(
                as_pictures(plan.pictures(self.pair, first, last)),
                torch.tensor([self.snr_db] * blocks, dtype=torch.float32),
                torch.from_numpy(plan.alpha(first, last, self.alpha)),
                torch.full((blocks,), kept),
            )
        sent = symbols[:, :, :kept].reshape(blocks, -1, 2).numpy().astype(np.float16)
        power = (sent.astype(np.float32) ** 2).sum(axis=2).mean(axis=1)
        if not np.all(np.abs(power - 1) < 1e-3):  # also refuses NaN
            raise BundleError("the model's symbols are not of mean power 1: it is damaged, or was never trained")
        return sent
