"""A `wdmoe-node` command in a process of its own, its output in files. It ends with its parent at the latest.

Linux sends a signal even where the parent was killed and could clean up nothing. The request for it outlasts exec.
`python -m wdmoe.nodes.local.process PARENT_PID WORDS...` makes it before the command begins, and not in a fork of a
program with threads (`preexec_fn`). It is bound to the *thread* that started the process: start children on a thread
that lives as long as they shall.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from wdmoe.errors import WdmoeError

_TAIL_BYTES = 4096
_OURS = ("WDMOE_JOIN", "WDMOE_API_KEY")  # would change what the command does
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ChildError(WdmoeError):
    """A process that should go on has ended."""


class Child:
    """One process. It ends with this one at the latest, even where this one is killed."""

    def __init__(self, name: str, words: Sequence[str], folder: Path, *, listens: bool = False) -> None:
        """Start it, with `folder` as its working directory and for its output. Call on the main thread.

        Args:
            listens: it reads lines from us, see `tell`.
        Raises:
            ChildError: it cannot be started.
        """
        self.name = name
        self.out = folder / f"{name}.out"
        self.log = folder / f"{name}.log"
        environment = {key: value for key, value in os.environ.items() if key not in _OURS}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        try:
            with self.out.open("wb") as out, self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    _bound_to_us(words),
                    stdin=subprocess.PIPE if listens else subprocess.DEVNULL,
                    stdout=out,
                    stderr=log,
                    cwd=folder,
                    env=environment,
                    start_new_session=True,  # Ctrl-C in a terminal is for the parent, which ends its children in order
                )
        except OSError as error:
            raise ChildError(f"cannot start {name}: {error.strerror or error}") from error

    def tell(self, line: str) -> None:
        """Send it a line.

        Raises:
            ChildError: it does not listen any more.
        """
        if self._process.stdin is None:
            raise ValueError(f"{self.name} was not started to listen")
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except OSError as error:
            raise ChildError(f"{self.name} does not listen any more: {self.last_line() or error}") from error

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def check(self) -> None:
        """Raises ChildError if it has ended, with the last line it logged."""
        code = self._process.poll()
        if code is not None:
            how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            raise ChildError(f"{self.name} ended ({how}): {self.last_line() or 'it logged nothing'}")

    def last_line(self) -> str:
        """Of its log; "" where there is none."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = log.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        said = [line.strip() for line in lines if line.strip()]
        return said[-1].removeprefix("Error: ") if said else ""

    def ask_to_end(self) -> None:
        """SIGTERM, to it and to whatever it started."""
        self._signal(signal.SIGTERM)

    def end(self, timeout_s: float) -> None:
        """Wait for its end, with SIGKILL after `timeout_s`."""
        try:
            self._process.wait(max(timeout_s, 0))
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:  # still between fork and setsid
                self._process.send_signal(number)


def end_all(children: Iterable[Child], timeout_s: float) -> None:
    """Ask all to end, and kill what is left after `timeout_s`."""
    children = list(children)
    for child in children:
        child.ask_to_end()
    until_s = time.monotonic() + timeout_s
    for child in children:
        child.end(until_s - time.monotonic())


def _bound_to_us(words: Sequence[str]) -> list[str]:
    """What to run so that `wdmoe-node WORDS` ends with this process at the latest."""
    return [sys.executable, "-m", "wdmoe.nodes.local.process", str(os.getpid()), *words]


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
