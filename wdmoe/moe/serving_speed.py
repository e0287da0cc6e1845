"""How fast devices compute while they serve: by the arithmetic that they say they did for single tokens.

A measurement at the start is made while everything else starts, too. What was served is the better sample; it belongs
to a device, not to a connection.
"""

from __future__ import annotations

import statistics

SMOOTHING = 0.05  # weight of the newest answer in the running mean
LEAST_ANSWERS = 20  # before a mean counts
MOST_DEVICES = 4096  # that are remembered


class ServingSpeed:
    """Running means by device. Fed by the model thread; any thread may ask."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, int]] = {}  # seconds of an expert for a token, and how many answers

    def saw(self, device_id: str, experts: int, compute_s: float) -> None:
        """One token took so long in so many experts."""
        each_s = compute_s / experts
        mean_s, answers = self._means.get(device_id, (each_s, 0))
        if answers or len(self._means) < MOST_DEVICES:
            self._means[device_id] = mean_s + SMOOTHING * (each_s - mean_s), answers + 1

    def against_usual(self) -> dict[str, float]:
        """device_id -> speed against the median device's, of those that answered often enough."""
        known = {name: mean for name, (mean, answers) in self._means.copy().items() if answers >= LEAST_ANSWERS}
        usual_s = statistics.median(known.values()) if known else 0.0
        return {name: usual_s / mean_s for name, mean_s in known.items() if mean_s > 0 and usual_s > 0}
