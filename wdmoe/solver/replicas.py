"""Replicas: an expert on several devices. Which copy serves each assignment [D].

All assignments of one expert are alike, so this is a flow of counts, and the least time of the last device is found
exactly: docs/solver.md.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.solver import _native
from wdmoe.solver.assignments import check_int32, check_seconds


def choose_copies(
    experts: npt.ArrayLike, holders: npt.ArrayLike, token_s: npt.ArrayLike, busy_s: npt.ArrayLike | None = None
) -> npt.NDArray[np.int32]:
    """The device of each assignment, so that the slowest device is done as soon as can be.

    Device d with n_d assignments is done after `busy_s[d] + n_d token_s[d]`; one without any does not count. Where
    there is a choice between two that cost nothing, experts of one token go to one device, which then gets its hidden
    state once.

    Args:
        experts: (tokens, top_k) int, -1 where there is none.
        holders: (experts, devices) bool, who holds which.
        token_s: (devices,) seconds that a device takes for an assignment, positive and finite.
        busy_s: (devices,) seconds before a device can begin, finite, >= 0. None: 0.
    Returns:
        (tokens, top_k) int32, which other policies take as `device_of`; -1 where nobody holds the expert.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    chosen, held = check_int32("experts", experts), _native.regular("holders", holders)
    if chosen.ndim != 2:
        raise ValueError(f"experts must be integers (tokens, top_k), got shape {chosen.shape}")
    if held.ndim != 2 or held.dtype != np.bool_ or not held.size:
        raise ValueError(f"holders must be bool (experts, devices), got {held.dtype} {held.shape}")
    each_s = check_seconds("token_s", token_s, held.shape[1])
    busy = None if busy_s is None else check_seconds("busy_s", busy_s, held.shape[1], positive=False)
    return _native.choose_copies(chosen, np.ascontiguousarray(held).view(np.uint8), each_s, busy)
