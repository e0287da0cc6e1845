"""What stands where in a GGUF file of version 2 or 3: metadata, and tensors as bytes. No torch.

The gguf package reads the same, with a NumPy view for each of the hundred thousand strings of a vocabulary, which takes
seconds. What the bytes of a tensor mean is its business here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from wdmoe.arrays import UInt8Array
from wdmoe.errors import BundleError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. `data` is (..., bytes of a row): a view of the mapped file."""

    kind: GGMLQuantizationType
    dimensions: tuple[int, ...]  # as in the file: the fastest one first
    data: UInt8Array


def read_gguf(path: Path) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
    """The metadata and the tensors, by name. The file stays mapped.

    Raises:
        BundleError: it is no such file, or is cut short.
    """
    try:
        return _read(np.memmap(path, np.uint8, mode="r"))
    except (OSError, ValueError, KeyError, struct.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(f"{path} is not a readable GGUF file: {reason}") from error


def _read(mapped: UInt8Array) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
    cursor = _Cursor(memoryview(mapped.data))
    if bytes(cursor.data[:4]) != _MAGIC:
        raise ValueError("it does not begin as one")
    cursor.at = len(_MAGIC)
    version, tensors, entries = (cursor.number(code) for code in "IQQ")
    if version not in _VERSIONS:
        raise ValueError(f"it has version {version}, and {' and '.join(map(str, _VERSIONS))} are known")
    fields = {}
    for _ in range(entries):
        name = cursor.string()
        fields[name] = cursor.value(cursor.number("I"))
    heads = [_head(cursor) for _ in range(tensors)]
    step = fields.get(_ALIGNMENT, 32)
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"its data is aligned to {step!r}")
    start = -(-cursor.at // step) * step
    plain = mapped.view(np.ndarray)  # of a mapped one each slice costs ten times as much
    return fields, {name: _tensor(plain, kind, shape, start + offset) for name, kind, shape, offset in heads}


class _Cursor:
    """Reads on from where it stands."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def number(self, code: str) -> Any:
        """By its code in `struct`."""
        return self._numbers(code, 1)[0]

    def string(self) -> str:
        """With its length before it."""
        size = self.number("Q")
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError("it is cut short")
        return str(self.data[begin : self.at], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Of a metadata entry."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return list(self._numbers(_NUMBERS[kind], count))

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}") * count
        if self.at + size > len(self.data):  # before struct makes a format of so many
            raise ValueError("it is cut short")
        found = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += size
        return found


def _head(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    """Name, kind, dimensions, and offset in the part with data."""
    name, count = cursor.string(), cursor.number("I")
    if count > _MOST_DIMENSIONS:
        raise ValueError(f"its tensor {name!r} has {count} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(count))
    return name, GGMLQuantizationType(cursor.number("I")), shape, cursor.number("Q")


def _tensor(data: UInt8Array, kind: GGMLQuantizationType, shape: tuple[int, ...], begin: int) -> GgufTensor:
    block, size = GGML_QUANT_SIZES[kind]
    columns, *rows = shape or (1,)
    row_bytes, left = columns // block * size, columns % block
    end = begin + row_bytes * math.prod(rows)
    if left or end > len(data):
        raise ValueError("a tensor of it is cut short")
    return GgufTensor(kind, shape, data[begin:end].reshape(*reversed(rows), row_bytes))
