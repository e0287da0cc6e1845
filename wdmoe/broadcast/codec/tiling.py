"""A picture of any size as overlapping tiles of one size, and back without seams.

Tiles lie on an even grid from edge to edge, so none hangs over; a picture smaller than a tile is mirrored at its edges
until it fills one. Where tiles overlap they are blended by windows that sum to one at every pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Pixels
from wdmoe.errors import ConfigError

FloatTiles = npt.NDArray[np.float32]

SIDE = 32  # of a tile: what the codec was trained on
OVERLAP = 8  # of neighbours, at least; 1 / (1 - 8/32)^2 = 1.8 times the symbols, for borders nobody sees
LONG_SIDE, SHORT_SIDE = 4000, 3000  # the largest picture, either way up
_GREY = 127.5  # where nothing came


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the tiles of a picture begin. They are counted row by row."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ConfigError(f"a picture has at least one pixel, got {self.width}x{self.height}")
        long, short = max(self.height, self.width), min(self.height, self.width)
        if long > LONG_SIDE or short > SHORT_SIDE:
            raise ConfigError(
                f"a picture of {self.width}x{self.height} pixels is too large: at most {LONG_SIDE}x{SHORT_SIDE}, "
                "either way up"
            )

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """First row of each row of tiles."""
        return _starts(self.height)

    @property
    def columns(self) -> npt.NDArray[np.int64]:
        """First column of each column of tiles."""
        return _starts(self.width)

    @property
    def tiles(self) -> int:
        """How many."""
        return self.rows.size * self.columns.size


def cut(picture: Pixels, grid: Grid, first: int, last: int) -> Pixels:
    """Tiles `first` to before `last` of a picture (height, width, 3): (tile, 32, 32, 3), a copy."""
    height, width = picture.shape[:2]
    missing = ((0, max(0, SIDE - height)), (0, max(0, SIDE - width)), (0, 0))
    padded = np.pad(picture, missing, mode="symmetric") if height < SIDE or width < SIDE else picture
    rows, columns = grid.rows, grid.columns
    tiles = np.empty((last - first, SIDE, SIDE, 3), np.uint8)
    for place, number in enumerate(range(first, last)):
        top, left = rows[number // columns.size], columns[number % columns.size]
        tiles[place] = padded[top : top + SIDE, left : left + SIDE]
    return tiles


class Blender:
    """Puts tiles together, in order, and gives rows as soon as no later tile reaches them.

    It holds one band of 32 rows. Where a tile never came its neighbours fill what they share with it; the rest is grey.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._rows, self._columns = grid.rows, grid.columns
        self._down, self._across = _windows(grid.height), _windows(grid.width)
        self._band = np.zeros((SIDE, max(grid.width, SIDE), 3), np.float32)
        self._weight = np.zeros((SIDE, max(grid.width, SIDE)), np.float32)
        self._row = 0  # of tiles: the one that is being put together
        self._given = 0  # rows of the picture

    def add(self, number: int, tile: FloatTiles) -> Pixels:
        """Take a tile (32, 32, 3), 0 to 255, not clipped. Numbers rise.

        Returns:
            (row, width, 3): the next rows that are finished now, often none.
        """
        row, column = divmod(number, self._columns.size)
        finished = self._advance(row)
        window = self._down[row][:, None] * self._across[column]
        across = slice(self._columns[column], self._columns[column] + SIDE)
        self._band[:, across] += window[..., None] * tile
        self._weight[:, across] += window
        return finished

    def finish(self) -> Pixels:
        """The rows that are left; nothing may be added after it."""
        return self._advance(self._rows.size)

    def _advance(self, row: int) -> Pixels:
        """Give rows above row `row` of tiles away, and move the band down to it."""
        pieces = []
        while self._row < row:
            self._row += 1
            last = self._row == self._rows.size
            until = self._grid.height if last else int(self._rows[self._row])
            pieces.append(self._shown(until - self._given))
            self._given = until
        return np.concatenate(pieces) if pieces else np.empty((0, self._grid.width, 3), np.uint8)

    def _shown(self, rows: int) -> Pixels:
        weight = self._weight[:rows, : self._grid.width, None]
        value = self._band[:rows, : self._grid.width]
        mean = np.divide(value, weight, out=np.full_like(value, _GREY), where=weight > 0)
        for kept in (self._band, self._weight):
            kept[:-rows] = kept[rows:]
            kept[-rows:] = 0
        shown: Pixels = np.clip(np.rint(mean), 0, 255).astype(np.uint8)
        return shown


def _starts(side: int) -> npt.NDArray[np.int64]:
    """Of the tiles along one side: as few as overlap by OVERLAP or more, evenly."""
    count = max(1, math.ceil((side - OVERLAP) / (SIDE - OVERLAP)))
    return np.rint(np.linspace(0, max(side - SIDE, 0), count)).astype(np.int64)


def _windows(side: int) -> FloatTiles:
    """(tile, 32): the weight of each tile at its pixels along one side; they sum to 1 at each pixel of the side."""
    starts = _starts(side)
    ramp = (np.arange(SIDE) + 0.5) / OVERLAP
    hat = np.clip(np.minimum(ramp, ramp[::-1]), 0, 1)
    total = np.zeros(max(side, SIDE))
    for start in starts:
        total[start : start + SIDE] += hat
    return np.stack([hat / total[start : start + SIDE] for start in starts]).astype(np.float32)
