"""Eight photographs that two packages carry: a second test, of pictures that nothing here was trained on or chosen by.

They come from scikit-image and scikit-learn (their folders say under which licences), are no part of this project, and
are cut to their middle of 256x384. The codec sends them in tiles of 32x32, each a block of its own; classical codecs
get the whole picture and all of its channel uses at once, so they are not held back by tiling.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from wdmoe.arrays import FloatArray, Pixels
from wdmoe.broadcast.datasets.pictures import SIDE
from wdmoe.broadcast.quality.alpha_sweep import Judge
from wdmoe.broadcast.quality.pareto_front import qualities_of
from wdmoe.config import cache_home
from wdmoe.errors import ConfigError, MissingExtraError

HEIGHT, WIDTH = 256, 384
_ROWS, _COLUMNS = HEIGHT // SIDE, WIDTH // SIDE
TILES = _ROWS * _COLUMNS  # of a photograph


@dataclass(frozen=True, slots=True)
class Source:
    """Where a photograph comes from, and the SHA-256 of its file."""

    package: str
    path: str  # in the wheel
    sha256: str

    @property
    def file(self) -> str:
        """Its name in the cache."""
        return Path(self.path).name


SOURCES = tuple(
    Source(package, path, sha256)
    for package, path, sha256 in (
        (
            "scikit-image",
            "skimage/data/astronaut.png",
            "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        ),
        (
            "scikit-image",
            "skimage/data/chelsea.png",
            "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        ),
        (
            "scikit-image",
            "skimage/data/coffee.png",
            "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        ),
        (
            "scikit-image",
            "skimage/data/hubble_deep_field.jpg",
            "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        ),
        (
            "scikit-image",
            "skimage/data/motorcycle_left.png",
            "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        ),
        (
            "scikit-image",
            "skimage/data/rocket.jpg",
            "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        ),
        (
            "scikit-learn",
            "sklearn/datasets/images/china.jpg",
            "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        ),
        (
            "scikit-learn",
            "sklearn/datasets/images/flower.jpg",
            "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
        ),
    )
)


def photographs_folder() -> Path:
    """Where `tools/data/fetch_photographs` leaves them."""
    return cache_home() / "pictures" / "photographs"


def load_photographs(folder: Path | None = None) -> dict[str, Pixels]:
    """By name, each (256, 384, 3).

    Raises:
        MissingExtraError: they were not fetched.
        ConfigError: a file is not what was fetched.
    """
    return {Path(source.file).stem: _middle(_opened(folder or photographs_folder(), source)) for source in SOURCES}


def tiled(photographs: npt.ArrayLike) -> Pixels:
    """(photograph, 256, 384, 3) to (photograph x 96, 32, 32, 3), row by row."""
    pixels = np.asarray(photographs)
    cut = pixels.reshape(-1, _ROWS, SIDE, _COLUMNS, SIDE, 3).swapaxes(2, 3)
    return np.ascontiguousarray(cut.reshape(-1, SIDE, SIDE, 3))


def untiled(tiles: npt.ArrayLike) -> Pixels:
    """The inverse of `tiled`."""
    pixels = np.asarray(tiles).reshape(-1, _ROWS, _COLUMNS, SIDE, SIDE, 3).swapaxes(2, 3)
    return np.ascontiguousarray(pixels.reshape(-1, HEIGHT, WIDTH, 3))


def tile_pairs(photographs: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Numbers of tiles (pair x 96, 2) of pairs (pair, 2) of photographs."""
    numbers = np.asarray(photographs)[:, None] * TILES + np.arange(TILES)[:, None]
    return np.asarray(numbers.reshape(-1, 2))


def _whole(wanted: Pixels, shown: Pixels) -> FloatArray:
    """The qualities of the photograph that tiles make up, at each of them."""
    return np.repeat(qualities_of(untiled(wanted), untiled(shown)), TILES, axis=0)


WHOLE = Judge(at_once=TILES, qualities=_whole)


def _opened(folder: Path, source: Source) -> Pixels:
    file = folder / source.file
    try:
        if hashlib.sha256(file.read_bytes()).hexdigest() != source.sha256:
            raise ConfigError(f"{file} is not the file of {source.package} that is known; fetch it again")
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise MissingExtraError(f"{file} is missing; fetch the photographs: tools/data/fetch_photographs") from error
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error


def _middle(pixels: Pixels) -> Pixels:
    top, left = (pixels.shape[0] - HEIGHT) // 2, (pixels.shape[1] - WIDTH) // 2
    return np.ascontiguousarray(pixels[top : top + HEIGHT, left : left + WIDTH])
