"""Progress on standard error: a bar where people look, nothing where a file does.

Bars appear with the first report, so that nothing shows where there was nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

Self = TypeVar("Self", bound="_Bar")


class _Bar:
    def __init__(self, what: str, *columns: ProgressColumn) -> None:
        console = Console(stderr=True)
        line = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
        self._progress = Progress(*line, console=console, disable=not console.is_terminal)
        self._what = what
        self._stop: Callable[[], None] = lambda: None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _show(self, what: str, *, total: float | None, done: float | None = None, more: float | None = None) -> None:
        if not self._progress.tasks:
            self._progress.add_task(self._what, total=total)
            self._progress.start()
            self._stop = self._progress.stop
        task = self._progress.task_ids[0]
        self._progress.update(task, description=what or self._what, total=total, completed=done, advance=more)


class ByteProgress(_Bar):
    """A bar over bytes with the time left, inside a `with` block."""

    def __init__(self, what: str) -> None:
        super().__init__(what, DownloadColumn())

    def start(self, total_bytes: int) -> None:
        """How much there is to do."""
        self._show("", total=total_bytes)

    def advance(self, source_bytes: int, what: str) -> None:
        """Some more is done; `what` names it."""
        self._show(what, total=None, more=source_bytes)

    def reach(self, done_bytes: int, total_bytes: int) -> None:
        """So much of so much is done."""
        self._show("", total=total_bytes, done=done_bytes)


class StageProgress(_Bar):
    """A bar for each stage of some work, one after the other, inside a `with` block."""

    def reach(self, stage: str, done: float) -> None:
        """A stage (0 to 1) is so far."""
        self._show(f"{self._what}: {stage}", total=1.0, done=done)


class CountProgress(_Bar):
    """A bar over things that are counted, inside a `with` block."""

    def __init__(self, what: str, things: str) -> None:
        super().__init__(what, MofNCompleteColumn(), TextColumn(things))

    def reach(self, done: int, total: int) -> None:
        """So many of so many are done."""
        self._show("", total=total, done=done)
