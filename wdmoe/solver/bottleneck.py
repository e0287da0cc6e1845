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

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def shed_bottleneck(
    experts: npt.NDArray[np.int32],
    weights: FloatArray,
    device_of: npt.NDArray[np.integer],
    token_s: FloatArray,
    light: float = 0.35,
) -> npt.NDArray[np.bool_]:
    """Which assignments to compute.

    Args:
        experts: (tokens, top_k), -1 where there is none.
        weights: (tokens, top_k) finite, >= 0.
        device_of: (experts,) the device that serves each expert; -1: none, its assignments are not computed.
        token_s: (devices,) predicted seconds per token: the running mean of what was measured; > 0.
        light: an assignment may be shed where it has at most this share of its token's weight. A token's heaviest is
            never shed. The paper's rule for this is not known: 0.35 is ours.
    Returns:
        (tokens, top_k) bool.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    _check(experts, weights, device_of, token_s, light)
    home = np.where(experts >= 0, np.asarray(device_of)[experts], -1)
    served = home >= 0
    weight = np.where(served, weights, -1.0)
    sheddable = served & (weight <= light * np.where(served, weights, 0.0).sum(axis=1, keepdims=True))
    if weight.size:
        sheddable[np.arange(len(weight)), weight.argmax(axis=1)] = False
    load = np.bincount(home[served], minlength=len(token_s))
    light_load = np.bincount(home[sheddable], minlength=len(token_s))
    end_s = float(((load - light_load) * token_s).max(initial=0.0))
    target = np.floor(end_s / token_s * (1 + 1e-12)).astype(np.int64)
    return served & ~_lightest(home, weight, sheddable, np.clip(load - target, 0, light_load))


def _lightest(
    home: IntArray, weight: FloatArray, sheddable: npt.NDArray[np.bool_], count: IntArray
) -> npt.NDArray[np.bool_]:
    """(tokens, top_k) bool: the `count[k]` lightest sheddable assignments of each device k."""
    where = np.flatnonzero(sheddable)
    device = home.ravel()[where]
    order = np.lexsort((weight.ravel()[where], device))
    device = device[order]
    rank = np.arange(len(device)) - np.searchsorted(device, np.arange(len(count)))[device]
    shed = np.zeros(home.size, bool)
    shed[where[order[rank < count[device]]]] = True
    return shed.reshape(home.shape)


def _check(
    experts: npt.NDArray[np.int32],
    weights: FloatArray,
    device_of: npt.NDArray[np.integer],
    token_s: FloatArray,
    light: float,
) -> None:
    if experts.ndim != 2 or weights.shape != experts.shape:
        raise ValueError(f"experts and weights must both be (tokens, top_k), got {experts.shape} and {weights.shape}")
    if weights.size and not (np.isfinite(weights).all() and weights.min() >= 0):
        raise ValueError("weights must be finite and not negative")
    if token_s.ndim != 1 or not token_s.size or not (np.isfinite(token_s).all() and token_s.min() > 0):
        raise ValueError("token_s must be (devices,), positive and finite")
    if device_of.ndim != 1 or not device_of.size or device_of.min() < -1 or device_of.max() >= len(token_s):
        raise ValueError(f"device_of must be (experts,) from -1 to {len(token_s) - 1}")
    if experts.size and (experts.min() < -1 or experts.max() >= len(device_of)):
        raise ValueError(f"experts must be from -1 to {len(device_of) - 1}")
    if not 0 <= light <= 1:
        raise ValueError(f"light must be 0 to 1, got {light}")
