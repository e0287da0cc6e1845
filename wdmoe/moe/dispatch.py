"""Second step of a layer: one order per device, with all of its tokens and experts in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.solver.combining import group_by_device
from wdmoe.transport.codec.messages import Activations, Float32Array, Int32Array
from wdmoe.transport.exchange import Exchange, Order, Reply
from wdmoe.transport.routing import DeviceRoute

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One device's share of a layer and what became of it."""

    device: DeviceRoute
    token_rows: Int32Array  # (n,) the layer's tokens in it
    order: Order
    reply: Reply


def dispatch(
    exchange: Exchange,
    layer: int,
    tokens: Activations,
    experts: Int32Array,
    weights: Float32Array,
    devices: tuple[DeviceRoute, ...],
    device_of: Int32Array,
    wait_s: float,
    meanwhile: Callable[[], object],
    share: Callable[[list[int]], FloatArray] | None = None,
) -> list[Part]:
    """Send each device its tokens and wait for the answers, `wait_s` seconds at most.

    Args:
        tokens: (tokens, hidden) hidden states.
        experts: (tokens, top_k), -1 where dropped.
        weights: (tokens, top_k) gate weights.
        device_of: (experts,) index into `devices`, -1 where not served.
        meanwhile: called once the orders are on their way.
        share: from tokens to hertz of each device; None: no band is shared.
    """
    groups = group_by_device(experts, weights, device_of)
    everyone = tokens.shape[0]
    hertz = None
    if share is not None:
        counts = [0] * len(devices)
        for group in groups:
            counts[group.device] = len(group.token_rows)
        hertz = share(counts)
    orders = [
        Order(
            route=devices[group.device].route,
            layer=layer,
            experts=group.experts,
            counts=group.counts,
            tokens=tokens if len(group.token_rows) == everyone else tokens[group.token_rows],
            rows=group.rows,
            weights=group.weights,
            bandwidth_hz=0.0 if hertz is None else float(hertz[group.device]),
        )
        for group in groups
    ]
    replies = exchange.call(orders, wait_s, meanwhile)
    return [
        Part(devices[group.device], group.token_rows, order, reply)
        for group, order, reply in zip(groups, orders, replies, strict=True)
    ]
