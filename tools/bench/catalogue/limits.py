"""Control groups, where this user may make some: less memory or less time for one process."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def confine(kind: str, file: str, value: int, pid: int) -> bool:
    """Put a process into a group of its own; False where that is not possible (control groups of version 1, root)."""
    room = _ROOT / kind / f"catalogue{os.getpid()}"
    try:
        room.mkdir(exist_ok=True)
        (room / file).write_text(str(value))
        (room / "cgroup.procs").write_text(str(pid))
    except OSError:
        return False
    return True


def release(kind: str) -> None:
    """Give the processes of the group back to the one above."""
    room = _ROOT / kind / f"catalogue{os.getpid()}"
    with suppress(OSError):
        for pid in (room / "cgroup.procs").read_text().split():
            with suppress(OSError):
                (_ROOT / kind / "cgroup.procs").write_text(pid)
        room.rmdir()
