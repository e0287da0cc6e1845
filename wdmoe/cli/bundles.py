"""The bundle that a command line names."""

from __future__ import annotations

from pathlib import Path


def find_bundle(text: str) -> Path:
    """The folder that `text` names."""
    return Path(text)
