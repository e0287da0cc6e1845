"""How a results folder is told from a bundle, without importing what either needs."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS_KIND = "wdmoe simulation results"


def json_kind(manifest: Path) -> str:
    """What a manifest says of itself; empty where it says nothing or cannot be read."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    kind = found.get("kind", "") if isinstance(found, dict) else ""
    return kind if isinstance(kind, str) else ""
