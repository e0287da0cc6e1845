"""A station's tensors as NumPy arrays in float32, from its safetensors files. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array
from wdmoe.backbone.format.tensor_file import Place, places, read_header
from wdmoe.errors import BundleError

_DTYPES: Mapping[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}


class StationTensors(Mapping[str, Float32Array]):
    """Names and values. The files stay mapped: what is not asked for takes no memory."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read all headers.

        Raises:
            BundleError: a file is damaged.
        """
        self._found: dict[str, tuple[npt.NDArray[np.uint8], str, tuple[int, ...]]] = {}
        for file in files:
            for name, place, data in _mapped(file):
                self._found[name] = (data, place.dtype, place.shape)

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


def _mapped(file: Path) -> Iterable[tuple[str, Place, npt.NDArray[np.uint8]]]:
    try:
        header, start = read_header(file)
        found = places(file, header, start)
        mapped = np.memmap(file, np.uint8, mode="r")
    except (OSError, BundleError) as error:
        raise BundleError(f"{file.name} of the station is damaged: {error}") from error
    for name, place in found.items():
        yield name, place, mapped[place.offset : place.offset + place.size]
