"""The plain NumPy twin of `_native`: same names, arguments, answers and errors. It is the oracle of the
tests.

It does the same operations in the same order as the C++ code, so results are equal to the bit, not just
close. Sums over tokens go one after the other (`cumsum`), because NumPy's own `sum` adds in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import BoolArray, Float32Array, FloatArray, Int32Array, UInt8Array

LARGEST = 1e100
SMALLEST_POSITIVE = 1e-100
MOST_DEVICES = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWork:
    """See `_native.pyi`."""

    device: int
    token_rows: Int32Array
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    rows: Int32Array
    weights: Float32Array


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """See `_native.pyi`."""

    works: tuple[DeviceWork, ...] = ()
    unserved: int = 0

    def __len__(self) -> int:
        return len(self.works)

    def __iter__(self) -> Iterator[DeviceWork]:
        return iter(self.works)

    def __getitem__(self, position: int) -> DeviceWork:
        return self.works[position]


def group_by_device(experts: Int32Array, weights: Float32Array, device_of: Int32Array) -> Groups:
    """See `_native.pyi`."""
    if weights.shape != experts.shape:
        raise ValueError(f"weights must have the shape of experts {experts.shape}, got {weights.shape}")
    if experts.size == 0:
        return Groups()
    if np.any((device_of < -1) | (device_of >= MOST_DEVICES)):
        raise ValueError(f"device_of must be -1 (not served) to {MOST_DEVICES - 1}")
    if np.any((experts < -1) | (experts >= len(device_of))):
        raise ValueError(f"experts must be -1 (dropped) to {len(device_of) - 1}")
    token, slot = np.nonzero(experts >= 0)
    expert = experts[token, slot]
    device = device_of[expert] if len(expert) else expert
    served = device >= 0
    works = tuple(
        _device_work(int(d), token[device == d], expert[device == d], weights[token, slot][device == d])
        for d in np.unique(device[served])
    )
    return Groups(works, int(np.sum(~served)))


def _device_work(device: int, token: npt.NDArray[np.intp], expert: Int32Array, weights: Float32Array) -> DeviceWork:
    by_expert = np.argsort(expert, kind="stable")  # tokens ascend already
    token_rows, rows = np.unique(token, return_inverse=True)
    experts, counts = np.unique(expert, return_counts=True)
    return DeviceWork(
        device,
        token_rows.astype(np.int32),
        tuple(experts.tolist()),
        tuple(counts.tolist()),
        rows[by_expert].astype(np.int32),
        weights[by_expert],
    )


def combine_partials(
    out: Float32Array,
    partial: npt.NDArray[np.floating],
    rows: Int32Array,
    weights: Float32Array | None = None,
) -> None:
    """See `_native.pyi`."""
    values = np.asarray(partial, np.float32)
    if values.ndim != 2 or values.shape[1] != out.shape[1]:
        raise ValueError(f"partial must be (n, {out.shape[1]}), got {values.shape}")
    if len(rows) != len(values) or (weights is not None and len(weights) != len(values)):
        raise ValueError(f"rows and weights must have one entry for each of the {len(values)} partial rows")
    if np.any((rows < 0) | (rows >= len(out))):
        raise ValueError(f"rows must be 0 to {len(out) - 1}")
    if np.may_share_memory(out, values):
        raise ValueError("partial must not share memory with out")
    if weights is not None:
        values = values * np.asarray(weights, np.float32)[:, None]
    np.add.at(out, rows, values)


def combine(
    tokens: int,
    hidden: int,
    replies: Iterable[tuple[npt.NDArray[np.floating], Int32Array]],
    scale: npt.ArrayLike | None = None,
) -> Float32Array:
    """See `_native.pyi`."""
    out = np.zeros((tokens, hidden), np.float32)
    for partial, rows in replies:
        combine_partials(out, partial, rows)
    if scale is not None:
        factors = np.asarray(scale, np.float32)
        if factors.shape != (tokens,):
            raise ValueError(f"scale must have shape ({tokens},), got {factors.shape}")
        out *= factors[:, None]
    return out


def weighted_sum(outputs: Sequence[Float32Array], weights: Float32Array) -> Float32Array:
    """See `_native.pyi`."""
    if weights.shape != (len(outputs),) or not outputs or len({output.shape for output in outputs}) > 1:
        raise ValueError("outputs must be alike, with as many weights")
    if outputs[0].ndim != 2 or len(outputs[0]) != 1 or not outputs[0].size:
        raise ValueError("outputs must be (1, hidden)")
    total = np.zeros(outputs[0].shape, np.float32)
    for output, weight in zip(outputs, weights, strict=True):
        total += weight * output
    return total


def is_finite(values: npt.NDArray[np.floating]) -> bool:
    """See `_native.pyi`."""
    return bool(np.isfinite(np.asarray(values, np.float32)).all())


def odd_row(
    partial: npt.NDArray[np.floating],
    experts: Iterable[int],
    counts: Iterable[int],
    rows: Int32Array,
    weights: Float32Array,
    low: FloatArray,
    high: FloatArray,
    least_share: float,
) -> tuple[int, int]:
    """See `_native.pyi`."""
    values = np.asarray(partial, np.float32).astype(np.float64)
    ids, numbers = np.array([*experts], np.int64), np.array([*counts], np.int64)
    if len(rows) != len(weights) or len(ids) != len(numbers) or len(low) != len(high):
        raise ValueError("rows and weights must be alike, and experts and counts, and low and high")
    if np.any((ids < 0) | (ids >= len(low))) or np.any(numbers < 0) or numbers.sum() != len(rows):
        raise ValueError("an expert is out of range, or counts do not add up")
    if np.any((rows < 0) | (rows >= len(values))):
        raise ValueError(f"rows must be 0 to {len(values) - 1}")
    of_pair, size = np.repeat(ids, numbers), np.abs(np.asarray(weights, np.float32).astype(np.float64))
    most, least = np.zeros(len(values)), np.zeros(len(values))
    np.add.at(most, rows, size * high[of_pair])
    np.add.at(least, rows, (size * low[of_pair]) * (size * low[of_pair]))
    squares = _sums_of_squares(values)
    if not np.isfinite(squares).all():
        return 1, int(np.flatnonzero(~np.isfinite(squares))[0])
    norms = np.sqrt(squares)
    large, small = norms > most, norms < least_share * np.sqrt(least)
    if not (large | small).any():
        return 0, 0
    first = int(np.flatnonzero(large | small)[0])
    return 3 if large[first] else 2, first


def _sums_of_squares(values: FloatArray) -> FloatArray:
    """(rows,) in eight lanes, as the C++ code adds."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % 8)))
    with np.errstate(invalid="ignore"):
        lanes = (padded * padded).reshape(len(values), padded.shape[1] // 8, 8)
        total = np.cumsum(lanes, axis=1)[:, -1] if lanes.shape[1] else np.zeros((len(values), 8))
        return np.asarray(np.cumsum(total, axis=1)[:, -1])


def first_bad(values: FloatArray, positive: bool) -> int:
    """See `_native.pyi`."""
    low = SMALLEST_POSITIVE if positive else 0.0
    bad = np.flatnonzero(~((values >= low) & (values <= LARGEST)))
    return int(bad[0]) if len(bad) else -1


def top_k(gate: FloatArray, k: int, available: UInt8Array | None, normalise: bool) -> tuple[Int32Array, FloatArray]:
    """See `_native.pyi`."""
    if not 1 <= k <= gate.shape[1]:
        raise ValueError(f"top_k must be 1 to {gate.shape[1]} (the number of experts), got {k}")
    if available is not None and available.shape != (gate.shape[1],):
        raise ValueError(f"available must be ({gate.shape[1]},), got {available.shape}")
    if first_bad(gate, positive=False) >= 0:
        raise ValueError("gate must be finite and not negative")
    ranked = gate if available is None else np.where(available > 0, gate, -1.0)
    experts = np.argsort(-ranked, axis=1, kind="stable")[:, :k].astype(np.int32)
    weights = np.take_along_axis(ranked, experts.astype(np.intp), axis=1)
    experts[weights < 0] = -1
    weights[weights < 0] = 0.0
    if normalise:
        total = _row_sums(weights)
        weights[total > 0] /= total[total > 0, None]
    return experts, weights


def prune(
    experts: Int32Array,
    weights: FloatArray,
    latency_s: FloatArray,
    available: UInt8Array | None,
    cosine: bool,
    renormalise: bool,
    wlr_sum: bool,
    theta: float,
    theta_step: float,
    gamma: float,
) -> tuple[FloatArray, float, float]:
    """See `_native.pyi`."""
    _check_assignment(experts, weights, latency_s, available)
    if experts.size == 0 or latency_s.shape[1] == 0:
        return np.zeros(len(experts)), 0.0, 0.0
    weights[experts < 0] = 0.0
    share = np.ones(len(experts))
    if available is not None:
        missing = (experts >= 0) & (available[np.maximum(experts, 0)] == 0)
        share = _drop(experts, weights, missing, renormalise)
    latency = np.take_along_axis(
        np.broadcast_to(latency_s, (len(experts), latency_s.shape[1])),
        np.maximum(experts, 0).astype(np.intp),
        axis=1,
    )
    if not cosine:
        return 1.0 - share, _mean(_wlr(experts, weights, latency, wlr_sum)), 0.0
    similar = _cosine(experts, weights, latency)
    trial = experts.copy(), weights.copy()
    kept = _drop(*trial, _lightest(*trial) & (similar <= 1.0)[:, None], renormalise)
    before, after = _wlr(experts, weights, latency, wlr_sum), _wlr(*trial, latency, wlr_sum)
    last_theta, ratio = _raise_theta(
        lambda limit: _mean(np.where(similar <= limit, after, before)),
        _mean(before),
        theta,
        theta_step,
        gamma,
    )
    chosen = similar <= last_theta
    experts[chosen], weights[chosen] = trial[0][chosen], trial[1][chosen]
    return 1.0 - share * np.where(chosen, kept, 1.0), ratio, last_theta


def _check_assignment(
    experts: Int32Array, weights: FloatArray, latency_s: FloatArray, available: UInt8Array | None
) -> None:
    n_experts = latency_s.shape[1]
    if weights.shape != experts.shape:
        raise ValueError(f"weights must have the shape of experts {experts.shape}, got {weights.shape}")
    if latency_s.shape[0] not in (1, len(experts)):
        raise ValueError(f"latency_s must have 1 or {len(experts)} rows, got {latency_s.shape[0]}")
    if available is not None and available.shape != (n_experts,):
        raise ValueError(f"available must be ({n_experts},), got {available.shape}")
    if np.any((experts < -1) | (experts >= n_experts)):
        raise ValueError(f"experts must be -1 (dropped) to {n_experts - 1}")
    if first_bad(weights, positive=False) >= 0:
        raise ValueError("weights must be finite and not negative")


def _raise_theta(
    wlr_at: Callable[[float], float], start: float, theta: float, theta_step: float, gamma: float
) -> tuple[float, float]:
    """Algorithm 1's loop [S]: the threshold it ends with, and the mean WLR there."""
    limit, now, step = theta, wlr_at(theta), 1
    while limit < 1.0 and not now > gamma * start:
        limit = min(theta + step * theta_step, 1.0)
        now, step = wlr_at(limit), step + 1
    return limit, now


def _row_sums(values: FloatArray) -> FloatArray:
    """Row sums, added from left to right."""
    return values.cumsum(axis=1)[:, -1]


def _mean(values: FloatArray) -> float:
    return float(values.cumsum()[-1] / len(values)) if len(values) else 0.0


def _drop(experts: Int32Array, weights: FloatArray, marked: BoolArray, renormalise: bool) -> FloatArray:
    """Drop the marked experts in place; (tokens,) share of weight that stays."""
    before = _row_sums(weights)
    changed = marked.any(axis=1) & (before > 0)
    experts[marked] = -1
    weights[marked] = 0.0
    after = _row_sums(weights)
    if renormalise:
        grow = changed & (after > 0)
        weights[grow] = weights[grow] / after[grow, None] * before[grow, None]
    share = np.ones(len(experts))
    share[changed] = after[changed] / before[changed]
    return share


def _wlr(experts: Int32Array, weights: FloatArray, latency: FloatArray, as_sum: bool) -> FloatArray:
    ratio = _row_sums(weights / latency)
    kept = (experts >= 0).sum(axis=1)
    return ratio if as_sum else ratio / np.maximum(kept, 1)


def _cosine(experts: Int32Array, weights: FloatArray, latency: FloatArray) -> FloatArray:
    """(tokens,) at most 1; 2 where it says nothing."""
    kept = experts >= 0
    times = np.where(kept, latency, 0.0)
    length = np.sqrt(_row_sums(weights * weights)) * np.sqrt(_row_sums(times * times))
    known = (kept.sum(axis=1) >= 2) & (_row_sums(weights * weights) > 0)
    cosine = np.full(len(experts), 2.0)
    cosine[known] = np.minimum(_row_sums(weights * times)[known] / length[known], 1.0)
    return cosine


def _lightest(experts: Int32Array, weights: FloatArray) -> BoolArray:
    """(tokens, k) true at the lightest kept expert, the later one of equals."""
    heft = np.where(experts >= 0, weights, np.inf)
    last = heft.shape[1] - 1 - np.argmin(heft[:, ::-1], axis=1)
    marked = np.zeros(heft.shape, np.bool_)
    marked[np.arange(len(heft)), last] = experts.max(axis=1) >= 0
    return marked
