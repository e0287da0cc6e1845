"""Where experts stand in a simulated network: known before the pass, so made for the channel without its fading."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.errors import ConfigError
from wdmoe.simulation.scenario import DeviceSetup, Variant
from wdmoe.solver.layer.radio_state import RadioState
from wdmoe.solver.placement.exact import place_exactly
from wdmoe.solver.placement.greedy import place_greedily
from wdmoe.solver.placement.problem import PlacementProblem

Holders = npt.NDArray[np.bool_]  # (layers, experts, devices)
_LONGEST_S = 1e9


def holders_of(variant: Variant, devices: DeviceSetup, mean: RadioState, frequency: FloatArray) -> Holders:
    """Who holds which expert.

    Args:
        mean: the channel without fading.
        frequency: (layers, experts) uses by a token.
    Raises:
        ConfigError: the devices have no room for all experts, or for no copy where copies are asked for.
    """
    layers, experts = frequency.shape
    room = np.array(devices.experts)
    if room.sum() < experts:
        raise ConfigError(f"[devices] experts: room for {room.sum()} of a layer's {experts} experts")
    if variant.replicas > 1 and room.sum() == experts:
        raise ConfigError(
            f"[[variant]] {variant.name!r}: replicas does nothing here: [devices] experts has room for {room.sum()} "
            f"experts of a layer, and it has as many"
        )
    if variant.placement == "spread":
        return np.broadcast_to(_spread(experts, room, variant.replicas), (layers, experts, devices.count))
    problem = PlacementProblem(
        frequency=frequency,
        token_s=np.minimum(mean.assignment_s(np.full(mean.devices, float(variant.policy.levers.bits))), _LONGEST_S),
        memory_bytes=room.astype(np.float64) * layers,
        expert_bytes=np.ones(layers),
        replicas=variant.replicas,
    )
    plan = place_greedily(problem) if variant.placement == "greedy" else place_exactly(problem, time_limit_s=10.0)
    return plan.held


def _spread(experts: int, room: npt.NDArray[np.int64], replicas: int) -> npt.NDArray[np.bool_]:
    """(experts, devices): one after the other to the next device with room, then as many copies as there is room."""
    left, held, device = room.copy(), np.zeros((experts, len(room)), bool), 0
    for _ in range(replicas):
        for expert in range(experts):
            free = [(device + step) % len(room) for step in range(len(room))]
            at = next((d for d in free if left[d] > 0 and not held[expert, d]), None)
            if at is None:
                continue
            held[expert, at] = True
            left[at] -= 1
            device = (at + 1) % len(room)
    return held
