"""How many hertz each device gets: least total latency over blocks that share one allocation.

    minimise  sum over blocks i of  max over devices k of  load[i, k] t_k(band_k) + fixed_s[i, k]
    subject to  sum of band_k <= total_hz,  floor_hz <= band_k <= cap_hz

`t_k` is what one token costs on a link: down, up and compute. Convex, so there is one least value, and every
answer carries a lower bound on it. Mathematics and complexity: docs/solver.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.solver import _native
from wdmoe.solver._native import Allocation

__all__ = ["Allocation", "Links", "allocate_bandwidth", "allocate_bandwidth_many", "seconds_per_token"]


# Between these no quotient inside overflows.
LARGEST = 1e30
SMALLEST = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Links:
    """What one token costs on the link of each device. Numbers stand for all devices; arrays are copied.

    By default power is fixed, so a narrower band has a better signal-to-noise ratio:
    `rate = band log2(1 + snr_hz / band)`. With `downlink_efficiency` and `uplink_efficiency` instead (fixed
    power density, or a modulation and coding scheme) `rate = band efficiency`. 0 means that nothing gets
    through. The band of a device serves both directions, one after the other.

    Args:
        downlink_snr_hz, uplink_snr_hz: (devices,) received power over noise density, hertz, >= 0.
        downlink_efficiency, uplink_efficiency: (devices,) bit/s/Hz, >= 0; both, instead of the two above.
        downlink_bits, uplink_bits: (devices,) bits per token, >= 0.
        compute_s: (devices,) seconds per token on the device, >= 0.

    All may be (draws, devices) for `allocate_bandwidth_many`.

    Raises:
        ValueError: a shape differs, or a value is neither 0 nor within 1e-30 to 1e30.
    """

    downlink_snr_hz: npt.ArrayLike | None = None
    uplink_snr_hz: npt.ArrayLike | None = None
    downlink_bits: npt.ArrayLike
    uplink_bits: npt.ArrayLike
    compute_s: npt.ArrayLike = 0.0
    downlink_efficiency: npt.ArrayLike | None = None
    uplink_efficiency: npt.ArrayLike | None = None
    table: FloatArray = field(init=False, repr=False)  # (..., 5, devices): bits, then SNR or efficiency, compute
    flat: bool = field(init=False, repr=False)  # whether the rate is proportional to the band

    def __post_init__(self) -> None:
        pairs = {
            "snr_hz": (self.downlink_snr_hz, self.uplink_snr_hz),
            "efficiency": (self.downlink_efficiency, self.uplink_efficiency),
        }
        given = [kind for kind, (down, up) in pairs.items() if down is not None or up is not None]
        if len(given) != 1 or any(value is None for value in pairs[given[0]]):
            raise ValueError(
                "links need downlink_snr_hz and uplink_snr_hz, or downlink_efficiency and uplink_efficiency"
            )
        down, up = pairs[given[0]]
        rows = {
            "downlink_bits": self.downlink_bits,
            "uplink_bits": self.uplink_bits,
            f"downlink_{given[0]}": down,
            f"uplink_{given[0]}": up,
            "compute_s": self.compute_s,
        }
        arrays = {name: _checked(name, value) for name, value in rows.items()}
        try:
            full = np.broadcast_arrays(*arrays.values())
        except ValueError:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise ValueError(f"links need one shape, got {shapes}") from None
        if full[0].ndim not in (1, 2) or full[0].shape[-1] == 0:
            raise ValueError(f"links must be (devices,) or (draws, devices), got shape {full[0].shape}")
        table = np.ascontiguousarray(np.stack(full, axis=-2))
        table.flags.writeable = False
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "flat", given == ["efficiency"])


_LINK_FIELDS = tuple(each.name for each in fields(Links))


def with_compute(links: Links, compute_s: FloatArray) -> Links:
    """The same links, another compute time: for who decides anew every millisecond, where the checks of Links count.

    Args:
        compute_s: (devices,) float64, or (draws, devices) as the links are.
    Raises:
        ValueError: another shape, or a value that is not within 0 to 1e30.
    """
    table = links.table.copy()
    if compute_s.shape != table[..., 4, :].shape:
        raise ValueError(f"compute_s must have shape {table[..., 4, :].shape}, got {compute_s.shape}")
    if not 0 <= compute_s.min() <= compute_s.max() <= LARGEST:  # also refuses NaN
        raise ValueError(f"compute_s must be within 0 to {LARGEST:g}")
    table[..., 4, :] = compute_s
    table.flags.writeable = False
    other = object.__new__(Links)
    for name in _LINK_FIELDS:
        object.__setattr__(other, name, getattr(links, name))
    object.__setattr__(other, "compute_s", compute_s)
    object.__setattr__(other, "table", table)
    return other


def one_draw(links: Links) -> FloatArray:
    """The table of the links, (5, devices). Raises ValueError where they have many draws."""
    if links.table.ndim != 2:
        raise ValueError(f"links must be (devices,), got shape {links.table[..., 0, :].shape}")
    return links.table


def allocate_bandwidth(
    load: npt.ArrayLike,
    links: Links,
    total_hz: float,
    *,
    fixed_s: npt.ArrayLike | None = None,
    floor_hz: npt.ArrayLike | None = None,
    cap_hz: npt.ArrayLike | None = None,
    start: Allocation | None = None,
    tolerance: float = 1e-8,
    iterations: int = 150,
) -> Allocation:
    """Bandwidth of each device for least total latency. One block is exact; many end at a relative gap of `tolerance`.

    Args:
        load: (blocks, devices) or (devices,) tokens, finite, >= 0.
        links: what a token costs, (devices,).
        total_hz: what there is to share, > 0.
        fixed_s: shape of load, seconds that a device takes wherever it has load, >= 0. None: 0.
        floor_hz, cap_hz: (devices,) or one number, each 0 or at least 1e-30; floor <= cap, a cap may be infinite.
            None: 0 and no cap.
        start: an earlier answer for the same shape, near which the search begins.
        tolerance: 1e-11 to 1: (latency - lower bound) / latency at which the answer counts as optimal.
        iterations: Newton steps at most, >= 1.
    Returns:
        An `Allocation`. Its status is "optimal", "infeasible" (floors above the total, or load on a device
        that nothing gets through to; times are infinite then) or "iteration_limit" (the best found, with its bound).
        Devices without load get their floor; band that would help nobody is not given out.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    if fixed_s is None and floor_hz is None and cap_hz is None and start is None:
        # what is checked below and what is checked there is the same; one block of 8 devices takes less than the checks
        return _native.allocate(load, links.table, links.flat, total_hz, tolerance=tolerance, limit=iterations)
    loads = _loads(load)
    fixed, floor, cap = _extras(loads.shape[-1], fixed_s, floor_hz, cap_hz)
    first_band, first_weight = _start(start, loads)
    return _native.allocate(
        loads, links.table, links.flat, total_hz, fixed, floor, cap, first_band, first_weight, tolerance, iterations
    )


def allocate_bandwidth_many(
    load: npt.ArrayLike,
    links: Links,
    total_hz: float,
    *,
    fixed_s: npt.ArrayLike | None = None,
    floor_hz: npt.ArrayLike | None = None,
    cap_hz: npt.ArrayLike | None = None,
    warm: bool = False,
    tolerance: float = 1e-8,
    iterations: int = 150,
) -> list[Allocation]:
    """`allocate_bandwidth` for each of many channel draws, in order.

    Args:
        load: (blocks, devices) for all draws, or (draws, blocks, devices).
        links: (draws, devices).
        warm: begin each search near the answer before it, for draws that follow each other in time.
        total_hz, fixed_s, floor_hz, cap_hz, tolerance, iterations: as `allocate_bandwidth`, for all draws.
    Raises:
        ValueError: an argument is not as above; the message names it.
    """
    if links.table.ndim != 3:
        raise ValueError(f"links must be (draws, devices), got shape {links.table[..., 0, :].shape}")
    loads = _native.floats("load", load)
    if loads.ndim != 3:
        loads = _loads(loads)[None]
    elif len(loads) != len(links.table):
        raise ValueError(f"load must have one entry for each of the {len(links.table)} draws, got shape {loads.shape}")
    fixed, floor, cap = _extras(loads.shape[-1], fixed_s, floor_hz, cap_hz)
    return _native.allocate_many(
        loads, links.table, links.flat, total_hz, fixed, floor, cap, warm, tolerance, iterations
    )


def seconds_per_token(links: FloatArray, flat: bool, band_hz: FloatArray) -> FloatArray:
    """What a token costs on each link for given hertz, without compute.

    Args:
        links: (5, devices), the table of `Links`.
        flat: whether the rate is proportional to the band.
        band_hz: (devices,) hertz.
    Returns:
        (devices,) seconds; infinite or NaN where the band is 0.
    """
    total = np.zeros(links.shape[1])
    for bits, snr in ((links[0], links[2]), (links[1], links[3])):
        used = bits > 0
        rate = band_hz * (snr if flat else np.log1p(snr / band_hz) / np.log(2))
        total[used] += bits[used] / rate[used]
    return total


def _checked(name: str, value: npt.ArrayLike | None) -> FloatArray:
    array = _native.floats(name, value)
    if not np.all((array == 0) | ((array >= SMALLEST) & (array <= LARGEST))):
        raise ValueError(f"{name} must be 0 or within {SMALLEST:g} to {LARGEST:g}")
    return np.atleast_1d(array)


def _loads(load: npt.ArrayLike) -> FloatArray:
    array = _native.floats("load", load)
    if array.ndim not in (1, 2):
        raise ValueError(f"load must be (blocks, devices) or (devices,), got shape {array.shape}")
    return array.reshape(-1, array.shape[-1]) if array.ndim == 1 else array


def _extras(
    devices: int, fixed_s: npt.ArrayLike | None, floor_hz: npt.ArrayLike | None, cap_hz: npt.ArrayLike | None
) -> tuple[FloatArray | None, FloatArray | None, FloatArray | None]:
    """Fixed seconds (blocks, devices), floors and caps (devices,); their shapes are compared in native code."""
    fixed = None
    if fixed_s is not None:
        fixed = _checked("fixed_s", fixed_s)
        if fixed.ndim > 2:
            raise ValueError(f"fixed_s must have the shape of load, got shape {fixed.shape}")
        fixed = fixed.reshape(1, -1) if fixed.ndim == 1 else fixed
    if floor_hz is None and cap_hz is None:
        return fixed, None, None
    return fixed, *_bounds(devices, 0.0 if floor_hz is None else floor_hz, np.inf if cap_hz is None else cap_hz)


def _bounds(devices: int, floor_hz: npt.ArrayLike, cap_hz: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    bounds = []
    for name, value in (("floor_hz", floor_hz), ("cap_hz", cap_hz)):
        array = _native.floats(name, value)
        if array.ndim == 0:
            array = np.full(devices, array)
        if array.shape != (devices,):
            raise ValueError(f"{name} must be ({devices},), one value a device, got shape {array.shape}")
        bounds.append(array)
    floor, cap = bounds
    if not np.all((floor == 0) | ((floor >= SMALLEST) & (floor <= LARGEST))):
        raise ValueError(f"floor_hz must be finite and 0 or at least {SMALLEST:g}")
    if not np.all(cap >= floor):
        at = int(np.argmin(cap >= floor))
        raise ValueError(f"cap_hz must be at least floor_hz, got {cap[at]} and {floor[at]} at device {at}")
    if not np.all((cap == 0) | (cap >= SMALLEST)):
        raise ValueError(f"cap_hz must be 0 or at least {SMALLEST:g}, got {cap[(cap > 0) & (cap < SMALLEST)][0]:g}")
    return floor, np.minimum(cap, LARGEST)


def _start(start: Allocation | None, load: FloatArray) -> tuple[FloatArray | None, FloatArray | None]:
    if start is None or start.status == "infeasible":
        return None, None
    if start.weight.shape != load.shape:
        raise ValueError(f"start must be an answer for load of shape {load.shape}, got {start.weight.shape}")
    return start.bandwidth_hz, start.weight
