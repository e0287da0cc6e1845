"""Types of the native bridge. `wdmoe.solver.reference.native` is its plain NumPy twin: same names, same answers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array, FloatArray, Int32Array, UInt8Array

class DeviceWork:
    """One device's part of a layer, in the order a `Run` message wants it.

    `experts[i]` serves `counts[i]` tokens; `rows` and `weights` hold those, expert after expert, in each
    by ascending token.
    """

    device: int
    token_rows: Int32Array  # (device tokens,) ascending rows of the layer's hidden states, each once
    experts: tuple[int, ...]  # ascending
    counts: tuple[int, ...]
    rows: Int32Array  # (sum(counts),) into token_rows
    weights: Float32Array  # (sum(counts),)

class Groups:
    """Work of all devices that have any, by ascending device."""

    works: tuple[DeviceWork, ...]
    unserved: int  # (token, expert) pairs whose expert no device serves
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[DeviceWork]: ...
    def __getitem__(self, position: int) -> DeviceWork: ...

def group_by_device(experts: Int32Array, weights: Float32Array, device_of: Int32Array) -> Groups:
    """Turn the experts of each token into the work of each device. Time O(tokens k + experts + devices).

    Args:
        experts: (tokens, k) int32 C-contiguous, -1 where dropped.
        weights: (tokens, k) float32 C-contiguous gate weights.
        device_of: (experts,) int32 C-contiguous, the device that serves each expert, -1 where none does.
    Raises:
        ValueError: shapes or types differ from the above, or an index is out of range.
    """

def combine_partials(
    out: Float32Array,
    partial: npt.NDArray[np.floating],
    rows: Int32Array,
    weights: Float32Array | None = None,
) -> None:
    """`out[rows[i]] += weights[i] * partial[i]` for i = 0, 1, ... in that order; without weights they are 1.

    Args:
        out: (tokens, hidden) float32 C-contiguous, changed in place.
        partial: (n, hidden), converted to float32.
        rows: (n,) int32 into out; may repeat.
        weights: (n,) or None.
    Raises:
        ValueError: shapes do not fit, a row is out of range, or partial shares memory with out; out is unchanged then.
    """

def combine(
    tokens: int,
    hidden: int,
    replies: Iterable[tuple[npt.NDArray[np.floating], Int32Array]],
    scale: npt.ArrayLike | None = None,
) -> Float32Array:
    """Sum the replies of several devices. Sums of floats depend on order: give replies by ascending device.

    Args:
        replies: (partial (n, hidden), rows (n,) int32) of each device, added in the order given.
        scale: (tokens,) factors for the sum, or None.
    Returns:
        (tokens, hidden) float32; 0 where no reply has the token.
    Raises:
        ValueError: shapes do not fit or a row is out of range; names the reply.
    """

def weighted_sum(outputs: Sequence[Float32Array], weights: Float32Array) -> Float32Array:
    """The sum over one token's outputs, added up in their order.

    Args:
        outputs: n >= 1 arrays of (1, hidden) float32, C-contiguous.
        weights: (n,) float32 C-contiguous.
    Returns:
        (1, hidden), of memory of its own.
    Raises:
        ValueError: an array is something else.
    """

def is_finite(values: npt.NDArray[np.floating]) -> bool:
    """Whether no value is NaN or infinite, as float32 (a float64 beyond its range is not finite)."""

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
    """The first row of a device's answer whose norm no honest device would give; one pass, some 1 us for one token.

    Row t is the sum over its pairs of weight times an expert's output, whose norm lies within [low, high] of that
    expert. So the sum's is at most that of all |weight| * high, and at least `least_share` of what it would be if the
    outputs were orthogonal and as small as they get.

    Args:
        partial: (tokens, hidden), converted to float32.
        experts: of the pairs; `counts[i]` pairs are of `experts[i]`.
        rows: (pairs,) int32 into partial.
        weights: (pairs,)
        low: (experts of the layer,) float64, high alike.
    Returns:
        Kind (0 none, 1 a value is not finite, 2 too small, 3 too large) and the row. A value that is not finite comes
        first, in whatever row it stands.
    Raises:
        ValueError: shapes do not fit or an index is out of range.
    """

def first_bad(values: FloatArray, positive: bool) -> int:
    """Flat index of the first value outside [0, 1e100] ([1e-100, 1e100] if positive), or -1."""

def top_k(gate: FloatArray, k: int, available: UInt8Array | None, normalise: bool) -> tuple[Int32Array, FloatArray]:
    """The k largest weights of each row, largest first, ties to the lower expert. Time O(tokens experts).

    Args:
        gate: (tokens, experts) float64 C-contiguous, 0 to 1e100.
        available: (experts,), 0 excludes an expert; None: all.
        normalise: each token's weights are divided by their sum.
    Returns:
        experts (tokens, k) and weights (tokens, k); -1 and 0 where fewer than k are available.
    Raises:
        ValueError: a shape or value is not as above.
    """

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
    """Drop experts in place: those not available, then by Algorithm 1 if `cosine`. See `solver.selection`.

    Args:
        experts: (tokens, k) int32, -1 where there is none; changed in place.
        weights: (tokens, k) float64; changed in place.
        latency_s: (1 or tokens, experts) float64, positive and checked by the caller.
    Returns:
        Dropped share of weight (tokens,), mean WLR of what is kept, last theta (0 without `cosine`).
    Raises:
        ValueError: a shape, index or weight is not as above.
    """

class Allocation:
    """Bandwidth of each device, with the proof of how good it is. See `wdmoe.solver.bandwidth`.

    The arrays are views of one array, which answers of `allocate_many` share.
    """

    @property
    def bandwidth_hz(self) -> FloatArray:
        """(devices,)."""

    @property
    def block_latency_s(self) -> FloatArray:
        """(blocks,)."""

    @property
    def weight(self) -> FloatArray:
        """(blocks, devices) >= 0, 1 in sum where a block has load: how far it waits for each device."""
    latency_s: float  # sum of block_latency_s
    lower_bound_s: float  # no allocation is faster; proven by weight and price, rounding included
    price_s_per_hz: float  # what one more hertz would save
    status: str  # "optimal", "infeasible", "iteration_limit"
    iterations: int

def regular(name: str, given: npt.ArrayLike | None) -> npt.NDArray[Any]:
    """`given` as an array of whatever it holds; the array itself where it is one.

    Raises:
        ValueError: its rows have different lengths, or it is a masked array; names the argument.
    """

def floats(name: str, given: npt.ArrayLike | None) -> FloatArray:
    """`given` as float64 and C-contiguous; the array itself where it is that already.

    Raises:
        ValueError: it is not real numbers in a regular array, or it is a masked array; names the argument.
    """

def allocate(
    load: npt.ArrayLike,
    links: FloatArray,
    flat: bool,
    total_hz: float,
    fixed_s: FloatArray | None = None,
    floor_hz: FloatArray | None = None,
    cap_hz: FloatArray | None = None,
    start_hz: FloatArray | None = None,
    start_weight: FloatArray | None = None,
    tolerance: float = 1e-8,
    limit: int = 150,
) -> Allocation:
    """As `wdmoe.solver.bandwidth.allocate_bandwidth`, which checks the values of links, fixed seconds, floors and caps.

    Args:
        load: (blocks, devices) or (devices,), converted to float64.
        links: (5, devices) bits down, bits up, SNR (or efficiency) down, up, compute seconds per token.
        flat: whether links holds efficiencies.
    Raises:
        ValueError: a shape, a load, total_hz, tolerance or limit is not as there; names the argument.
    """

def allocate_many(
    load: FloatArray,
    links: FloatArray,
    flat: bool,
    total_hz: float,
    fixed_s: FloatArray | None = None,
    floor_hz: FloatArray | None = None,
    cap_hz: FloatArray | None = None,
    warm: bool = False,
    tolerance: float = 1e-8,
    limit: int = 150,
) -> list[Allocation]:
    """`allocate` for each draw, the GIL released once for all of them.

    Args:
        load: (1 or draws, blocks, devices) float64 C-contiguous.
        links: (draws, 5, devices) as `allocate`.
        warm: each draw begins near the answer of the one before it, unless that was infeasible.
    Raises:
        ValueError: as `allocate`.
    """

def resolve(
    experts: Int32Array, weights: FloatArray, device_of: Int32Array, by_expert: bool, devices: int
) -> tuple[Int32Array, FloatArray]:
    """Who serves each assignment and what it weighs, both (tokens, top_k): -1 and 0 where there is none.

    Args:
        experts: (tokens, top_k) int32 C-contiguous, -1 where there is none.
        weights: (tokens, top_k) float64 C-contiguous.
        device_of: (1, experts) if `by_expert`, else (tokens, top_k), int32 C-contiguous; -1: nobody serves it.
    Raises:
        ValueError: a shape, weight or index is not as above.
    """

def keep_marked(
    experts: Int32Array, weights: FloatArray, kept: UInt8Array, renormalise: bool
) -> tuple[FloatArray, float]:
    """Drop in place what is not kept, all (tokens, top_k).

    Returns:
        Dropped share of weight (tokens,), and the weight that is kept, before any renormalising.
    """

def needed_hz(links: FloatArray, flat: bool, token_s: FloatArray) -> FloatArray:
    """As `wdmoe.solver.required_bandwidth.needed_hz`, with links (5, devices) as for `allocate`."""

def shed_bottleneck(device: Int32Array, weights: FloatArray, token_s: FloatArray, light: float) -> UInt8Array:
    """What to keep (tokens, top_k); arguments as `resolve` gives them, the rest as `wdmoe.solver.bottleneck`."""

def choose_within_budget(
    device: Int32Array, weights: FloatArray, links: FloatArray, flat: bool, total_hz: float, budget_s: float
) -> tuple[UInt8Array, float, bool]:
    """What to keep (tokens, top_k), upper bound of its weight (0 where nothing fits), whether it fits.

    Time O(assignments + devices log^2 assignments) unless most weights are alike. `device`, `weights`: from `resolve`.
    """

def choose_least_budget(
    device: Int32Array,
    weights: FloatArray,
    links: FloatArray,
    flat: bool,
    total_hz: float,
    goal: float,
    most_s: float,
) -> tuple[UInt8Array, float, float]:
    """What to keep (tokens, top_k) within the least budget that keeps `goal`, upper bound of the weight within it,
    and the budget below which no choice keeps `goal`. Within `most_s` everything must fit.
    """

def choose_copies(
    experts: Int32Array, holders: UInt8Array, token_s: FloatArray, busy_s: FloatArray | None = None
) -> Int32Array:
    """As `wdmoe.solver.replicas.choose_copies`, which checks what is not checked here: all but shapes and experts.

    Time O(assignments top_k + moves experts devices), where moves are what the greedy start is off.
    """

def replace_far(
    experts: Int32Array,
    weights: FloatArray,
    similarity: FloatArray,
    seconds: FloatArray,
    least_similarity: float,
    times_faster: float,
    most_share: float,
) -> None:
    """In place, as `wdmoe.solver.substitution.replace_far`, which checks all but shapes."""
