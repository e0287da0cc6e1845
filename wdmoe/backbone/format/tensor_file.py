"""A safetensors file: eight bytes of header length, a JSON header, raw data. Read and written without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wdmoe.errors import BundleError

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_MOST_HEADER_BYTES = 100 << 20  # the safetensors library's own bound
_ALIGN = 8  # the format wishes that the data begins at a multiple


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a file. `dtype` may be one that `ITEM_BYTES` does not know."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor to be written. `data` is None where it has no element."""

    dtype: str  # a key of `ITEM_BYTES`
    shape: tuple[int, ...]
    data: memoryview | None


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the data starts.

    Raises:
        BundleError: the file cannot be read, or is cut short.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MOST_HEADER_BYTES, file.stat().st_size - 8):
                raise BundleError(f"{file} is truncated or not a safetensors file")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is truncated or not readable") from error
    if not isinstance(header, dict):
        raise BundleError(f"{file} is not what it should be: a JSON object was expected")
    return header, 8 + length


def places(file: Path, header: Mapping[str, Any], start: int) -> dict[str, Place]:
    """Where each tensor lies, in the header's order.

    Args:
        header, start: as `read_header` gave them.
    Raises:
        BundleError: an entry makes no sense, or the file is too short for it.
    """
    file_size = file.stat().st_size
    found: dict[str, Place] = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (first, last) = str(item["dtype"]), tuple(item["shape"]), item["data_offsets"]
            plain = all(isinstance(n, int) and n >= 0 for n in (*shape, first, last))
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{file}: the entry of {name!r} is malformed") from error
        if not plain or last < first or (kind in ITEM_BYTES and last - first != math.prod(shape) * ITEM_BYTES[kind]):
            raise BundleError(f"{file}: the entry of {name!r} is malformed")
        if start + last > file_size:
            raise BundleError(f"{file} is truncated: {name!r} is not there in full; download it again")
        found[name] = Place(kind, shape, start + first, last - first)
    return found


def tensor_file_parts(tensors: Mapping[str, Stored]) -> Iterator[bytes | memoryview]:
    """A file piece by piece, in the order of names: the same tensors always give the same bytes."""
    header: dict[str, object] = {}
    ordered = {name: tensors[name] for name in sorted(tensors)}
    offset = 0
    for name, tensor in ordered.items():
        end = offset + math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    yield len(text).to_bytes(8, "little")
    yield text
    yield from (tensor.data for tensor in ordered.values() if tensor.data is not None)
