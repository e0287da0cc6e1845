"""A data set in one NPZ file that a tool fetched into the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wdmoe.arrays import AnyArray
from wdmoe.errors import ConfigError, MissingExtraError


def read_npz(file: Path, what: str, tool: str) -> dict[str, AnyArray]:
    """All arrays of the file, in order of their names.

    Args:
        what: the file holds, for the errors.
        tool: fetches it.
    Raises:
        MissingExtraError: it was not fetched.
        ConfigError: it is no such file.
    """
    if not file.is_file():
        raise MissingExtraError(f"{file} is missing; fetch the {what}: {tool}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in sorted(arrays.files)}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{file} is not an NPZ of {what}; run {tool} again") from error
