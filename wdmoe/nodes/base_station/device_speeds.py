"""How fast devices are, as placement sees them: by what they say, and by what they showed. No I/O."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

CHANGE = 1.5  # a speed counts as another one only if it is so many times higher or lower: little is moved
MOST = 8.0  # a device that served is at most so many times faster or slower than the usual one


def speeds_now(
    reported: Mapping[str, float], shown: Mapping[str, float | None], before: Mapping[str, float]
) -> dict[str, float]:
    """FLOP/s of each device.

    A device measures itself on an expert of usual size, which says little about small ones. So the figures of those
    that served count by their ratio: the usual one of them has the median of what all say.

    Args:
        reported: device_id -> FLOP/s by its own measurement, of all live devices.
        shown: device_id -> its speed while serving against the median device's; None where it served too little.
        before: what this returned last.
    """
    usable = [flops for flops in reported.values() if 1.0 <= flops < 1e18]
    usual = statistics.median(usable) if usable else 1.0
    speeds = {}
    for device_id, flops in reported.items():
        ratio = shown.get(device_id)
        speed = flops if ratio is None else usual * min(max(ratio, 1 / MOST), MOST)
        known = before.get(device_id, 0.0)
        speeds[device_id] = known if known / CHANGE < speed < known * CHANGE else speed
    return speeds
