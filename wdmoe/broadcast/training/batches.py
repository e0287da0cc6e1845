"""What one training step sees: pictures for two users, their radio, alpha and rate, all from a seed and the step.

Nothing is remembered between steps, so a run that was interrupted goes on as if it had not been; and a batch is drawn
whole and then cut, so it does not matter how many processes share the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wdmoe.broadcast.codec.channel import Heard, awgn, draw_unit, rayleigh
from wdmoe.broadcast.codec.model import as_pictures
from wdmoe.broadcast.datasets.crops import Crops
from wdmoe.errors import ConfigError

Fading = Literal["awgn", "rayleigh", "both"]
FADINGS: tuple[Fading, ...] = ("awgn", "rayleigh", "both")
_END = 0.1  # of the batch with alpha exactly 0, and as much with exactly 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """What the batches are made of."""

    batch: int = 64  # blocks of two pictures, over all processes
    lowest_snr_db: float = 0.0  # each user's SNR is drawn evenly, so either may be the stronger
    highest_snr_db: float = 20.0
    fading: Fading = "awgn"
    most_csi_error: float = 0.0  # with Rayleigh fading, drawn evenly from 0 up to it for each step
    kept: tuple[int, ...] = (4, 8, 16)  # rates, symbols of a token; one for each block
    same_picture: float = 0.1  # of the blocks
    same_class: float = 0.4
    photographs: float = 0.0  # of the blocks, with crops of photographs; two of one photograph count as of one class
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or not self.kept or min(self.kept) < 1:
            raise ConfigError(f"batch and every kept must be at least 1, got {self.batch} and {self.kept}")
        if not -30 <= self.lowest_snr_db <= self.highest_snr_db <= 40:
            raise ConfigError(f"SNRs must rise within -30 to 40 dB, got {self.lowest_snr_db} to {self.highest_snr_db}")
        if self.fading not in FADINGS or not 0 <= self.most_csi_error < 1:
            raise ConfigError(
                f"fading must be one of {', '.join(FADINGS)} and most_csi_error from 0 to below 1, got {self.fading!r} "
                f"and {self.most_csi_error}"
            )
        parts = (self.same_picture, self.same_class)
        if not all(math.isfinite(part) and part >= 0 for part in parts) or sum(parts) > 1:
            raise ConfigError(f"same_picture and same_class must be fractions that sum to at most 1, got {parts}")
        if not 0 <= self.photographs <= 1:
            raise ConfigError(f"photographs must be a fraction of the blocks, 0 to 1, got {self.photographs}")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's blocks, or one process's part of them."""

    pictures: Tensor  # (block, 2, 3, side, side), 0 to 1
    snr_db: Tensor  # (block, 2)
    alpha: Tensor  # (block,)
    kept: Tensor  # (block,)
    noise: Tensor  # (block, 2, token, slot, 2)
    known: Tensor  # (block, 2, 2)
    error: Tensor  # (block, 2, 2)
    csi_error: float
    fades: bool

    def heard(self, symbols: Tensor) -> Heard:
        """What both users hear of the block's symbols."""
        if self.fades:
            return rayleigh(symbols, self.snr_db, self.noise, self.known, self.error, self.csi_error)
        return awgn(symbols, self.snr_db, self.noise)


class BatchSource:
    """Batches by number of the step."""

    def __init__(
        self,
        pixels: npt.ArrayLike,
        labels: npt.ArrayLike,
        draws: Draws,
        tokens: int,
        slots: int,
        crops: Crops | None = None,
    ) -> None:
        """Pictures (picture, side, side, 3) uint8 and their classes (picture,); sizes of a block of symbols.

        Raises:
            ConfigError: no pictures, shapes are not as above, or crops are to be drawn and there are none.
        """
        self._pixels, self._labels = np.asarray(pixels), np.asarray(labels)
        if self._pixels.ndim != 4 or self._pixels.shape[3] != 3 or not 0 < len(self._pixels) == len(self._labels):
            raise ConfigError(f"need pictures and their classes, got {self._pixels.shape} and {self._labels.shape}")
        if draws.photographs and crops is None:
            raise ConfigError("a share of the blocks is to have crops of photographs; give photographs")
        self._draws, self._tokens, self._slots, self._crops = draws, tokens, slots, crops
        self._members = {label: np.flatnonzero(self._labels == label) for label in np.unique(self._labels)}

    def batch(self, step: int, rank: int, world: int, device: torch.device) -> Batch:
        """The part of a step's batch that process `rank` of `world` takes: every `world`-th block."""
        how = self._draws
        rng = np.random.default_rng([how.seed, step])
        numbers = self._pairs(rng)
        flips = rng.random(numbers.shape) < 0.5
        low, high = how.lowest_snr_db, how.highest_snr_db
        snr_db = rng.uniform(low, high, (how.batch, 2)).astype(np.float32)
        alpha = np.clip(rng.uniform(-_END / (1 - 2 * _END), 1 + _END / (1 - 2 * _END), how.batch), 0, 1)
        kept = rng.choice(how.kept, how.batch)
        fades = how.fading == "rayleigh" or (how.fading == "both" and bool(rng.random() < 0.5))
        csi_error = float(rng.uniform(0, how.most_csi_error)) if fades else 0.0
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        noise = draw_unit(generator, how.batch, 2, self._tokens, self._slots)
        known, error = (draw_unit(generator, how.batch, 2) for _ in range(2))
        own = slice(rank, None, world)
        pixels = self._with_crops(self._pixels[numbers[own]], step, own)
        same = (pixels[:, 0] == pixels[:, 1]).all(axis=(1, 2, 3))
        pictures = as_pictures(pixels, np.where(same[:, None], flips[own, :1], flips[own]))
        return Batch(
            pictures.to(device),
            torch.from_numpy(snr_db[own]).to(device),
            torch.from_numpy(alpha[own].astype(np.float32)).to(device),
            torch.from_numpy(kept[own]).to(device),
            noise[own].to(device),
            known[own].to(device),
            error[own].to(device),
            csi_error,
            fades,
        )

    def _pairs(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """(block, 2) numbers of pictures, of the three kinds; a different class may by chance be the same one."""
        how = self._draws
        first = rng.integers(len(self._pixels), size=how.batch)
        second = rng.integers(len(self._pixels), size=how.batch)
        kind = rng.random(how.batch)
        for place in np.flatnonzero(kind < how.same_picture + how.same_class):
            second[place] = rng.choice(self._members[self._labels[first[place]]])
        same = kind < how.same_picture
        second[same] = first[same]
        return np.stack([first, second], axis=1)

    def _with_crops(self, pixels: npt.NDArray[np.uint8], step: int, own: slice) -> npt.NDArray[np.uint8]:
        """This process's blocks (block, 2, side, side, 3), some of them with crops of photographs instead.

        Their draws have a stream of their own: without photographs all else stays as it is.
        """
        how, crops = self._draws, self._crops
        if crops is None or not how.photographs:
            return pixels
        rng = np.random.default_rng([how.seed, step, 1])
        chosen, kind = rng.random(how.batch) < how.photographs, rng.random(how.batch)
        places = crops.draw(rng, (how.batch, 2))
        alike, same = kind < how.same_picture + how.same_class, kind < how.same_picture
        places.photograph[alike, 1] = places.photograph[alike, 0]
        for field in (places.zoom, places.down, places.right):
            field[same, 1] = field[same, 0]
        mine = np.flatnonzero(chosen[own])
        pixels[mine] = crops.cut(places.at(own).at(mine))
        return pixels
