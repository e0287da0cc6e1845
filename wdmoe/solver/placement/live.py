"""Which device holds which expert. A plain greedy choice with a local search behind it; exact methods may
follow.

The measure, made for experts of one layer running in parallel [D]: with `L[l, d]` the load of layer l on
device d, `T[d]` its load over all layers and `x[d]` its share of the whole (by speed, as far as memory
allows),

    sum over l and d of L[l, d]^2 / x[d]  +  sum over d of T[d]^2 / x[d] / layers

is least when every device has its share of every layer. Squares make the marginal cost of one more expert
local.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray, Int32Array, Int64Array
from wdmoe.solver import _native

STRATEGIES = ("balance",)
UNPLACED = -1

# A placed expert moves only when that lowers the pressure on it by this share: moving costs a download.
MOVE_MARGIN = 0.15
POLISH_MARGIN = 1e-9


def place_experts(
    weight_bytes: npt.ArrayLike,
    load: npt.ArrayLike,
    memory_bytes: npt.ArrayLike,
    speed: npt.ArrayLike,
    layer: npt.ArrayLike,
    sticky: npt.ArrayLike | None = None,
    strategy: str = "balance",
) -> Int32Array:
    """Place each expert on one device within its memory. Deterministic; ties go to the lower index.

    Args:
        weight_bytes: (items,) size of each expert, >= 0.
        load: (items,) how often each is used, any unit, >= 0; all zero counts as all equal.
        memory_bytes: (devices,) what each device offers, >= 0.
        speed: (devices,) any unit, > 0.
        layer: (items,) int, the MoE layer of each expert.
        sticky: (items,) current device or -1; what stands there stays unless a move brings at least
            `MOVE_MARGIN`. None: nothing is placed yet.
        strategy: "balance".
    Returns:
        (items,) int32 device, -1 where nothing fits (the devices are too small together).
    Raises:
        ValueError: shapes differ, or a value is not as above; the message names the argument.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    size = _vector("weight_bytes", weight_bytes)
    room = _vector("memory_bytes", memory_bytes)
    pace = _vector("speed", speed, len(room))
    if np.any(pace <= 0):
        raise ValueError("speed must be positive")
    board = _Board(
        size=size,
        load=_usable_load(_vector("load", load, len(size))),
        layer=_layer_rows(layer, len(size)),
        share=_shares(float(size.sum()), room, pace),
        free=room.copy(),
    )
    if len(room) == 0 or len(size) == 0:
        return board.device
    _keep(board, sticky)
    _fill(board)
    _balance(board, POLISH_MARGIN if sticky is None else MOVE_MARGIN)
    return board.device


class _Board:
    """Where everything stands so far, with the running sums that make a marginal cost cheap."""

    def __init__(
        self, size: FloatArray, load: FloatArray, layer: Int64Array, share: FloatArray, free: FloatArray
    ) -> None:
        self.size, self.load, self.layer, self.share, self.free = size, load, layer, share, free
        self.layers = int(layer.max()) + 1 if len(layer) else 0
        self.layer_load = np.zeros((self.layers, len(share)))
        self.total_load = np.zeros(len(share))
        self.device: Int32Array = np.full(len(size), UNPLACED, np.int32)

    def put(self, item: int, device: int) -> None:
        self._account(item, device, 1.0)
        self.device[item] = device

    def take(self, item: int) -> None:
        self._account(item, int(self.device[item]), -1.0)
        self.device[item] = UNPLACED

    def cost(self, layer: int, load: npt.ArrayLike, sign: float) -> FloatArray:
        """(..., devices) half the change of the measure per unit of load that comes (+1) or goes (-1)."""
        half = sign * np.asarray(load, np.float64)[..., None] / 2
        layer_load, total_load = self.layer_load[layer] + half, self.total_load + half
        return np.asarray((layer_load + total_load / self.layers) / self.share)

    def _account(self, item: int, device: int, sign: float) -> None:
        self.free[device] -= sign * self.size[item]
        self.layer_load[self.layer[item], device] += sign * self.load[item]
        self.total_load[device] += sign * self.load[item]


def _keep(board: _Board, sticky: npt.ArrayLike | None) -> None:
    if sticky is None:
        return
    current = _native.regular("sticky", sticky)
    if current.shape != board.device.shape or not np.issubdtype(current.dtype, np.integer):
        raise ValueError(f"sticky must be integers of shape {board.device.shape}, got shape {current.shape}")
    if np.any(current < UNPLACED) or np.any(current >= len(board.free)):
        raise ValueError(f"sticky must be -1 or a device below {len(board.free)}")
    for item in np.flatnonzero(current != UNPLACED).tolist():
        if board.size[item] <= board.free[current[item]]:
            board.put(item, int(current[item]))


def _fill(board: _Board) -> None:
    """Place what has no device: large before small, to lose little room; then by layer, busy first."""
    waiting = np.flatnonzero(board.device == UNPLACED)
    order = np.lexsort((waiting, -board.load[waiting], board.layer[waiting], -board.size[waiting]))
    for item in waiting[order].tolist():
        fits = board.free >= board.size[item]
        if fits.any():
            cost = board.cost(board.layer[item], board.load[item], 1.0)
            board.put(item, int(np.argmin(np.where(fits, cost, np.inf))))


def _balance(board: _Board, margin: float) -> None:
    """Best single moves, by layer, until none brings more than `margin`. Each lowers the measure: it ends."""
    items_of = [np.flatnonzero((board.layer == row) & (board.device != UNPLACED)) for row in range(board.layers)]
    moved = True
    while moved:
        moved = False
        for row, items in enumerate(items_of):
            while len(items) and _best_move(board, row, items, margin):
                moved = True


def _best_move(board: _Board, layer: int, items: npt.NDArray[np.intp], margin: float) -> bool:
    """Make the move of an item of this layer that lowers the measure most. False if none is worth it."""
    load, at = board.load[items], board.device[items]
    stay = np.take_along_axis(board.cost(layer, load, -1.0), at[:, None].astype(np.intp), axis=1)[:, 0]
    go = np.where(board.free >= board.size[items, None], board.cost(layer, load, 1.0), np.inf)
    go[np.arange(len(items)), at] = np.inf
    gain = load[:, None] * (stay[:, None] * (1 - margin) - go)
    best, device = divmod(int(np.argmax(gain)), gain.shape[1])
    if not gain[best, device] > 0:
        return False
    item = int(items[best])
    board.take(item)
    board.put(item, device)
    return True


def _shares(total_bytes: float, memory_bytes: FloatArray, speed: FloatArray) -> FloatArray:
    """(devices,) positive, sum 1: proportional to speed, but none beyond its memory (water-filling)."""
    share = np.zeros(len(speed))
    left, open_ = total_bytes, memory_bytes > 0
    while open_.any() and left > 0:
        wanted = np.where(open_, left * speed / speed[open_].sum(), 0.0)
        full = open_ & (wanted >= memory_bytes)
        if not full.any():
            share[open_] = wanted[open_]
            break
        share[full] = memory_bytes[full]
        left -= float(memory_bytes[full].sum())
        open_ = open_ & ~full
    share = np.maximum(share, 1e-9 * max(total_bytes, 1.0))  # never divide by zero
    return np.asarray(share / share.sum())


def _usable_load(load: FloatArray) -> FloatArray:
    """Idle experts weigh a little, so that they spread as well."""
    mean = float(load.mean()) if len(load) else 0.0
    return np.maximum(load / mean, 0.1) if mean > 0 else np.ones(len(load))


def _layer_rows(layer: npt.ArrayLike, items: int) -> Int64Array:
    """(items,) dense row number of each item's layer."""
    given = _native.regular("layer", layer)
    if given.shape != (items,) or (items and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"layer must be integers of shape ({items},), got {given.dtype} of shape {given.shape}")
    return np.unique(given, return_inverse=True)[1].astype(np.int64)


def _vector(name: str, values: npt.ArrayLike, length: int | None = None) -> FloatArray:
    array = np.array(_native.floats(name, values))
    if array.ndim != 1 or (length is not None and len(array) != length):
        wanted = "one dimension" if length is None else f"shape ({length},)"
        raise ValueError(f"{name} must have {wanted}, got shape {array.shape}")
    if _native.first_bad(array.reshape(1, -1), positive=False) >= 0:
        raise ValueError(f"{name} must be finite and not negative (at most 1e100)")
    return array
