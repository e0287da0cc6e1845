"""Second step of a layer: one order per device, with all of its tokens and experts in it.

An answer that is late is asked for once more, of the holders of copies. The first answer wins; the other is counted and
thrown away, so no expert is mixed in twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from wdmoe.arrays import BoolArray, Float32Array, FloatArray, Int32Array
from wdmoe.solver.combining import DeviceWork, Groups, group_by_device
from wdmoe.transport.codec.messages import Activations
from wdmoe.transport.exchange import NOTHING_EXPECTED, Batch, Exchange, Expected, Order, Reply
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


class Band(Protocol):
    """The band that devices share."""

    total_hz: float

    def hertz(self, counts: list[int]) -> FloatArray:
        """(devices,) what each gets for so many tokens."""
        ...

    def token_s(self, hertz: FloatArray) -> FloatArray:
        """(devices,) seconds of a token on the air with so many."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Hedging:
    """What decides about late answers."""

    copy_of: Int32Array  # (experts,) who else may be asked for each now, as `Work.device_of`
    # When the answer to an order should come: from its device, who else could answer, assignments and seconds on air.
    expect: Callable[[DeviceRoute, DeviceRoute, int, float], Expected]
    spend: Callable[[int], bool]  # whether so many orders may go to holders of copies now


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of a layer's orders."""

    parts: list[Part]  # each share of the layer once, from whoever was first
    losers: list[Part] = field(default_factory=list)  # asked in vain: another was first
    hedges: list[Part] = field(default_factory=list)  # of all these: what holders of copies were asked


@dataclass(slots=True, eq=False)
class _Share:
    """One device's share of a layer, and who was asked for it because that device was late."""

    first: Part
    due_s: float  # when holders of copies are to be asked
    seconds: list[Part] = field(default_factory=list)

    @property
    def won_by_copies(self) -> bool:
        return self.first.reply.result is None and bool(self.seconds) and all(p.reply.result for p in self.seconds)

    @property
    def settled(self) -> bool:
        waiting = self.first.reply.open or any(part.reply.open for part in self.seconds)
        return self.first.reply.result is not None or self.won_by_copies or not waiting


def dispatch(
    exchange: Exchange,
    work: Work,
    wait_s: float,
    meanwhile: Callable[[], object],
    band: Band | None = None,
    hedging: Hedging | None = None,
) -> Outcome:
    """Send each device its tokens and wait for the answers, `wait_s` seconds at most.

    Args:
        meanwhile: called once the orders are on their way.
        band: None: no band is shared.
        hedging: None: nobody else is asked when an answer is late.
    """
    orders = _orders(work, group_by_device(work.experts, work.weights, work.device_of), band, hedging)
    batch = exchange.begin(wait_s)
    try:
        parts = [_begin(exchange, batch, *order) for order in orders]
        if batch.open:
            meanwhile()
        if hedging is None:
            exchange.wait(batch)
            return Outcome(parts)
        exchange.wait(batch, min([_due_s(part) for part in parts if part.reply.open], default=math.inf))
        if not batch.open:  # nothing was late, as nearly always
            return Outcome(parts)
        return _first_answers(exchange, batch, work, band, hedging, parts)
    finally:
        exchange.end(batch)


Addressed = tuple[DeviceRoute, Int32Array, Order]  # to whom, the layer's tokens in it, what


def _begin(exchange: Exchange, batch: Batch, device: DeviceRoute, token_rows: Int32Array, order: Order) -> Part:
    return Part(device, token_rows, order, exchange.start(batch, order))


def _orders(work: Work, groups: Groups, band: Band | None, hedging: Hedging | None) -> list[Addressed]:
    hertz = None if band is None else band.hertz(_tokens_of_each(groups, len(work.devices)))
    token_s = None if band is None or hertz is None else band.token_s(hertz)
    orders = []
    for group in groups:
        air_s = 0.0 if token_s is None else float(token_s[group.device]) * len(group.token_rows)
        expected = _expected(work, group, hedging, air_s)
        orders.append(_order(work, group, 0.0 if hertz is None else float(hertz[group.device]), expected))
    return orders


def _order(work: Work, group: DeviceWork, bandwidth_hz: float, expected: Expected) -> Addressed:
    device = work.devices[group.device]
    order = Order(
        route=device.route,
        layer=work.layer,
        experts=group.experts,
        counts=group.counts,
        tokens=work.tokens if len(group.token_rows) == len(work.tokens) else work.tokens[group.token_rows],
        rows=group.rows,
        weights=group.weights,
        bandwidth_hz=bandwidth_hz,
        expected=expected,
    )
    return device, group.token_rows, order


def _expected(work: Work, group: DeviceWork, hedging: Hedging | None, air_s: float) -> Expected:
    """By what a copy would take; its experts may have several holders, of which the first stands for all."""
    copy = -1 if hedging is None else int(hedging.copy_of[group.experts[0]])
    if hedging is None or copy < 0:
        return Expected(air_s=air_s) if air_s else NOTHING_EXPECTED
    return hedging.expect(work.devices[group.device], work.devices[copy], len(group.rows), air_s)


def _due_s(part: Part) -> float:
    """When holders of copies are to be asked for it."""
    return part.reply.sent_s + part.order.expected.copy_s


def _first_answers(
    exchange: Exchange, batch: Batch, work: Work, band: Band | None, hedging: Hedging, parts: list[Part]
) -> Outcome:
    shares = [_Share(part, _due_s(part)) for part in parts]
    hedges: list[Part] = []
    while batch.open:
        now_s = time.monotonic()
        if hedges and all(share.settled for share in shares):
            break
        if now_s >= batch.deadline_s:
            break
        for share in shares:
            if share.due_s <= now_s and share.first.reply.open:
                share.due_s = math.inf
                share.seconds = _ask_copies(exchange, batch, work, band, hedging, share.first)
                hedges += share.seconds
        due_s = min((share.due_s for share in shares if share.first.reply.open), default=math.inf)
        exchange.wait(batch, due_s, every=bool(hedges))
    exchange.counters.hedges_won += sum(share.won_by_copies for share in shares)
    return _outcome(shares, hedges)


def _ask_copies(
    exchange: Exchange, batch: Batch, work: Work, band: Band | None, hedging: Hedging, late: Part
) -> list[Part]:
    """Ask the holders of copies for all that a late device owes; nobody, where a part of that has no copy."""
    experts = list(late.order.experts)
    if (hedging.copy_of[experts] < 0).any():
        return []
    its = np.zeros(len(hedging.copy_of) + 1, np.bool_)  # index -1: dropped
    its[experts] = True
    groups = _groups_of(work, its[work.experts], hedging.copy_of)
    if not hedging.spend(len(groups)):
        return []
    exchange.counters.hedges += len(groups)
    orders = _orders(work, groups, None if band is None else PartOfBand(band, late.order.bandwidth_hz), hedging)
    return [_begin(exchange, batch, *order) for order in orders]


def try_out(
    exchange: Exchange, work: Work, server: DeviceRoute, wait_s: float, hedging: Hedging, band: Band | None, hz: float
) -> bool:
    """Send a slow device its part of a layer beside the one that is waited for; see `Exchange.start_aside`.

    Args:
        work: `device_of` names that device only.
        server: who answers in its place.
        hz: of a shared band.
    Returns:
        Whether it has any part.
    """
    groups = _groups_of(work, work.device_of[work.experts] >= 0, work.device_of)
    for group in groups:
        device = work.devices[group.device]
        token_s = 0.0 if band is None else float(band.token_s(np.full(len(work.devices), hz))[group.device])
        expected = hedging.expect(device, server, len(group.rows), token_s * len(group.token_rows))
        exchange.counters.trials += 1
        exchange.start_aside(_order(work, group, hz, expected._replace(trial=True))[2], wait_s)
    return len(groups) > 0


def _groups_of(work: Work, wanted: BoolArray, device_of: Int32Array) -> Groups:
    """By device, some of the assignments. wanted: (tokens, top_k)."""
    experts = np.where(wanted & (work.experts >= 0), work.experts, np.int32(-1))
    return group_by_device(experts, np.where(experts >= 0, work.weights, np.float32(0)), device_of)


class PartOfBand:
    """Some hertz of a band, shared alike: those of a device that is late, for who is asked in its place."""

    def __init__(self, band: Band, part_hz: float) -> None:
        self._band, self.total_hz = band, part_hz

    def hertz(self, counts: list[int]) -> FloatArray:
        """See `Band`."""
        whole = self._band.hertz(counts)
        used = np.array(counts) > 0
        return np.asarray(whole * (self.total_hz / max(float(whole[used].sum()), self.total_hz)))

    def token_s(self, hertz: FloatArray) -> FloatArray:
        """See `Band`."""
        return self._band.token_s(hertz)


def _outcome(shares: Sequence[_Share], hedges: list[Part]) -> Outcome:
    parts: list[Part] = []
    losers: list[Part] = []
    for share in shares:
        by_copies = share.won_by_copies
        parts += share.seconds if by_copies else [share.first]
        losers += [share.first] if by_copies else share.seconds
    return Outcome(parts, losers, hedges)


def _tokens_of_each(groups: Iterable[DeviceWork], devices: int) -> list[int]:
    """(devices,) how many tokens each gets."""
    counts = [0] * devices
    for group in groups:
        counts[group.device] = len(group.token_rows)
    return counts
