"""First step of a layer: which of the experts the gate named are asked, and with what weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import BoolArray, Float32Array, FloatArray, Int32Array
from wdmoe.errors import BundleError
from wdmoe.layer_call import Demand
from wdmoe.solver.bandwidth import Links
from wdmoe.solver.bottleneck import shed_bottleneck
from wdmoe.solver.budget import select_at_most_dropped, select_within_budget
from wdmoe.solver.priced_drop import drop_at_price
from wdmoe.solver.ranking import rank_weights
from wdmoe.solver.selection import prune_experts


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What will be asked for. `weights` already follow the model's rule for dropped experts."""

    experts: Int32Array  # (tokens, top_k), -1 where dropped
    weights: Float32Array  # (tokens, top_k), 0 where dropped
    dropped: Float32Array | None = None  # (tokens,) share of the gate weight left out by the policy; None: nothing
    lost: Float32Array | None = None  # (tokens,) share left out because no device serves the expert; None: nothing
    worth: float = 0.0  # of all that the gate asked for, by what the policy ranks by; 0: no policy looked at it
    unspent: float = 0.0  # of `Bound`, for the next pass


@dataclass(frozen=True, slots=True)
class Bound:
    """How much worth, by what the policy ranks by, `budget` may drop, where it is given no time.

    Among the many tokens of a prompt some experts are light: each layer drops its share. An answer is computed token by
    token, and of the few experts of one token none is light. So its layers pay from one account of the request, a price
    for each second: they drop little where that saves little. The account is in worths of a mean token of the layer.
    """

    share: float  # of the worth of all that the gate asks for
    unspent: float = 0.0  # the account: what earlier layers and passes left
    most: float = 0.0  # that it may hold
    mean_worth: float = 0.0  # of a token's experts in this layer; 0: none was seen
    price_s: float = 0.0  # seconds that such a worth must save; 0: not known


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """What the devices take for a token now, as far as that is known."""

    device_of: Int32Array  # (experts,) the device that serves each, -1: none does
    token_s: FloatArray  # (devices,) expected seconds per token, > 0
    links: Links | None = None  # the same for `budget`, which decides with the band in hand; None for other policies
    total_hz: float = 1.0  # the band that they share


def choose(
    demand: Demand,
    *,
    policy: str,
    costs: Costs | None,
    budget_s: float,
    available: BoolArray | None,
    renormalise: bool,
    gate_temperature: float,
    rank: str,
    bound: Bound | None = None,
) -> Chosen:
    """Apply availability, then the policy, to the gate's demand.

    Args:
        demand: the gate's own choice.
        policy: "topk" keeps it; "cosine" drops by weight and latency (Algorithm 1 of WDMoE); "bottleneck" relieves the
            device that would be last (Algorithm 2); "budget" keeps the most weight that fits a time, or is as fast as
            a bound on what it drops allows.
        costs: of the devices; None where nothing is known: the policy drops nothing.
        budget_s: seconds that this layer may take, for "budget".
        available: (experts,) bool; None where every expert is served.
        renormalise: kept weights grow to the sum of all; else they keep their values.
        gate_temperature: what the router's scores are divided by before a policy ranks by them.
        rank: what a policy ranks by, as in `wdmoe.solver.ranking`.
        bound: for "budget", in place of `budget_s`.
    Raises:
        BundleError: `rank` is "energy", and the model's router does not give its scores.
    """
    kept, lost = (demand, None) if available is None else _without_unavailable(demand, available, renormalise)
    if policy == "topk" or costs is None:
        return Chosen(kept.experts, kept.weights, lost=lost, unspent=bound.unspent if bound else 0.0)
    ranks = _ranks(kept, gate_temperature, rank)
    worth = float(ranks.sum())
    pruned = _prune(kept.experts, ranks, policy, costs, budget_s, bound)
    unspent = 0.0 if bound is None else _left(bound, ranks, pruned != kept.experts)
    if np.array_equal(pruned, kept.experts):
        return Chosen(kept.experts, kept.weights, lost=lost, worth=worth, unspent=unspent)
    weights = np.where(pruned >= 0, kept.weights, np.float32(0))
    dropped = _share(kept.weights - weights, demand.weights)
    if renormalise:
        weights = _grow(weights, kept.weights.sum(axis=1))
    return Chosen(pruned, weights, dropped=dropped, lost=lost, worth=worth, unspent=unspent)


def joined(choices: Sequence[Chosen]) -> Chosen:
    """Choices for some tokens each, at least one, as one for all of them."""
    return Chosen(
        np.concatenate([each.experts for each in choices]),
        np.concatenate([each.weights for each in choices]),
        dropped=_shares([each.dropped for each in choices], choices),
        lost=_shares([each.lost for each in choices], choices),
        worth=sum(each.worth for each in choices),
        unspent=choices[-1].unspent,
    )


def _shares(found: Sequence[Float32Array | None], choices: Sequence[Chosen]) -> Float32Array:
    empty = (np.zeros(len(each.experts), np.float32) for each in choices)
    return np.concatenate([none if share is None else share for share, none in zip(found, empty, strict=True)])


def _prune(
    experts: Int32Array, ranks: FloatArray, policy: str, costs: Costs, budget_s: float, bound: Bound | None
) -> Int32Array:
    """(tokens, top_k) what the policy keeps, -1 where it drops."""
    if policy == "bottleneck":
        kept = shed_bottleneck(experts, ranks, costs.device_of, costs.token_s)
        return np.where(kept, experts, np.int32(-1))
    if policy == "budget" and costs.links is not None and bound is not None:
        return _prune_bounded(experts, ranks, costs, costs.links, bound)
    if policy == "budget" and costs.links is not None:
        return select_within_budget(
            experts, ranks, costs.device_of, costs.links, costs.total_hz, budget_s, renormalise=False
        ).experts
    latency_s = np.append(costs.token_s, costs.token_s.mean())[costs.device_of]  # index -1: not served
    return prune_experts(experts, ranks, latency_s, policy=policy, renormalise=False).experts


def _prune_bounded(experts: Int32Array, ranks: FloatArray, costs: Costs, links: Links, bound: Bound) -> Int32Array:
    """(tokens, top_k) what a bound lets `budget` keep."""
    if len(experts) > 1 or not bound.price_s or not bound.mean_worth:
        return select_at_most_dropped(
            experts, ranks, costs.device_of, links, costs.total_hz, bound.share, renormalise=False
        ).experts
    worth = ranks[0] / bound.mean_worth
    device = np.where(experts[0] >= 0, costs.device_of[experts[0]], -1)
    may_drop = bound.unspent + bound.share * float(worth.sum())
    kept = drop_at_price(device, worth, links, costs.total_hz, bound.price_s, may_drop)
    return np.where(kept, experts, np.int32(-1))


def _left(bound: Bound, ranks: FloatArray, dropped: BoolArray) -> float:
    """What the account holds after a layer."""
    mean_worth = bound.mean_worth or float(ranks.sum()) / len(ranks) or 1.0
    left = bound.unspent + (bound.share * float(ranks.sum()) - float(ranks[dropped].sum())) / mean_worth
    return min(max(left, 0.0), bound.most)


def substitute(demand: Demand, rows: npt.NDArray[np.intp], available: BoolArray) -> Chosen | None:
    """The next best experts for tokens that got no answer at all: what is left of their own, else the best by gate.

    Args:
        demand: the gate's own choice for all tokens.
        rows: (n,) the tokens to help.
        available: (experts,) bool, served by a device that may be asked.
    Returns:
        A choice for these n tokens, or None where no expert is available.
    """
    if not available.any():
        return None
    own = demand.experts[rows]
    mask = (own >= 0) & available[own]
    experts = np.where(mask, own, -1).astype(np.int32)
    weights = np.where(mask, demand.weights[rows], np.float32(0))
    scores = demand.gate[rows] if demand.gate is not None else np.zeros((len(rows), available.size))
    best = np.where(available, scores, -np.inf).argmax(axis=1)
    empty = ~mask.any(axis=1)
    experts[empty, 0] = best[empty]
    total = demand.weights[rows].sum(axis=1)
    weights[empty, 0] = total[empty]
    return Chosen(experts, _grow(weights, total))


def _without_unavailable(demand: Demand, available: BoolArray, renormalise: bool) -> tuple[Demand, Float32Array | None]:
    served = (demand.experts >= 0) & available[demand.experts]
    if served.all():
        return demand, None
    experts = np.where(served, demand.experts, np.int32(-1))
    weights = np.where(served, demand.weights, np.float32(0))
    lost = _share(demand.weights - weights, demand.weights)
    _fill_empty(experts, weights, demand, available)
    if renormalise:
        weights = _grow(weights, demand.weights.sum(axis=1))
    return Demand(experts, weights, demand.gate), lost


def _fill_empty(experts: Int32Array, weights: Float32Array, demand: Demand, available: BoolArray) -> None:
    """Give tokens that lost every expert the best one that is served, so that none goes without."""
    empty = np.flatnonzero((experts < 0).all(axis=1) & (demand.weights > 0).any(axis=1))
    if not empty.size:
        return
    replacement = substitute(demand, empty, available)
    if replacement is not None:
        experts[empty] = replacement.experts
        weights[empty] = replacement.weights


def _ranks(demand: Demand, temperature: float, rank: str) -> FloatArray:
    """(tokens, top_k) what a policy ranks by, which need not be the weights the gate mixes by."""
    if rank == "probability" and (demand.gate is None or temperature == 1.0):
        return demand.weights.astype(np.float64)
    if demand.gate is None:
        raise BundleError("the model's router does not give its scores, which --rank energy wants: rank by probability")
    return rank_weights(demand.gate, demand.experts, temperature, rank)


def _share(part: Float32Array, whole: Float32Array) -> Float32Array:
    """(tokens,) sum of `part` over sum of `whole`, 0 where the whole is 0."""
    total = np.abs(whole).sum(axis=1)
    share: Float32Array = np.abs(part).sum(axis=1) / np.where(total > 0, total, 1)
    return share


def _grow(weights: Float32Array, total: Float32Array) -> Float32Array:
    """Scale each row to sum to `total`; rows that sum to 0 stay."""
    have = weights.sum(axis=1)
    factor = np.where(have != 0, total / np.where(have != 0, have, 1), 1)
    grown: Float32Array = (weights * factor[:, None]).astype(np.float32)
    return grown
