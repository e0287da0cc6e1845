"""The 10,000 CIFAR-10 pictures that a package carries: where they lie, how they are divided, who is paired with whom.

They are CIFAR-10's *test* file, since its training half is in no package. Part of them is trained on here, so a PSNR on
the rest compares with nothing that was trained on the usual 50,000.

Order comes from SHA-256 of picture numbers, which no version of a library can change.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Pixels
from wdmoe.broadcast.datasets.npz_file import read_npz
from wdmoe.config import cache_home
from wdmoe.errors import ConfigError

Numbers = npt.NDArray[np.int64]
PairKind = Literal["same picture", "same class", "different class"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PER_CLASS = 1000
SIDE = 32
PAIR_KINDS: tuple[PairKind, ...] = ("same picture", "same class", "different class")
SPLIT_SEED = 20240610
SPLIT_PER_CLASS = (850, 50, 100)  # train, choose, test
PICTURES_SHA256 = "80e41bbce6182934ca293c63851b8143895792c6590467262dc693c7cb49c0d1"
SPLIT_SHA256 = "ff4c4d7f42d1186bd4d218d51faf8987d714bdce2b525a6e28b6a6f1e312f544"


@dataclass(frozen=True, slots=True)
class Pictures:
    """RGB pictures and their classes. Raises ConfigError if they are not the 10,000 that are known."""

    pixels: Pixels  # (10000, 32, 32, 3)
    labels: Pixels  # (10000,)

    def __post_init__(self) -> None:
        count = PER_CLASS * len(CLASSES)
        shapes = self.pixels.shape == (count, SIDE, SIDE, 3) and self.labels.shape == (count,)
        if not shapes or self.pixels.dtype != np.uint8 or self.labels.dtype != np.uint8:
            raise ConfigError(f"pictures must be {count} of {SIDE}x{SIDE} RGB, got {self.pixels.shape}")
        found = _sha256(self.pixels, self.labels)
        if found != PICTURES_SHA256:
            raise ConfigError(
                f"pictures have SHA-256 {found}, expected {PICTURES_SHA256}; run tools/data/fetch_pictures again"
            )


@dataclass(frozen=True, slots=True)
class Split:
    """Numbers of the pictures to train on, to choose between models by, and to report on. They share none."""

    train: Numbers  # (8500,)
    choose: Numbers  # (500,)
    test: Numbers  # (1000,)


def pictures_file() -> Path:
    """Where `tools/data/fetch_pictures` leaves them."""
    return cache_home() / "pictures" / "cifar10_test.npz"


def load_pictures(file: Path | None = None) -> Pictures:
    """The fetched pictures.

    Args:
        file: NPZ of arrays x and y; the cache's unless given.
    Raises:
        MissingExtraError: they were not fetched.
        ConfigError: the file is not what was fetched.
    """
    path = file or pictures_file()
    arrays = read_npz(path, "pictures", "tools/data/fetch_pictures")
    if not {"x", "y"} <= arrays.keys():
        raise ConfigError(f"{path} is not an NPZ of pictures x and classes y; run tools/data/fetch_pictures again")
    return Pictures(arrays["x"], arrays["y"])


def split_pictures(labels: npt.ArrayLike) -> Split:
    """The one division that everything here uses: 8,500, 500 and 1,000 pictures, every class alike in each part.

    Raises:
        ConfigError: a class does not have 1,000 pictures, or the division is not the recorded one.
    """
    of_class = np.asarray(labels)
    members = [np.flatnonzero(of_class == number) for number in range(len(CLASSES))]
    if any(each.size != PER_CLASS for each in members) or of_class.size != PER_CLASS * len(CLASSES):
        raise ConfigError(f"need {PER_CLASS} pictures of each of {len(CLASSES)} classes")
    ends = np.cumsum(SPLIT_PER_CLASS)[:-1]
    parts = zip(*(np.split(_shuffled(each, "split"), ends) for each in members), strict=True)
    split = Split(*(np.sort(np.concatenate(part)) for part in parts))
    found = _sha256(split.train, split.choose, split.test)
    if found != SPLIT_SHA256:
        raise ConfigError(f"the division has SHA-256 {found}, expected {SPLIT_SHA256}: these are other labels")
    return split


def pair_up(kind: PairKind, numbers: npt.ArrayLike, labels: npt.ArrayLike) -> Numbers:
    """What the two users want: every picture once as the first user's and once as the second's.

    Args:
        kind: of the pairs.
        numbers: (picture,) of a part of the division.
        labels: (10000,) classes of all pictures.
    Returns:
        (picture, 2) numbers, the same for the same input.
    Raises:
        ConfigError: the kind is unknown; or, but for the same picture, classes are not alike in size, or too few.
    """
    chosen, of_class = np.asarray(numbers, dtype=np.int64), np.asarray(labels)
    if kind == "same picture":
        return np.stack([chosen, chosen], axis=1)
    if kind not in PAIR_KINDS:
        raise ConfigError(f"kind of pairs must be one of {', '.join(PAIR_KINDS)}; got {kind!r}")
    members = [chosen[of_class[chosen] == each] for each in np.unique(of_class[chosen])]
    if len({each.size for each in members}) != 1 or len(members) < 2 or members[0].size < 2:
        raise ConfigError("pairs need at least two classes with the same number of pictures, two or more, in each")
    table = np.stack([_shuffled(each, kind) for each in members])  # (class, place)
    if kind == "same class":
        other = np.roll(table, 1, axis=1)
    else:
        classes, places = np.indices(table.shape)
        other = table[(classes + 1 + places % (len(table) - 1)) % len(table), places]
    return np.stack([table.ravel(), other.ravel()], axis=1)


def some_of(part: npt.ArrayLike, labels: npt.ArrayLike, count: int) -> Numbers:
    """The first pictures of every class in a part of the division, `count` in all; ConfigError if that cannot be."""
    numbers, of_class = np.asarray(part, dtype=np.int64), np.asarray(labels)
    classes = np.unique(of_class[numbers])
    each, rest = divmod(count, classes.size)
    if rest or not 2 <= each <= numbers.size // classes.size:
        raise ConfigError(
            f"pictures must be a multiple of {classes.size} from {2 * classes.size} to {numbers.size}, got {count}"
        )
    return np.concatenate([numbers[of_class[numbers] == label][:each] for label in classes])


def mean_picture(pictures: Pictures) -> Pixels:
    """(32, 32, 3) mean of the pictures to train on: what a user shows who gets nothing."""
    train = split_pictures(pictures.labels).train
    return np.asarray(np.rint(pictures.pixels[train].mean(axis=0)), dtype=np.uint8)


def _shuffled(numbers: Numbers, purpose: str) -> Numbers:
    keys = [hashlib.sha256(f"{SPLIT_SEED} {purpose} {number}".encode()).digest() for number in numbers]
    return np.asarray(numbers, dtype=np.int64)[sorted(range(len(keys)), key=keys.__getitem__)]


def _sha256(*arrays: npt.NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(little).tobytes())
    return digest.hexdigest()
