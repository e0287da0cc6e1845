"""The gate trace that ships with wdmoe."""

from __future__ import annotations

from pathlib import Path

SHIPPED = "default_model.npz"


def shipped_trace() -> Path:
    """File of the default model's trace; `GateTrace.load` reads it. `data/README.md` beside it says what it holds."""
    return Path(__file__).with_name("data") / SHIPPED
