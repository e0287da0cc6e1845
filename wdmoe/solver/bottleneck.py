"""The policy `bottleneck`: relieve the device that will be last of its lightest work (Algorithm 2 of WDMoE [U]).

How long a device takes for a token is predicted by the mean of what was measured. The bottleneck is the device with the
greatest tokens x mean; it sheds assignments that hardly count, the lightest first, until another one is the bottleneck,
which then does the same. That ends at the device that has nothing light left to shed. So the end is known at once: its
time is the greatest of what the devices need without their light work, and every device sheds just enough to be ready
by then [D].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.solver import _native
from wdmoe.solver.assignments import check_assignments, check_seconds


def shed_bottleneck(
    experts: npt.ArrayLike,
    weights: npt.ArrayLike,
    device_of: npt.ArrayLike,
    token_s: npt.ArrayLike,
    light: float = 0.35,
) -> npt.NDArray[np.bool_]:
    """Which assignments to compute.

    Args:
        experts: (tokens, top_k) int, -1 where there is none.
        weights: (tokens, top_k) finite, >= 0.
        device_of: (experts,) int, the device that serves each expert; or (tokens, top_k) int, the device that serves
            each assignment, where experts have replicas. -1: none does, and it is not computed.
        token_s: (devices,) predicted seconds per token: the running mean of what was measured; > 0.
        light: an assignment may be shed where it has at most this share of its token's weight. A token's heaviest is
            never shed. The paper's rule for this is not known: 0.35 is ours.
    Returns:
        (tokens, top_k) bool.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    each_s = check_seconds("token_s", token_s)
    if not 0 <= light <= 1:
        raise ValueError(f"light must be 0 to 1, got {light}")
    given = check_assignments(experts, weights, device_of, len(each_s))
    kept = _native.shed_bottleneck(given.device, given.weights, each_s, light)
    return kept.view(np.bool_)
