"""How a base station is, from its engine's status.

The engine states what it knows under these names; all are optional, and more may follow:

- `state`: "ok", "degraded" (an expert has no device) or "waiting" (no expert has one);
- `devices`: a list of objects, one for each device that takes part (`name` among their fields).
"""

from __future__ import annotations

from collections.abc import Mapping

STATES = ("ok", "degraded", "waiting")


def device_count(status: Mapping[str, object]) -> int:
    """Devices that take part."""
    devices = status.get("devices")
    return len(devices) if isinstance(devices, (list, tuple)) else 0


def health(status: Mapping[str, object]) -> dict[str, object]:
    """The body of /health."""
    devices = device_count(status)
    state = status.get("state")
    if state not in STATES:
        state = "ok" if devices else "waiting"
    return {"status": state, "devices": devices}
