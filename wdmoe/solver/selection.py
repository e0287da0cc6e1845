"""Which experts serve which token, given how long each takes: arrays in, arrays out.

Marks of certainty: [P] published in the WDMoE paper (arXiv 2411.06681), [S] second hand from a public
re-implementation, [D] derived here. docs/solver.md has the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray, Int32Array, UInt8Array
from wdmoe.solver import _native
from wdmoe.solver.assignments import check_int32
from wdmoe.solver.bandwidth import Links, with_compute
from wdmoe.solver.bottleneck import shed_bottleneck
from wdmoe.solver.budget import select_within_budget

POLICIES = ("topk", "cosine", "bottleneck", "budget")
WLR_DEFINITIONS = ("mean", "sum")
_SHORTEST_S = 1e-100  # of a device that serves nothing


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Experts per token after selection."""

    experts: Int32Array  # (tokens, top_k) heaviest first, -1 where dropped
    weights: FloatArray  # (tokens, top_k) 0 where dropped; the rest kept or renormalised as asked
    dropped_weight: FloatArray  # (tokens,) share, 0 to 1, of the token's top-k weight that is not computed
    wlr: float  # mean over tokens of the weight-to-latency ratio [P] of what is kept, 1/s
    theta: float  # threshold that `cosine` ended with; 0 for other policies


def select_experts(
    gate: npt.ArrayLike,
    latency_s: npt.ArrayLike,
    policy: str = "topk",
    top_k: int = 2,
    renormalise: bool = True,
    theta: float = 0.5,
    theta_step: float = 0.05,
    gamma: float = 1.05,
    wlr: str = "mean",
    available: npt.ArrayLike | None = None,
    substitute: bool = False,
    device_of: npt.ArrayLike | None = None,
    budget_s: float = 0.0,
) -> Choice:
    """Choose at most `top_k` experts for each token from full gate rows, then prune as `prune_experts` does.

    Args:
        gate: (tokens, experts) weights, finite, >= 0; rows need not sum to 1. Ties go to the lower expert.
        latency_s: (experts,) or (tokens, experts) seconds that an expert takes for one token, > 0 and finite.
        policy: "topk" (no more than availability asks for), "cosine" (Algorithm 1 [S]), "bottleneck" (Algorithm 2 [U])
            or "budget" [D].
        top_k: 1 to experts.
        renormalise: the weights of a token sum to 1; otherwise they stay as in `gate`.
        theta, theta_step, gamma: as `prune_experts`.
        wlr: as `prune_experts`.
        available: (experts,) bool; others are not used. None: all are.
        substitute: take the next best available expert for one that is not, instead of dropping it.
        device_of, budget_s: as `prune_experts`.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    rows = _matrix("gate", gate)
    usable = _availability(available, rows.shape[1])
    allowed = usable if substitute else None
    experts, weights = _native.top_k(rows, top_k, allowed, renormalise)
    latency = _of_experts(latency_s, rows.shape[1])
    choice = prune_experts(
        experts, weights, latency, policy, renormalise, theta, theta_step, gamma, wlr, available, device_of, budget_s
    )
    if allowed is None:
        return choice
    lost = _share_lost_to_substitution(rows, experts, top_k)
    dropped = 1.0 - (1.0 - lost) * (1.0 - choice.dropped_weight)
    return Choice(choice.experts, choice.weights, dropped, choice.wlr, choice.theta)


def prune_experts(
    experts: npt.ArrayLike,
    weights: npt.ArrayLike,
    latency_s: npt.ArrayLike,
    policy: str = "topk",
    renormalise: bool = True,
    theta: float = 0.5,
    theta_step: float = 0.05,
    gamma: float = 1.05,
    wlr: str = "mean",
    available: npt.ArrayLike | None = None,
    device_of: npt.ArrayLike | None = None,
    budget_s: float = 0.0,
) -> Choice:
    """Prune a model's own top-k. A family's routing (groups, biases, sigmoid gates) is thereby respected.

    Experts that are not available are dropped first. `cosine` is Algorithm 1 [S]: in each token whose cosine
    between weights and latencies is at most theta, the lightest expert is dropped, once; when the mean WLR
    does not exceed gamma times its start, theta rises by `theta_step`, up to 1, and all begins again. A
    token keeps its last expert, and one whose weights are all zero is left alone. Tokens that lose nothing
    keep their weights to the bit.

    `bottleneck` is `shed_bottleneck`, and `budget` is `select_within_budget`, for devices that have links of their own:
    a device takes its tokens times the latency of its slowest expert. Where they share a band, call those.

    Args:
        experts: (tokens, k) int, -1 where there is none.
        weights: (tokens, k) float, finite, >= 0.
        latency_s: (experts,) or (tokens, experts) seconds that an expert takes for one token, > 0 and finite.
            "bottleneck" and "budget" take the former only.
        policy: "topk", "cosine", "bottleneck" or "budget".
        renormalise: what a token keeps grows to the sum it had; otherwise kept weights stay as they are.
        theta: first threshold, 0 to 1. Published re-implementation: 0.5, later 0.8 [S].
        theta_step: 0.001 to 1 [S: 0.05].
        gamma: > 0 [S: 1.05].
        wlr: the WLR of a token is the "mean" over its kept experts of weight/latency [S], or the "sum". At a
            fixed latency a drop can never raise the sum unless weights are renormalised [D].
        available: (experts,) bool; None: all are.
        device_of: "bottleneck" and "budget": (experts,) int, the device of each expert, or -1. None: each its own.
        budget_s: "budget": seconds that the slowest device may take for all tokens, > 0.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    _check_options(policy, wlr, theta, theta_step, gamma)
    chosen = _indices(experts)
    kept = np.array(_native.floats("weights", weights))
    if kept.shape != chosen.shape:
        raise ValueError(f"weights must have the shape of experts {chosen.shape}, got {kept.shape}")
    latency = _latency(latency_s, chosen.shape[0])
    usable = _availability(available, latency.shape[1])

    def prune(cosine: bool) -> tuple[FloatArray, float, float]:
        return _native.prune(chosen, kept, latency, usable, cosine, renormalise, wlr == "sum", theta, theta_step, gamma)

    dropped, ratio, last_theta = prune(policy == "cosine")
    if policy in ("bottleneck", "budget"):
        marked = _marked(chosen, kept, latency, policy, device_of, budget_s)
        shed, _ = _native.keep_marked(chosen, kept, marked, renormalise)
        dropped, ratio = 1.0 - (1.0 - dropped) * (1.0 - shed), prune(cosine=False)[1]
    return Choice(chosen, kept, dropped, ratio, last_theta)


def _marked(
    experts: Int32Array,
    weights: FloatArray,
    latency_s: FloatArray,
    policy: str,
    device_of: npt.ArrayLike | None,
    budget_s: float,
) -> UInt8Array:
    """(tokens, k) 1 where a policy that looks at devices keeps the assignment."""
    if len(latency_s) != 1:
        raise ValueError(f"latency_s must be (experts,) for policy {policy}, got {latency_s.shape}")
    home = np.arange(latency_s.shape[1]) if device_of is None else check_int32("device_of", device_of)
    if home.shape != latency_s.shape[1:]:
        raise ValueError(f"device_of must be ({latency_s.shape[1]},), one device an expert, got shape {home.shape}")
    token_s = np.full(max(int(home.max(initial=-1)) + 1, 1), _SHORTEST_S)
    np.maximum.at(token_s, home[home >= 0], latency_s[0, home >= 0])
    if policy == "bottleneck":
        return shed_bottleneck(experts, weights, home, token_s).view(np.uint8)
    none = np.zeros_like(token_s)
    links = Links(downlink_snr_hz=none, uplink_snr_hz=none, downlink_bits=none, uplink_bits=none)
    found = select_within_budget(experts, weights, home, with_compute(links, token_s), 1.0, budget_s)
    return (found.experts >= 0).view(np.uint8)


def _check_options(policy: str, wlr: str, theta: float, theta_step: float, gamma: float) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}; got {policy!r}")
    if wlr not in WLR_DEFINITIONS:
        raise ValueError(f"wlr must be one of {', '.join(WLR_DEFINITIONS)}; got {wlr!r}")
    if not 0 <= theta <= 1:  # also refuses NaN
        raise ValueError(f"theta must be 0 to 1, got {theta}")
    if not 0.001 <= theta_step <= 1:
        raise ValueError(f"theta_step must be 0.001 to 1, got {theta_step}")
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")


def _matrix(name: str, values: npt.ArrayLike) -> FloatArray:
    given = _native.floats(name, values)
    if given.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {given.shape}")
    return given


def _indices(experts: npt.ArrayLike) -> Int32Array:
    """A C-contiguous int32 copy, which pruning may change."""
    given = _native.regular("experts", experts)
    if given.ndim != 2:
        raise ValueError(f"experts must have two dimensions (tokens, k), got shape {given.shape}")
    return np.array(check_int32("experts", given))


def _of_experts(latency_s: npt.ArrayLike, n_experts: int) -> FloatArray:
    array = _native.floats("latency_s", latency_s)
    if not array.ndim or array.shape[-1] != n_experts:
        raise ValueError(f"latency_s must end in the {n_experts} experts of gate, got shape {array.shape}")
    return array


def _latency(latency_s: npt.ArrayLike, tokens: int) -> FloatArray:
    """(1 or tokens, experts), checked."""
    array = _native.floats("latency_s", latency_s)
    if array.ndim == 1:
        array = array.reshape(1, -1)
    elif array.ndim != 2 or array.shape[0] != tokens:
        raise ValueError(f"latency_s must be (experts,) or ({tokens}, experts), got shape {array.shape}")
    if array.size == 0 and tokens > 0:
        raise ValueError(f"latency_s must have at least one expert, got shape {array.shape}")
    bad = _native.first_bad(array, positive=True)
    if bad >= 0:
        where = f"at expert {bad % array.shape[1]}"
        raise ValueError(f"latency_s must be positive and finite, got {array.flat[bad]} {where}")
    return array


def _availability(available: npt.ArrayLike | None, n_experts: int) -> UInt8Array | None:
    if available is None:
        return None
    flags = _native.regular("available", available)
    if flags.shape != (n_experts,) or flags.dtype != np.bool_:
        raise ValueError(f"available must be bool of shape ({n_experts},), got {flags.dtype} {flags.shape}")
    return np.ascontiguousarray(flags).view(np.uint8)


def _share_lost_to_substitution(gate: FloatArray, experts: Int32Array, top_k: int) -> FloatArray:
    """(tokens,) share of the weight of the true top-k that the substitutes do not have."""
    best = _native.top_k(gate, top_k, None, False)[1].sum(axis=1)
    taken = np.where(experts >= 0, np.take_along_axis(gate, np.maximum(experts, 0), axis=1), 0.0).sum(axis=1)
    return np.where(best > 0, 1.0 - taken / np.where(best > 0, best, 1.0), 0.0)
