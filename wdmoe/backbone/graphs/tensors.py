"""A station's tensors as NumPy arrays in float32, from its safetensors files. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array
from wdmoe.errors import BundleError

_DTYPES: Mapping[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}
_MOST_HEADER_BYTES = 100 << 20  # as the format says


class StationTensors(Mapping[str, Float32Array]):
    """Names and values. The files stay mapped: what is not asked for takes no memory."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read all headers.

        Raises:
            BundleError: a file is damaged.
        """
        self._found: dict[str, tuple[npt.NDArray[np.uint8], str, tuple[int, ...]]] = {}
        for file in files:
            for name, entry, data in _entries(file):
                self._found[name] = (data, entry["dtype"], tuple(entry["shape"]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found  # without its values

    def __getitem__(self, name: str) -> Float32Array:
        """One tensor, widened to float32.

        Raises:
            KeyError: there is none of this name.
            BundleError: it holds no floating-point numbers.
        """
        data, dtype, shape = self._found[name]
        if dtype not in _DTYPES:
            raise BundleError(f"{name!r} of the station has the dtype {dtype}, which no graph takes")
        values = data.view(_DTYPES[dtype]).reshape(shape)
        if dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False)


def _entries(file: Path) -> Iterable[tuple[str, Mapping[str, Any], npt.NDArray[np.uint8]]]:
    try:
        mapped = np.memmap(file, np.uint8, mode="r")
        length = int.from_bytes(mapped[:8].tobytes(), "little")
        if not 0 < length <= min(_MOST_HEADER_BYTES, len(mapped) - 8):
            raise ValueError("its header does not fit")
        header = json.loads(mapped[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        start = 8 + length
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= len(mapped) - start:
                raise ValueError(f"{name!r} lies outside of it")
            yield name, entry, mapped[start + begin : start + end]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{file.name} of the station is damaged: {error}") from error
