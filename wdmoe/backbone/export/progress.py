"""Who is told how far an export is."""

from __future__ import annotations

from typing import Protocol


class ExportProgress(Protocol):
    """Told how far an export is, in bytes of the source."""

    def start(self, total_bytes: int) -> None:
        """Called once, before any work."""
        ...

    def advance(self, source_bytes: int, what: str) -> None:
        """Called after each piece of work; `what` names it for people."""
        ...
