"""Which device holds which expert so that a layer is expected to be done soonest: the question and its answer.

The measure [D]: a token asks for expert e of layer l with frequency f[l, e]; device d takes s[d] seconds for one token
through one expert, link and computing together; experts on several devices split their tokens by shares y. A plan's

    latency = sum over layers l of max over devices d of  s[d] * sum over experts e of f[l, e] * y[l, e, d]

is the time a token of a long batch is expected to take through the experts of all layers, since devices work side by
side and the next layer waits for the last. For few tokens at a time it is a lower bound of the expectation (Jensen:
the mean of a maximum is at least the maximum of the means).
Each copy of an expert takes its memory.

`place_experts` of `live` answers another question, the live base station's: it moves little when devices come
and go, and asks for an even share rather than for a model of time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import BoolArray, FloatArray
from wdmoe.solver import _native

Progress = Callable[[str, float], None]
ROUNDING = 1e-9  # relative: by which a bound may be off

# "optimal": within the gap asked for. "feasible": a plan, perhaps not the best. "infeasible": proved that none
# exists. "not_found": none was found, though one may exist.
Status = Literal["optimal", "feasible", "infeasible", "not_found"]


@dataclass(frozen=True, slots=True, eq=False)
class PlacementProblem:
    """What there is to place, and where.

    Args:
        frequency: (layers, experts) expected uses by a token, >= 0, as of `GateTrace.activation_frequency`.
        token_s: (devices,) seconds of one token through one expert, > 0.
        memory_bytes: (devices,) >= 0.
        expert_bytes: (layers,) > 0 size of each expert in memory, or one number for all.
        replicas: copies of an expert at most, >= 1.
    Raises:
        ValueError: a shape or value is not as above; the message names the argument.
    """

    frequency: FloatArray
    token_s: FloatArray
    memory_bytes: FloatArray
    expert_bytes: FloatArray
    replicas: int = 1

    def __post_init__(self) -> None:
        put = object.__setattr__
        frequency = _numbers("frequency", self.frequency, 2)
        token_s = _numbers("token_s", self.token_s, 1)
        memory = _numbers("memory_bytes", self.memory_bytes, 1)
        layers, devices = len(frequency), len(token_s)
        size = _native.floats("expert_bytes", self.expert_bytes)
        size = _numbers("expert_bytes", np.full(layers, size) if size.ndim == 0 else size, 1)
        if not frequency.size or not devices:
            raise ValueError(f"need experts and devices, got frequency {frequency.shape} and token_s {token_s.shape}")
        if memory.shape != (devices,) or size.shape != (layers,):
            raise ValueError(f"memory_bytes and expert_bytes must be ({devices},) and ({layers},)")
        if (token_s <= 0).any() or (size <= 0).any():
            raise ValueError("token_s and expert_bytes must be positive")
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or self.replicas < 1:
            raise ValueError(f"replicas must be a whole number from 1, got {self.replicas!r}")
        for name, value in (("frequency", frequency), ("token_s", token_s), ("memory_bytes", memory)):
            put(self, name, value)
        put(self, "expert_bytes", size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, experts, devices)."""
        layers, experts = self.frequency.shape
        return layers, experts, len(self.token_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """Where experts stand. `share` (layers, experts, devices) sums to 1 over devices for each expert that is placed and
    is 0 where `held` (same shape) is false; both are all 0 where no plan was found, and `latency_s` infinite."""

    status: Status
    held: BoolArray
    share: FloatArray
    latency_s: float
    lower_bound_s: float  # no plan within memory is faster

    @property
    def gap(self) -> float:
        """By which part of itself `latency_s` may exceed the least there is; 1 where there is no plan."""
        if not np.isfinite(self.latency_s):
            return 1.0
        return max(0.0, 1 - self.lower_bound_s / self.latency_s) if self.latency_s > 0 else 0.0


def device_loads(problem: PlacementProblem, share: FloatArray) -> FloatArray:
    """(layers, devices) expected uses by a token."""
    return np.asarray(np.einsum("le,led->ld", problem.frequency, share))


def latency_s(problem: PlacementProblem, share: FloatArray) -> float:
    """The measure above."""
    return float((device_loads(problem, share) * problem.token_s).max(axis=1).sum())


def layer_bounds_s(problem: PlacementProblem) -> FloatArray:
    """(layers,) seconds below which no plan gets, memory left out of account.

    The k most used experts stand on k * replicas devices at most, so they take at least as long as their whole load
    on that many of the fastest devices together.
    """
    _, experts, devices = problem.shape
    load = np.cumsum(-np.sort(-problem.frequency, axis=1), axis=1)
    pace = np.cumsum(np.sort(1 / problem.token_s)[::-1])
    reach = np.minimum(np.arange(1, experts + 1) * problem.replicas, devices)
    return np.asarray((load / pace[reach - 1]).max(axis=1))


def judged_plan(problem: PlacementProblem, share: FloatArray, bound_s: float, gap: float = 0.0) -> Plan:
    """The plan of these shares. Its status comes from its own time and the bound, whoever found it.

    Args:
        bound_s: seconds that no plan beats.
        gap: relative, below 1; a plan within it counts as optimal.
    """
    seconds = latency_s(problem, share)
    sure = np.isfinite(seconds) and seconds * (1 - gap) <= bound_s * (1 + ROUNDING)
    return Plan(
        status="optimal" if sure else "feasible",
        held=share > 0,
        share=share,
        latency_s=seconds,
        lower_bound_s=min(bound_s, seconds),
    )


def no_plan(problem: PlacementProblem, status: Status) -> Plan:
    """That none was found."""
    nothing = np.zeros(problem.shape)
    bound = np.inf if status == "infeasible" else float(layer_bounds_s(problem).sum())
    return Plan(status=status, held=nothing.astype(bool), share=nothing, latency_s=np.inf, lower_bound_s=bound)


def _numbers(name: str, values: npt.ArrayLike, dimensions: int) -> FloatArray:
    array = np.array(_native.floats(name, values))
    if array.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got shape {array.shape}")
    if _native.first_bad(array.reshape(1, -1), positive=False) >= 0:
        raise ValueError(f"{name} must be finite and not negative (at most 1e100)")
    return array
