"""An export's progress for people: a bar with the time that is left, on stderr."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ExportBar:
    """An `ExportProgress` that draws with rich; use as a context manager around `export_bundle`.

    On a terminal the bar moves in place; into a file or pipe one line per finished part is written.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:10}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._done = 0

    def __enter__(self) -> ExportBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, total_bytes: int) -> None:
        """See `ExportProgress`."""
        self._total = total_bytes
        self._task = self._bar.add_task("station", total=total_bytes)

    def advance(self, source_bytes: int, what: str) -> None:
        """See `ExportProgress`."""
        self._done += source_bytes
        if self._task is not None:
            self._bar.update(self._task, advance=source_bytes, description=what)
        if not self._console.is_terminal:
            self._console.print(f"{what}: {100 * self._done / max(1, self._total):.0f} % done")
