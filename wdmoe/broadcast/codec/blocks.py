"""Which tiles of the two pictures share a block of symbols, and whose a block is where one picture has no tile left.

Block k carries tile k of both. Once the smaller picture is through, a block carries the larger one's tile alone: both
places hold that tile and alpha is 1 or 0, so its symbols are for one user only, and nobody is harmed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.tiling import Grid, cut


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Of two pictures."""

    grids: tuple[Grid, Grid]

    @property
    def blocks(self) -> int:
        """How many are sent."""
        return max(grid.tiles for grid in self.grids)

    @property
    def shared(self) -> int:
        """The first so many have a tile of each."""
        return min(grid.tiles for grid in self.grids)

    def alpha(self, first: int, last: int, alpha: float) -> npt.NDArray[np.float32]:
        """(block,) of blocks `first` to before `last`: `alpha` where shared, else all for who has the tile."""
        alone = float(self.grids[0].tiles > self.grids[1].tiles)
        return np.where(np.arange(first, last) < self.shared, alpha, alone).astype(np.float32)

    def pictures(self, pair: tuple[Pixels, Pixels], first: int, last: int) -> npt.NDArray[np.uint8]:
        """(block, 2, 32, 32, 3): what the encoder is given for blocks `first` to before `last`."""
        cuts = [
            cut(picture, grid, min(first, grid.tiles), min(last, grid.tiles))
            for picture, grid in zip(pair, self.grids, strict=True)
        ]
        longer = max(cuts, key=len)
        return np.stack([np.concatenate([tiles, longer[len(tiles) :]]) for tiles in cuts], axis=1)


def share_of(user: int, alpha: float) -> float:
    """What of a shared block is user 0's or 1's."""
    return 1 - alpha if user else alpha
