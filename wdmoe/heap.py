"""What was freed, handed back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_memory() -> None:
    """Give the system back what this process has freed: glibc keeps most of it. It takes some milliseconds."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
