"""One pass of some tokens through all layers, decided as the live node decides, with time computed instead of spent."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.config import RANKS
from wdmoe.results.gate_trace import GateTrace
from wdmoe.simulation.channel_draw import Draw
from wdmoe.simulation.placement import Holders
from wdmoe.simulation.scenario import Scenario, Variant
from wdmoe.solver.layer.plan import carried_out, plan_layer
from wdmoe.solver.ranking import rank_weights


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """A trace as the planner wants it."""

    experts: npt.NDArray[np.int32]  # (layers, tokens, top_k)
    weights: dict[str, FloatArray]  # by what policies rank by: (layers, tokens, top_k) of these
    frequency: FloatArray  # (layers, experts)
    similarity: FloatArray | None  # (layers, experts, experts)

    @staticmethod
    def of(trace: GateTrace) -> Replay:
        """The choices, with what policies rank by."""
        experts = trace.experts.astype(np.int32)
        weights = {rank: rank_weights(trace.gate, experts, trace.temperature, rank) for rank in RANKS}
        alike = None if trace.expert_similarity is None else trace.expert_similarity.astype(np.float64)
        return Replay(experts, weights, trace.activation_frequency(), alike)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One variant on one draw: means over its passes."""

    latency_s: float  # of a pass through all layers; infinite where a device cannot be reached
    dropped_weight: float  # share of what the policy ranks by
    replaced_weight: float
    experts_per_token: float  # computed, mean over layers
    link_bits: float  # on the air in both directions, of a pass
    multicast_share: float  # of the layers that used it, or the analog downlink


# Some 30 years. A Gaussian code gets something through any channel, so in words such a device cannot be reached.
UNREACHED_S = 1e9
OUTCOMES = tuple(field.name for field in fields(Outcome))


def outcome(scenario: Scenario, variant: Variant, draw: Draw, replay: Replay, held: Holders) -> Outcome:
    """Run one variant on one draw, experts being held by `held`."""
    passes = [_one_pass(scenario, variant, draw, replay, held, number) for number in range(scenario.model.passes)]
    means = {name: float(np.mean([each[name] for each in passes])) for name in OUTCOMES}
    if means["latency_s"] > UNREACHED_S:
        means["latency_s"] = np.inf
    return Outcome(**means)


def _one_pass(
    scenario: Scenario, variant: Variant, draw: Draw, replay: Replay, held: Holders, number: int
) -> dict[str, float]:
    layers, length = replay.experts.shape[:2]
    tokens = (draw.starts[number] + np.arange(scenario.model.tokens)) % length  # round the end of the trace
    latency_s, bits = layers * scenario.model.station_s, 0.0
    dropped = replaced = computed = cast = 0.0
    for layer in range(layers):
        alike = None if replay.similarity is None else replay.similarity[layer]
        experts, weights = replay.experts[layer, tokens], replay.weights[variant.rank][layer, tokens]
        known, air = draw.airs[number][variant.measured(layer)], draw.airs[number][layer]
        plan = plan_layer(experts, weights, held[layer], known, variant.policy_of(layer), alike)
        plan = carried_out(plan, known, air, variant.policy.levers)
        latency_s += plan.time.latency_s
        dropped += plan.dropped_weight / layers
        replaced += plan.replaced_weight / layers
        computed += float((plan.experts >= 0).sum()) / layers / len(tokens)
        cast += (plan.time.multicast_s > 0) / layers
        bits += scenario.model.hidden * (plan.time.down_bits + plan.time.up_bits)
    return {
        "latency_s": latency_s,
        "dropped_weight": dropped,
        "replaced_weight": replaced,
        "experts_per_token": computed,
        "link_bits": bits,
        "multicast_share": cast,
    }
