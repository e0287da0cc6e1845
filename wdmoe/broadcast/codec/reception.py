"""What a device decides about a broadcast it is told to hear: whether it can, what came, what is lost. No I/O.

A peer told all of it, so every size is bounded before memory is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.broadcast.codec.receiver import Ear
from wdmoe.broadcast.codec.tiling import LONG_SIDE, SHORT_SIDE, Grid
from wdmoe.errors import ConfigError, ProtocolError
from wdmoe.transport.codec.messages import Symbols, Tune

MOST_BLOCKS = Grid(SHORT_SIDE, LONG_SIDE).tiles
MOST_SYMBOL_BYTES = 256 << 20
MOST_DECODER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Reception:
    """A broadcast that can be heard."""

    tune: Tune
    grid: Grid  # of this user's picture
    ear: Ear

    @property
    def tiles(self) -> int:
        """Blocks that this user needs: the first ones."""
        return self.grid.tiles

    def shares(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """(block,) of this user in blocks `first` to before `last`, all of which it needs."""
        return np.where(np.arange(first, last) < self.tune.shared, self.tune.share, 1).astype(np.float32)


def plan_reception(tune: Tune) -> Reception:
    """Check what a station asks.

    Raises:
        ProtocolError: it makes no sense, or is more than a device takes in.
    """
    try:
        grid = Grid(tune.height, tune.width)
        ear = Ear(user=tune.user, snr_db=tune.snr_db, fades=tune.fades, seed=tune.seed)
    except ConfigError as error:
        raise ProtocolError(f"a broadcast that cannot be heard: {error}") from error
    if tune.blocks > MOST_BLOCKS or grid.tiles not in (tune.shared, tune.blocks):
        raise ProtocolError(
            f"a broadcast of {tune.blocks} blocks, {tune.shared} of them shared, does not fit a picture of "
            f"{grid.tiles} tiles"
        )
    if (size := _store_bytes(grid.tiles, tune.uses)) > MOST_SYMBOL_BYTES:
        raise ProtocolError(f"a broadcast of {size >> 20} MiB of symbols; {MOST_SYMBOL_BYTES >> 20} are taken in")
    if tune.decoder_bytes > MOST_DECODER_BYTES:
        raise ProtocolError(f"a decoder of {tune.decoder_bytes >> 20} MiB; {MOST_DECODER_BYTES >> 20} are taken in")
    return Reception(tune, grid, ear)


class SymbolStore:
    """Keeps what was heard until the decoder gets to it: the air does not wait, the decoder may be slow."""

    def __init__(self, reception: Reception) -> None:
        tune = reception.tune
        self._tune, self._tiles = tune, reception.tiles
        self._symbols = np.zeros((reception.tiles, tune.uses, 2), np.float16)  # the system gives pages as they fill
        self._came = np.zeros(reception.tiles, bool)
        self.passed = 0  # blocks before this number came or are lost

    @property
    def whole(self) -> bool:
        """Nothing that is still to come is needed."""
        return self.passed >= self._tiles

    def take(self, message: Symbols) -> None:
        """Put blocks in their places. Earlier ones that are missing are lost: nothing is sent twice.

        Raises:
            ProtocolError: blocks that this broadcast does not have, or out of order.
        """
        first, last = message.first, message.first + len(message.symbols)
        if message.symbols.shape[1] != self._tune.uses or last > self._tune.blocks:
            raise ProtocolError(
                f"blocks {first} to {last} of {message.symbols.shape[1]} uses in a broadcast of {self._tune.blocks} "
                f"blocks of {self._tune.uses}"
            )
        if first < self.passed:
            raise ProtocolError(f"block {first} came after block {self.passed - 1}")
        kept = slice(first, min(last, self._tiles))
        if kept.start < kept.stop:
            with np.errstate(over="ignore"):  # too loud for float16, so for the power check as well
                self._symbols[kept] = message.symbols[: kept.stop - first]
            self._came[kept] = True
        self.passed = last

    def end(self, sent: int) -> None:
        """So many blocks were sent by now: what did not come is lost."""
        self.passed = max(self.passed, min(sent, self._tune.blocks))

    def batch(self, first: int, most: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16], int]:
        """Up to `most` blocks from `first` on that have come: their numbers, symbols (block, use, 2), and the next."""
        last = min(first + most, self.passed, self._tiles)
        numbers = first + np.flatnonzero(self._came[first:last])
        return numbers, self._symbols[numbers], max(first, last)

    @property
    def lost(self) -> int:
        """Needed blocks that never came; final when `whole`."""
        return int(self._tiles - self._came.sum())


def _store_bytes(blocks: int, uses: int) -> int:
    return blocks * uses * 2 * np.dtype(np.float16).itemsize
