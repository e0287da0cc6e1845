"""Crops of photographs to train on beside the small pictures.

The photographs are those of Debian's wallpaper packages (`tools/data/fetch_wallpapers`), reduced until faults of their
compression are gone and a crop of 32x32 shows something.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Pixels
from wdmoe.broadcast.datasets.npz_file import read_npz
from wdmoe.broadcast.datasets.pictures import SIDE
from wdmoe.config import cache_home
from wdmoe.errors import ConfigError

ZOOMS = (1, 2)  # pixels of the photograph along a pixel of the crop


@dataclass(frozen=True, slots=True)
class Places:
    """Where crops are cut; every field has the same shape, that of the crops wanted."""

    photograph: npt.NDArray[np.int64]  # number
    zoom: npt.NDArray[np.int64]
    down: npt.NDArray[np.float64]  # 0 to 1 of the way from the top
    right: npt.NDArray[np.float64]

    def at(self, blocks: slice | npt.NDArray[np.int64]) -> Places:
        """Some of them, along the first axis."""
        return Places(self.photograph[blocks], self.zoom[blocks], self.down[blocks], self.right[blocks])


class Crops:
    """Photographs, and squares cut from them."""

    def __init__(self, photographs: Sequence[Pixels], side: int = SIDE) -> None:
        """Photographs (height, width, 3) uint8; the side of a crop in pixels.

        Raises:
            ConfigError: there are none, or one is smaller than the largest crop.
        """
        least = side * max(ZOOMS)
        if not photographs or any(p.ndim != 3 or min(p.shape[:2]) < least for p in photographs):
            raise ConfigError(f"need photographs of {least}x{least} or more, got {[p.shape for p in photographs]}")
        self._photographs, self._side = tuple(photographs), side

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Places:
        """Places of independent crops."""
        return Places(
            rng.integers(len(self._photographs), size=shape),
            rng.choice(ZOOMS, shape),
            rng.random(shape),
            rng.random(shape),
        )

    def cut(self, places: Places) -> Pixels:
        """(..., side, side, 3)."""
        found = np.empty((*places.photograph.shape, self._side, self._side, 3), np.uint8)
        for index in np.ndindex(*places.photograph.shape):
            number, zoom = int(places.photograph[index]), int(places.zoom[index])
            found[index] = self._square(number, zoom, float(places.down[index]), float(places.right[index]))
        return found

    def _square(self, number: int, zoom: int, down: float, right: float) -> Pixels:
        photograph, wide = self._photographs[number], self._side * zoom
        top, left = (int(part * (size - wide + 1)) for part, size in zip((down, right), photograph.shape, strict=False))
        square = photograph[top : top + wide, left : left + wide]
        means = square.reshape(self._side, zoom, self._side, zoom, 3).mean(axis=(1, 3))
        return np.asarray(np.rint(means), dtype=np.uint8)


def wallpapers_file() -> Path:
    """Where `tools/data/fetch_wallpapers` leaves the reduced photographs."""
    return cache_home() / "pictures" / "wallpapers.npz"


def load_wallpapers(file: Path | None = None) -> dict[str, Pixels]:
    """The reduced photographs by name, in order of their names; the cache's unless a file is given.

    Raises:
        MissingExtraError: they were not fetched.
        ConfigError: the file is not what was fetched.
    """
    path = file or wallpapers_file()
    found: dict[str, Pixels] = read_npz(path, "photographs", "tools/data/fetch_wallpapers")
    if not found or any(p.ndim != 3 or p.shape[2] != 3 or p.dtype != np.uint8 for p in found.values()):
        raise ConfigError(f"{path} does not hold RGB photographs of 8 bits; run tools/data/fetch_wallpapers again")
    return found


def sha256_of_pixels(photographs: Mapping[str, Pixels]) -> str:
    """Of names, shapes and pixels: a training's manifest tells what was trained on."""
    digest = hashlib.sha256()
    for name, pixels in sorted(photographs.items()):
        digest.update(f"{name} {pixels.shape} ".encode())
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()
