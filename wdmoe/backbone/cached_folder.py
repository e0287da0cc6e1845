"""A folder in the cache that takes minutes to make: once, whoever else asks for it meanwhile."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

from wdmoe.errors import BundleError


def make_once(folder: Path, is_made: Callable[[], bool], make: Callable[[], object]) -> Path:
    """Make `folder` unless it is made; a second process that asks meanwhile waits for the first.

    Raises:
        BundleError: the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{folder}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, also by a crash
            if not is_made():
                make()
    except OSError as error:
        raise BundleError(f"cannot write to {folder.parent}: {error.strerror or error}") from error
    return folder
