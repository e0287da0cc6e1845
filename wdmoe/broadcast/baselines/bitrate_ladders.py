"""Ladders of pictures, kept in the cache: they cost a second a picture and depend on no weights.

A file is of one codec with its settings and version, one limit in bits, and one set of pictures' pixels by their
SHA-256. What does not fit that name is simply another file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from wdmoe.arrays import Pixels
from wdmoe.broadcast.baselines.classical import Ladder, build_ladder
from wdmoe.broadcast.baselines.codecs import Avif, HevcIntra, Jpeg2000
from wdmoe.broadcast.quality.pareto_front import QUALITIES
from wdmoe.config import cache_home
from wdmoe.errors import ConfigError

Progress = Callable[[str, float], None]
AnyCodec = Jpeg2000 | HevcIntra | Avif

_AT_ONCE = 40  # pictures between two writes: an interrupted run loses no more
_FIELDS = ("bits", *QUALITIES)


def kept_ladders(
    codec: AnyCodec,
    pictures: Mapping[int, Pixels],
    blank: Pixels,
    most_bits: int,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> dict[int, Ladder]:
    """Ladders of all pictures, from the cache where they are there; the others are built and added to it.

    Args:
        codec: with its settings.
        pictures: by number, all of the shape of `blank`.
        blank: what a user shows who gets no picture.
        most_bits: as in `build_ladder`.
        progress: told what and how far.
        folder: of the cache; the user's unless given.
    Raises:
        ConfigError: the cache cannot be read or written.
    """
    file = (folder or cache_home() / "ladders") / f"{_name(codec, blank, most_bits)}.npz"
    keys = {number: _digest(pixels) for number, pixels in pictures.items()}
    known = _read(file)
    missing = iter([number for number, key in keys.items() if key not in known])
    done = sum(key in known for key in keys.values())
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:  # the codecs let go of Python while they work
        while part := list(islice(missing, _AT_ONCE)):
            built = workers.map(lambda number: build_ladder(codec, pictures[number], blank, most_bits), part)
            known |= zip((keys[number] for number in part), built, strict=True)
            _write(file, known)
            done += len(part)
            if progress is not None:
                progress(codec.name, done / len(keys))
    return {number: known[key] for number, key in keys.items()}


def _name(codec: AnyCodec, blank: Pixels, most_bits: int) -> str:
    package = "pillow-heif" if isinstance(codec, HevcIntra) else "pillow"
    told = f"{codec!r} {sorted(asdict(codec).items())} {package} {version(package)} {_digest(blank)}"
    return f"{codec.name.replace(' ', '').lower()}-{most_bits}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _digest(pixels: Pixels) -> str:
    return hashlib.sha256(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _read(file: Path) -> dict[str, Ladder]:
    """What is there; a file that is damaged is built anew.

    Raises:
        ConfigError: it cannot be read, which says nothing about what it holds.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            keys, ends = arrays["keys"], arrays["ends"]
            parts = [np.split(arrays[field], ends[:-1]) for field in _FIELDS]
    except (FileNotFoundError, ValueError, KeyError, EOFError, BadZipFile):
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    return {str(key): Ladder(*columns) for key, *columns in zip(keys, *parts, strict=True)}


def _write(file: Path, ladders: Mapping[str, Ladder]) -> None:
    arrays: dict[str, Any] = {field: np.concatenate(_column(ladders.values(), field)) for field in _FIELDS}
    ends = np.cumsum([ladder.bits.size for ladder in ladders.values()])
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as opened:
            np.savez(opened, keys=np.array(list(ladders)), ends=ends, **arrays)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from error


def _column(ladders: Iterable[Ladder], field: str) -> list[np.ndarray]:
    return [np.asarray(getattr(ladder, field)) for ladder in ladders]
