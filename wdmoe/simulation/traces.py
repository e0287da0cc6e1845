"""Where the gate trace of a scenario is."""

from __future__ import annotations

from pathlib import Path

SHIPPED = "default_model.npz"


def shipped_trace() -> Path:
    """File of the default model's trace; `GateTrace.load` reads it. `data/README.md` beside it says what it holds."""
    return Path(__file__).with_name("data") / SHIPPED


def find_trace(name: str) -> Path:
    """The file that a scenario names; `default` is the shipped one."""
    return shipped_trace() if name == "default" else Path(name)
