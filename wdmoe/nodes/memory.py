"""What this machine has left for us."""

from __future__ import annotations

import psutil


def free_memory_bytes() -> int:
    """Memory that could be used without swapping."""
    return int(psutil.virtual_memory().available)
