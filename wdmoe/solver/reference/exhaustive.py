"""The oracle of small cases: every choice there is, tried."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.solver.bandwidth import Links
from wdmoe.solver.required_bandwidth import needed_hz

MOST_CHOICES = 2_000_000


def best_within_budget(
    experts: npt.NDArray[np.integer],
    weights: FloatArray,
    device_of: npt.NDArray[np.integer],
    links: Links,
    total_hz: float,
    budget_s: float,
) -> float:
    """Most gate weight that a layer can keep within a latency budget, each token keeping at least one expert.

    Arguments as `wdmoe.solver.budget.select_within_budget`; every expert must be served.

    Returns:
        The sum of kept weights; -inf where nothing fits.
    Raises:
        ValueError: there are more than 2,000,000 choices, or an expert is not served.
    """
    slots = [[slot for slot in range(experts.shape[1]) if row[slot] >= 0] for row in experts]
    if sum(len(row) for row in slots) and (np.asarray(device_of)[experts[experts >= 0]] < 0).any():
        raise ValueError("every expert must be served by a device")
    subsets = [_subsets(row) for row in slots]
    if np.prod([float(len(options)) for options in subsets]) > MOST_CHOICES:
        raise ValueError(f"more than {MOST_CHOICES} choices: too many to try them all")
    devices = links.table.shape[1]
    hertz = np.zeros((devices, experts.size + 1))
    hertz[:, 1:] = needed_hz(links, budget_s / np.arange(1, experts.size + 1))
    load, weight = np.zeros((1, devices), np.int16), np.zeros(1)
    for token, options in enumerate(subsets):
        effects = [_effect(experts[token], kept, token, weights, device_of, devices) for kept in options]
        load = (load[:, None] + np.array([more for more, _ in effects])).reshape(-1, devices)
        weight = (weight[:, None] + np.array([more for _, more in effects])).ravel()
    fits = hertz[np.arange(devices), load].sum(axis=1) <= total_hz
    return float(weight[fits].max(initial=-np.inf))


def _subsets(slots: list[int]) -> list[tuple[int, ...]]:
    """All but the empty one; the empty one alone where there are no slots."""
    made = [tuple(s for i, s in enumerate(slots) if mask >> i & 1) for mask in range(1, 1 << len(slots))]
    return made or [()]


def _effect(
    row: npt.NDArray[np.integer],
    kept: tuple[int, ...],
    token: int,
    weights: FloatArray,
    device_of: npt.NDArray[np.integer],
    devices: int,
) -> tuple[npt.NDArray[np.int16], float]:
    """(devices,) tokens and the weight that one token's kept slots bring."""
    load = np.zeros(devices, np.int16)
    for slot in kept:
        load[device_of[row[slot]]] += 1
    return load, float(weights[token, list(kept)].sum())
