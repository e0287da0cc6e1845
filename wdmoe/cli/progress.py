"""Progress on standard error: a bar where people look, nothing where a file does."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class ByteProgress:
    """A bar over bytes with the time left, shown inside a `with` block."""

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> ByteProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, total_bytes: int) -> None:
        """How much there is to do."""
        self._progress.update(self._task, total=total_bytes)

    def advance(self, source_bytes: int, what: str) -> None:
        """Some more is done; `what` names it."""
        self._progress.update(self._task, advance=source_bytes, description=what)

    def reach(self, done_bytes: int, total_bytes: int) -> None:
        """So much of so much is done."""
        self._progress.update(self._task, completed=done_bytes, total=total_bytes)
