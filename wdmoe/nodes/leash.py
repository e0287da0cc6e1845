"""Starts a `wdmoe-node` command that cannot outlive its parent: `python -m wdmoe.nodes.leash PARENT_PID WORDS...`

Linux sends the signal even where the parent was killed and could clean up nothing. The request outlasts exec, so
it is made here, before the command begins, and not in a fork of a program with threads (`preexec_fn`).
It is bound to the *thread* that started the process: start children on a thread that lives as long as they shall.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def command(words: Sequence[str]) -> list[str]:
    """What to run, from this process, so that `wdmoe-node WORDS` ends with it at the latest."""
    return [sys.executable, "-m", "wdmoe.nodes.leash", str(os.getpid()), *words]


def main() -> None:
    """Ask for the signal, then become the command."""
    parent, words = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before it could be watched
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "wdmoe", *words])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
