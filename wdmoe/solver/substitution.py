"""Near experts for far ones: an option before any policy. After the idea of arXiv 2603.23888; the rule is ours [D]."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Int32Array
from wdmoe.solver import _native
from wdmoe.solver.assignments import check_assignments


def replace_far(
    experts: npt.ArrayLike,
    weights: npt.ArrayLike,
    similarity: npt.ArrayLike,
    seconds: npt.ArrayLike,
    least_similarity: float,
    times_faster: float = 2.0,
    most_share: float = 1.0,
) -> Int32Array:
    """Replace an assignment by the most similar expert that is faster by some factor, where one is similar enough.

    A token never gets an expert that it has, or had. Its heaviest assignment chooses first; of equally similar experts
    the lower one is taken. The weight stays with the assignment.

    Args:
        experts: (tokens, top_k) int, -1 where there is none.
        weights: (tokens, top_k) finite, >= 0.
        similarity: (experts, experts), finite; [e, f] is how well f stands in for e.
        seconds: (experts,) what one token takes on the expert's device, 1e-100 to 1e100; infinite where nobody serves
            it.
        least_similarity: what a substitute needs.
        times_faster: >= 1; a substitute takes at most `seconds[e] / times_faster`, and less than `seconds[e]`.
        most_share: 0 to 1; an assignment with more than this share of its token's weight stays.
    Returns:
        (tokens, top_k) int32.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    each_s = _native.floats("seconds", seconds)
    alike = _native.floats("similarity", similarity)
    if each_s.ndim != 1 or not each_s.size:
        raise ValueError(f"seconds must be (experts,), got shape {each_s.shape}")
    if _native.first_bad(np.where(each_s == np.inf, 1.0, each_s).reshape(1, -1), positive=True) >= 0:
        raise ValueError("seconds must be positive: 1e-100 to 1e100, or infinite")
    if alike.shape != (len(each_s), len(each_s)) or not np.isfinite(alike).all():
        raise ValueError(f"similarity must be ({len(each_s)}, {len(each_s)}) and finite, got shape {alike.shape}")
    if not -np.inf < least_similarity < np.inf:
        raise ValueError(f"least_similarity must be finite, got {least_similarity}")
    if not 1 <= times_faster < np.inf:
        raise ValueError(f"times_faster must be at least 1 and finite, got {times_faster}")
    if not 0 <= most_share <= 1:
        raise ValueError(f"most_share must be 0 to 1, got {most_share}")
    given = check_assignments(experts, weights, np.zeros(len(each_s), np.int32), 1)
    changed = given.experts.copy()
    _native.replace_far(changed, given.weights, alike, each_s, least_similarity, times_faster, most_share)
    return changed
