"""A Hugging Face checkpoint folder, read tensor by tensor.

Tensors are read with plain file reads and not through a memory map: mapped pages count as the process's memory, and an
export must show how little it needs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wdmoe.backbone.format.tensor_file import places, read_header
from wdmoe.errors import BundleError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int


class Checkpoint:
    """The tensors of a model folder. `open` checks that every one of them is there in full."""

    def __init__(self, folder: Path, entries: dict[str, _Entry], fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint  # changes when a file is replaced; not a hash of all bytes
        self._entries = entries

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of a folder's safetensors.

        Raises:
            BundleError: no config or weights, pickled weights, or a shard that is missing, truncated or
                quantised.
        """
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder with a Hugging Face checkpoint")
        if not (folder / "config.json").is_file():
            raise BundleError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
        expected, files = _shards(folder)
        identity = hashlib.sha256(_read(folder / "config.json"))
        entries: dict[str, _Entry] = {}
        for file in files:
            header, start = read_header(file)
            stat = file.stat()
            identity.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} ".encode())
            identity.update(json.dumps(header, sort_keys=True).encode())
            entries.update(_entries(file, header, start))
        if lost := expected - entries.keys():
            raise BundleError(f"{folder}: {INDEX_NAME} lists {min(lost)!r}, which is in none of the files")
        return cls(folder, entries, identity.hexdigest())

    def keys(self) -> list[str]:
        """Names of all tensors, as on disk."""
        return list(self._entries)

    def size(self, key: str) -> int:
        """Bytes of a tensor."""
        return self._entries[key].size

    def read(self, key: str) -> torch.Tensor:
        """A tensor, freshly read.

        Raises:
            BundleError: the file became unreadable.
        """
        entry = self._entries[key]
        raw = torch.empty(entry.size, dtype=torch.uint8)
        if entry.size == 0:
            return raw.view(entry.dtype).reshape(entry.shape)
        try:
            with entry.file.open("rb", buffering=0) as stream:
                stream.seek(entry.offset)
                view, done = raw.numpy().data, 0
                while done < entry.size and (count := stream.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise BundleError(f"cannot read {entry.file}: {error.strerror}") from error
        if done < entry.size:
            raise BundleError(f"{entry.file} was cut short while it was read")
        return raw.view(entry.dtype).reshape(entry.shape)


def _shards(folder: Path) -> tuple[set[str], list[Path]]:
    """The tensor names that the index promises (empty without one) and the files."""
    if (folder / INDEX_NAME).is_file():
        plain = _json(_read(folder / INDEX_NAME), folder / INDEX_NAME).get("weight_map")
        weight_map: dict[str, Any] = plain if isinstance(plain, dict) else {}
        names = list(weight_map.values())
        if not names or not all(isinstance(n, str) and n == Path(n).name and "\\" not in n for n in names):
            raise BundleError(f"{folder / INDEX_NAME} has no 'weight_map' of plain file names")
        files = [folder / name for name in sorted(set(names))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise BundleError(f"{folder} lacks {len(absent)} of {len(files)} weight files, first {absent[0]}")
        return set(weight_map), files
    if (folder / SINGLE_NAME).is_file():
        return set(), [folder / SINGLE_NAME]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise BundleError(f"{folder} holds pickled weights, which can run code: convert them to safetensors")
    raise BundleError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}")


def _entries(file: Path, header: dict[str, Any], start: int) -> dict[str, _Entry]:
    entries = {}
    for name, place in places(file, header, start).items():
        if place.dtype not in DTYPES:
            raise BundleError(
                f"{file}: {name!r} is stored as {place.dtype}; only unquantised checkpoints can be exported"
            )
        entries[name] = _Entry(file, DTYPES[place.dtype], place.shape, place.offset, place.size)
    return entries


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from error


def _json(data: bytes, file: Path) -> dict[str, Any]:
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is truncated or not readable") from error
    if not isinstance(plain, dict):
        raise BundleError(f"{file} is not what it should be: a JSON object was expected")
    return plain
