"""One layer, decided: copies, experts, bits and hertz together, and how long it takes with them.

The way of a decision: near experts for far ones (where asked for), a copy for each assignment, the policy, bits, band.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from wdmoe.arrays import BoolArray, FloatArray, Int32Array
from wdmoe.solver import _native
from wdmoe.solver.bottleneck import shed_bottleneck
from wdmoe.solver.budget import select_at_most_dropped, select_within_budget
from wdmoe.solver.layer.latency import (
    LayerTime,
    Levers,
    bits_of_assignments,
    broadcast_s,
    layer_time,
    mean_vector_bits,
    time_spent,
)
from wdmoe.solver.layer.radio_state import RadioState
from wdmoe.solver.replicas import choose_copies
from wdmoe.solver.selection import POLICIES, prune_experts
from wdmoe.solver.substitution import replace_far

_LONGEST_S = 1e9  # stands for a device that nothing gets through to, where a policy wants a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a layer is decided. Defaults are the baseline: the gate's own experts, each with 16 bits."""

    name: str = "topk"
    max_dropped: float = 0.0  # `budget` without budget_s: share of the layer's gate weight, at most
    budget_s: float = 0.0  # `budget`: seconds that a layer may take; 0: as fast as max_dropped lets it be
    light: float = 0.35  # `bottleneck`: what may be shed, as a share of its token's weight
    theta: float = 0.5  # `cosine`, as the next two [S]
    theta_step: float = 0.05
    gamma: float = 1.05
    least_similarity: float = 2.0  # replace far experts that have one so similar; above 1: never
    times_faster: float = 2.0  # what counts as far
    levers: Levers = field(default_factory=Levers)

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.name!r}")
        if not 0 <= self.max_dropped <= 1:
            raise ValueError(f"max_dropped must be 0 to 1, got {self.max_dropped}")
        if not 0 <= self.budget_s < np.inf:
            raise ValueError(f"budget_s must be zero (none) or positive and finite, got {self.budget_s}")


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """What is computed where, and how long that takes."""

    experts: Int32Array  # (tokens, top_k), -1 where dropped; another than the gate's where it was replaced
    device: Int32Array  # (tokens, top_k), -1 where dropped
    dropped_weight: float  # share, 0 to 1, of the layer's gate weight that is not computed
    replaced_weight: float  # share that another expert than the gate's computes
    time: LayerTime


def plan_layer(
    experts: Int32Array,
    weights: FloatArray,
    holders: BoolArray,
    air: RadioState,
    policy: Policy,
    similarity: FloatArray | None = None,
) -> LayerPlan:
    """Decide one layer.

    Args:
        experts: (tokens, top_k) the gate's choice, -1 where there is none.
        weights: (tokens, top_k) what the policy ranks by, finite, >= 0: the gate's probabilities.
        holders: (experts, devices) who holds which; every expert somewhere.
        similarity: (experts, experts) how well an expert stands in for another; None: nothing is replaced.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    weights = _native.floats("weights", weights)
    full = np.full(air.devices, float(policy.levers.bits))
    each_s = np.minimum(air.assignment_s(full), _LONGEST_S)
    wanted = _replaced(experts, weights, holders, each_s, policy, similarity)
    device = choose_copies(wanted, holders, each_s)
    kept = _kept(wanted, weights, device, air, policy, each_s, holders)
    chosen = np.where(kept, wanted, np.int32(-1))
    at = np.where(kept, device, np.int32(-1))
    bits = bits_of_assignments(air, policy.levers, weights, at)
    total = float(weights[experts >= 0].sum())
    dropped = float(weights[(experts >= 0) & ~kept].sum())
    replaced = float(weights[kept & (wanted != experts)].sum())
    time = layer_time(air, policy.levers, chosen, at, bits)
    return LayerPlan(chosen, at, dropped / total if total else 0.0, replaced / total if total else 0.0, time)


def carried_out(plan: LayerPlan, known: RadioState, air: RadioState, levers: Levers) -> LayerPlan:
    """A plan that was made for the channel `known`, with the time that it takes on `air`."""
    if air is known:
        return plan
    return replace(plan, time=time_spent(air, known, levers, plan.experts, plan.device, plan.time))


def _replaced(
    experts: Int32Array,
    weights: FloatArray,
    holders: BoolArray,
    each_s: FloatArray,
    policy: Policy,
    similarity: FloatArray | None,
) -> Int32Array:
    if similarity is None or policy.least_similarity > 1:
        return experts
    return replace_far(
        experts, weights, similarity, _expert_s(holders, each_s), policy.least_similarity, policy.times_faster
    )


def _expert_s(holders: BoolArray, each_s: FloatArray) -> FloatArray:
    """(experts,) seconds on the fastest device that holds it."""
    fastest: FloatArray = np.where(holders, each_s, np.inf).min(axis=1)
    return fastest


def _kept(
    experts: Int32Array,
    weights: FloatArray,
    device: Int32Array,
    air: RadioState,
    policy: Policy,
    each_s: FloatArray,
    holders: BoolArray,
) -> BoolArray:
    """(tokens, top_k) what the policy keeps."""
    if policy.name == "cosine":
        latency_s = np.minimum(_expert_s(holders, each_s), _LONGEST_S)
        start, step, gamma = policy.theta, policy.theta_step, policy.gamma
        return prune_experts(experts, weights, latency_s, "cosine", False, start, step, gamma).experts >= 0
    if policy.name == "bottleneck":
        return shed_bottleneck(experts, weights, device, each_s, policy.light)
    if policy.name == "budget":
        return _kept_by_budget(experts, weights, device, air, policy)
    return device >= 0


def _kept_by_budget(
    experts: Int32Array, weights: FloatArray, device: Int32Array, air: RadioState, policy: Policy
) -> BoolArray:
    levers = policy.levers
    bits = bits_of_assignments(air, levers, weights, device)
    vector = mean_vector_bits(air, levers, device, bits)
    links = air.links(vector, downlink=not levers.broadcasts, compute_s=air.token_s)
    if not policy.budget_s:
        choice = select_at_most_dropped(experts, weights, device, links, air.total_hz, policy.max_dropped)
        return choice.experts >= 0
    left_s = max(policy.budget_s - broadcast_s(air, levers, device, bits), 1e-9)
    return select_within_budget(experts, weights, device, links, air.total_hz, left_s).experts >= 0
