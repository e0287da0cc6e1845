"""Second step of a layer: one order per device, with all of its tokens and experts in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wdmoe.arrays import Float32Array, FloatArray, Int32Array
from wdmoe.solver.combining import Groups, group_by_device
from wdmoe.transport.codec.messages import Activations
from wdmoe.transport.exchange import Exchange, Order, Reply
from wdmoe.transport.routing import DeviceRoute


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One device's share of a layer and what became of it."""

    device: DeviceRoute
    token_rows: Int32Array  # (n,) the layer's tokens in it
    order: Order
    reply: Reply


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Some tokens of a layer, the experts that compute them, and who has these."""

    layer: int
    tokens: Activations  # (tokens, hidden)
    experts: Int32Array  # (tokens, top_k), -1 where dropped
    weights: Float32Array  # (tokens, top_k) gate weights
    devices: tuple[DeviceRoute, ...]
    device_of: Int32Array  # (experts,) index into `devices`, -1 where not served


def dispatch(
    exchange: Exchange,
    work: Work,
    wait_s: float,
    meanwhile: Callable[[], object],
    share: Callable[[list[int]], FloatArray] | None = None,
) -> list[Part]:
    """Send each device its tokens and wait for the answers, `wait_s` seconds at most.

    Args:
        meanwhile: called once the orders are on their way.
        share: from tokens to hertz of each device; None: no band is shared.
    """
    groups = group_by_device(work.experts, work.weights, work.device_of)
    hertz = None if share is None else share(_tokens_of_each(groups, len(work.devices)))
    everyone = len(work.tokens)
    orders = [
        Order(
            route=work.devices[group.device].route,
            layer=work.layer,
            experts=group.experts,
            counts=group.counts,
            tokens=work.tokens if len(group.token_rows) == everyone else work.tokens[group.token_rows],
            rows=group.rows,
            weights=group.weights,
            bandwidth_hz=0.0 if hertz is None else float(hertz[group.device]),
        )
        for group in groups
    ]
    replies = exchange.call(orders, wait_s, meanwhile)
    return [
        Part(work.devices[group.device], group.token_rows, order, reply)
        for group, order, reply in zip(groups, orders, replies, strict=True)
    ]


def _tokens_of_each(groups: Groups, devices: int) -> list[int]:
    """(devices,) how many tokens each gets."""
    counts = [0] * devices
    for group in groups:
        counts[group.device] = len(group.token_rows)
    return counts
