"""One MoE layer, computed by devices: the spine of wdmoe.

    gate's demand -> select -> dispatch -> combine -> the layer's output

Everything here runs on the model thread, in the greenlet of the request.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array, FloatArray, Int32Array
from wdmoe.errors import ExpertsUnavailableError
from wdmoe.layer_call import LayerCall
from wdmoe.moe.account import Busy, book, record
from wdmoe.moe.bandwidth_share import BandShare, SharedBand
from wdmoe.moe.combine import Answer, Share, arrived_weight, combine
from wdmoe.moe.dispatch import Band, Hedging, Outcome, Part, PartOfBand, Work, dispatch, try_out
from wdmoe.moe.drop_price import DropPrice
from wdmoe.moe.health import DeviceHealth
from wdmoe.moe.hedge_budget import HedgeBudget
from wdmoe.moe.lateness import Lateness
from wdmoe.moe.select import Bound, Chosen, Costs, choose, joined, substitute
from wdmoe.moe.serving_speed import ServingSpeed
from wdmoe.moe.verification.inspector import Inspector
from wdmoe.moe.waiting import WaitForExperts
from wdmoe.receipt import Ledger
from wdmoe.solver.combining import is_finite
from wdmoe.transport.codec.messages import Activations
from wdmoe.transport.exchange import Exchange, Expected, Order, Reply
from wdmoe.transport.routing import DeviceRoute, Routing

log = logging.getLogger(__name__)

SAVED_TOKENS = 4  # of an answer, whose share a request may save up; more would come off at once
NOTHING = 1e-6  # share of a token's gate weight below which it counts as unanswered
UNKNOWN = 0.5  # share of a deadline after which a copy is asked where no device's times are known yet
TRIAL_BAND = 0.05  # share of a band for the trial of a slow device
ANSWER_TOKENS = 4  # orders of a layer with more are a prompt's


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRules:
    """How layers are served: from the bundle (what the model wants) and the settings (what the user wants)."""

    policy: str = "topk"
    budget_s: float = 0.0  # `budget`: what one layer may take for one token
    budget_per_token_s: float = 0.0  # and for each further one
    max_dropped: float = 0.0  # `budget` without a time: the share of the experts' worth that a request may drop
    bandwidth_hz: float = 0.0  # the band that all devices share in a layer; 0: each has a link of its own
    equal_bandwidth: bool = False  # each device gets the same part of it, whatever it needs
    renormalise: bool = True  # on drop: kept weights grow to the sum of all; else they keep their values
    gate_temperature: float = 1.0
    rank: str = "probability"  # what the policy ranks by
    whole_layers: frozenset[int] = frozenset()  # decoder layers that keep all their experts, whatever the policy
    deadline_s: float = 1.0
    deadline_per_token_s: float = 0.02
    wait_for_experts_s: float = 0.0  # longest wait for a layer that lost all its experts, between two tokens
    rehearsal: bool = False  # decide on each token alone, as in an answer, and send no band, so that no link waits


class ExpertLayers:
    """All MoE layers of a model. `routing` gives the newest snapshot of who serves what.

    `rules` may be set anew between passes, as evaluations do, which thus compare rules on the same measured devices.
    """

    def __init__(
        self,
        exchange: Exchange,
        routing: Callable[[], Routing],
        rules: LayerRules,
        inspector: Inspector | None = None,
    ) -> None:
        """`inspector` looks at every answer; None: at what is not finite only."""
        self._exchange = exchange
        self._routing = routing
        self.rules = rules
        self.inspector = inspector or Inspector()
        self.health = DeviceHealth()
        self.lateness = Lateness()
        self.speed = ServingSpeed()
        self._told_slow = self.lateness.slow
        self._budget = HedgeBudget()
        self._waiting = WaitForExperts(self._serve, self._whole, routing, exchange.pause)
        exchange.on_aside = self._learn_aside
        self._price = DropPrice()
        self._seen = Routing()
        self._last_air: SharedBand | None = None

    def run(self, call: LayerCall) -> Float32Array:
        """Compute one layer for some tokens.

        Returns:
            (tokens, hidden) float32: the gate-weighted sum over the experts that answered.
        Raises:
            ExpertsUnavailableError: not one expert of this layer answered, nor did a substitute, nor came one in time.
            CancelledRequestError: its client went away while it waited for experts.
        """
        return self._waiting.run(call, self.rules.wait_for_experts_s)

    def _serve(self, call: LayerCall) -> Float32Array:
        routing = self._newest_routing()
        chosen = self._choose(routing, call)
        parts = self._ask(routing, call, chosen)
        failed = again = [part for part in parts if part.reply.result is None]
        for _ in range(1 + len(routing.further_of.get(call.layer, ()))):  # as many copies as there are
            if not again:
                break
            parts += (others := self._ask_standbys(routing, call, chosen, again))
            again = [part for part in others if part.reply.result is None]
        owed = _owed(chosen, parts) if failed else None
        if owed is not None or not parts:
            parts += self._rescue(routing, call, chosen, owed)
        answers = [Answer(part.reply.result.partial, part.token_rows) for part in parts if part.reply.result]
        record(call.ledger, chosen.weights, chosen.dropped, chosen.lost, owed)
        return combine(len(call.tokens), call.tokens.shape[1], answers, self._scale(chosen, owed))

    def _newest_routing(self) -> Routing:
        routing = self.inspector.allowed(self._routing())
        if routing is not self._seen:
            self.health.forget_all_but(routing.devices)
            self.lateness.forget_all_but({device.route for device in routing.devices})
            self._seen = routing
        return routing

    def _whole(self, layer: int) -> bool:
        """Whether all experts of a layer may be asked now."""
        routing = self._newest_routing()
        return layer in routing.complete and bool(
            self.health.available(routing.devices, self._device_of(routing, layer)).all()
        )

    def _choose(self, routing: Routing, call: LayerCall) -> Chosen:
        if self.rules.rehearsal and self.rules.policy != "topk" and len(call.tokens) > 1:
            return joined([self._choose(routing, call.of(np.array([row]))) for row in range(len(call.tokens))])
        all_served = self.health.all_well and call.layer in routing.complete
        device_of = self._device_of(routing, call.layer, _is_prompt(call))
        policy = "topk" if call.layer in self.rules.whole_layers else self.rules.policy
        costs = None if policy == "topk" else self._costs(routing, call, device_of)
        bound = self._bound(routing, call) if self.rules.max_dropped else None
        chosen = choose(
            call.demand,
            policy=policy,
            costs=costs,
            budget_s=self.rules.budget_s + (len(call.tokens) - 1) * self.rules.budget_per_token_s,
            available=None if all_served else self.health.available(routing.devices, device_of),
            renormalise=self.rules.renormalise,
            gate_temperature=self.rules.gate_temperature,
            rank=self.rules.rank,
            bound=bound,
        )
        if bound is not None and costs is not None:
            self._pay(call, chosen, bound, float(costs.token_s.mean()))
        return chosen

    def _bound(self, routing: Routing, call: LayerCall) -> Bound:
        share, price = self.rules.max_dropped, self._price
        allowance, unspent = share * len(routing.device_of), call.ledger.unspent
        price_s = price.seconds(unspent, allowance)
        return Bound(share, unspent, SAVED_TOKENS * allowance, price.mean_worth(call.layer), price_s)

    def _pay(self, call: LayerCall, chosen: Chosen, bound: Bound, layer_s: float) -> None:
        """Book what a layer was worth and what it dropped of that, and learn the price that answers pay."""
        call.ledger.unspent = chosen.unspent
        self._price.saw(call.layer, chosen.worth, len(call.tokens))
        if len(call.tokens) == 1:
            self._price.spent(chosen.unspent, bound.most / SAVED_TOKENS, layer_s)

    def _costs(self, routing: Routing, call: LayerCall, device_of: Int32Array) -> Costs | None:
        """What the policy decides by: what was measured, and in a shared band what the air takes if all have the same.

        Not what the air took: the far device that was given the most hertz would look near. None: nothing is known.
        """
        if not routing.devices:
            return None
        air = self._air(routing, call.tokens)
        about = min(-(-call.demand.experts.size // len(routing.devices)), len(call.tokens))
        counts = (about,) * len(routing.devices)
        other_s = self._other_s(air, counts) if air.total_hz else self.health.token_s(routing.devices, counts)
        if other_s is None:
            return None
        links = air.links(other_s) if self.rules.policy == "budget" else None
        return Costs(device_of, air.each_s + other_s, links, air.total_hz or 1.0)

    def _other_s(self, air: SharedBand, tokens: Sequence[int]) -> FloatArray:
        """(devices,) seconds of a token beside the air in orders of so many; 0 while no device was measured."""
        measured_s = self.health.other_s(air.devices, tokens)
        return np.zeros(len(air.devices)) if measured_s is None else measured_s

    def _air(self, routing: Routing, tokens: Activations) -> SharedBand:
        """Of this routing table, which need not be the newest: another request may have seen that meanwhile."""
        air, total_hz, equal = self._last_air, self.rules.bandwidth_hz, self.rules.equal_bandwidth
        if air is None or air.devices is not routing.devices or (air.total_hz, air.equal) != (total_hz, equal):
            air = SharedBand(routing.devices, 8.0 * tokens.itemsize * tokens.shape[1], total_hz, equal)
            self._last_air = air
        return air

    def _device_of(self, routing: Routing, layer: int, prompt: bool = False) -> Int32Array:
        """(experts,) index of the device to ask for each: not one that is paused or slow, where another has a copy."""
        device_of = routing.device_of.get(layer)
        if device_of is None:
            raise ExpertsUnavailableError(f"layer {layer}: no device serves any of its experts")
        standby_of = routing.standby_of.get(layer)
        if standby_of is None or (self.health.all_well and not self.lateness.slow):
            return device_of
        for other_of in (standby_of, *routing.further_of.get(layer, ())):
            device_of = self.health.around(routing.devices, device_of, other_of, self._is_slow(prompt))
        return device_of

    def _is_slow(self, prompt: bool) -> Callable[[DeviceRoute], bool]:
        slow = self.lateness.slow
        return lambda device: (device.route, prompt) in slow

    def _other_of(self, routing: Routing, layer: int, device_of: Int32Array) -> Int32Array:
        """(experts,) who else has each, whether it may be asked or not; -1 where nobody."""
        home_of, standby_of = routing.device_of[layer], routing.standby_of.get(layer)
        if standby_of is None:
            return np.full_like(device_of, -1)
        return standby_of if device_of is home_of else np.where(device_of == home_of, standby_of, home_of)

    def _ask(self, routing: Routing, call: LayerCall, chosen: Chosen) -> list[Part]:
        """Dispatch, and book what it took."""
        started_s, busy, prompt = time.monotonic(), Busy(call.meanwhile), _is_prompt(call)
        device_of = self._device_of(routing, call.layer, prompt)
        other_of = self._other_of(routing, call.layer, device_of)
        work = Work(call.layer, call.tokens, chosen.experts, chosen.weights, routing.devices, device_of)
        wait_s = self.rules.deadline_s + len(call.tokens) * self.rules.deadline_per_token_s
        band = self._band(routing, call)
        hedging = Hedging(
            copy_of=self._may_be_asked(routing, other_of, prompt),
            expect=self._expect(prompt, UNKNOWN * wait_s),
            spend=self._budget.spend,
        )
        if self.lateness.slow and self._try_slow(work, other_of, prompt, hedging, wait_s, band) and band is not None:
            band = PartOfBand(band, (1 - TRIAL_BAND) * self.rules.bandwidth_hz)
        outcome = dispatch(self._exchange, work, wait_s, busy, band, hedging)
        self._budget.earn(len(outcome.parts))
        self._learn(outcome, call.ledger)
        call.ledger.hedges += outcome.hedges
        served = [(part.device.name, part.reply) for part in outcome.parts]
        book(call.ledger, served, time.monotonic() - started_s, busy.seconds)
        return outcome.parts

    def _band(self, routing: Routing, call: LayerCall) -> Band | None:
        """The band that the devices share; None where there is none."""
        if not self.rules.bandwidth_hz or self.rules.rehearsal or not routing.devices:
            return None
        air = self._air(routing, call.tokens)
        return BandShare(air, lambda counts: self._other_s(air, counts))

    def _may_be_asked(self, routing: Routing, other_of: Int32Array, prompt: bool) -> Int32Array:
        """(experts,) as `other_of`, without devices that are paused or slow."""
        if self.health.all_well and not self.lateness.slow:
            return other_of
        is_slow = self._is_slow(prompt)
        good = np.array([self.health.usable(d) and not is_slow(d) for d in routing.devices] + [False])
        return np.where(good[other_of], other_of, np.int32(-1))

    def _expect(self, prompt: bool, unknown_s: float) -> Callable[[DeviceRoute, DeviceRoute, int, float], Expected]:
        """As `Hedging.expect`, for orders of a prompt or of an answer."""
        expect, owed_s = self.lateness.expect, self._exchange.owed_s
        return lambda device, copy, size, air_s: expect(
            device.route,
            copy.route,
            size,
            owed_s=owed_s(device.route),
            air_s=air_s,
            prompt=prompt,
            unknown_s=unknown_s,
        )

    def _try_slow(
        self, work: Work, other_of: Int32Array, prompt: bool, hedging: Hedging, wait_s: float, band: Band | None
    ) -> bool:
        """Ask slow devices whose trial is due for what others are asked for now. Whether any was asked."""
        now_s, asked = time.monotonic(), False
        hz = 0.0 if band is None else TRIAL_BAND * self.rules.bandwidth_hz
        for index in np.unique(other_of[other_of >= 0]).tolist():
            its = replace(work, device_of=np.where(other_of == index, other_of, np.int32(-1)))
            wanted = (its.device_of[work.experts[work.experts >= 0]] >= 0).any()
            if wanted and self.lateness.trial_due(work.devices[index].route, prompt, now_s):
                server = work.devices[int(work.device_of[other_of == index][0])]
                asked |= try_out(self._exchange, its, server, wait_s, hedging, band, hz)
        return asked

    def _learn(self, outcome: Outcome, ledger: Ledger) -> None:
        """Take in what each device answered and how fast it was, and what was asked in vain."""
        now_s = time.monotonic()
        for part in outcome.parts:
            self._judge(part, ledger)
            if part.reply.result is not None:
                self._clock(part.order, part.reply)
                self.lateness.answered(part.order.route, part.order.expected, part.reply.least_s, now_s)
        for part in outcome.losers:
            ledger.bytes_down += part.reply.bytes_down
            ledger.bytes_up += part.reply.bytes_up
            if part.reply.open:  # `_learn_aside` hears of the rest
                if now_s - part.reply.sent_s > part.order.expected.late_s:
                    self.lateness.answered(part.order.route, part.order.expected, math.inf, now_s)
            elif part.reply.result is not None:
                self._clock(part.order, part.reply)
            elif not part.reply.timed_out:
                self._judge(part, ledger)
        self._tell_slow()

    def _learn_aside(self, order: Order, reply: Reply) -> None:
        """An order that nobody waited for any more was answered, or will never be."""
        good = reply.result is not None and is_finite(reply.result.partial)
        if reply.result is not None and good:
            link_s = reply.result.link_down_s + reply.result.link_up_s
            self.health.answered(order.route, reply.answered_s - reply.sent_s, len(order.tokens), link_s)
            self._clock(order, reply)
        elif not reply.timed_out:  # who is only late was counted as that: what has no copy elsewhere needs it still
            name = next((device.name for device in self._seen.devices if device.route == order.route), "that left")
            log.warning("device %s, layer %d: %s", name, order.layer, reply.reason or "an answer that is not finite")
            self.health.failed(order.route)
        if order.expected.trial:
            took_s = reply.least_s if good else math.inf
            self.lateness.tried(order.route, order.expected, took_s, time.monotonic())
            self._tell_slow()

    def _tell_slow(self) -> None:
        """Log who became slow, and who is fast again."""
        told, slow = self._told_slow, self.lateness.slow
        if slow is told:
            return
        self._told_slow = slow
        for device in self._seen.devices:
            was, is_slow = (any(route == device.route for route, _ in each) for each in (told, slow))
            if was != is_slow:
                log.warning("device %s is %s", device.name, "slow: copies are asked" if is_slow else "fast again")

    def _clock(self, order: Order, reply: Reply) -> None:
        seconds = max(reply.answered_s - reply.sent_s - order.expected.air_s, 0.0)
        self.lateness.learn(order.route, len(order.rows), seconds)

    def _judge(self, part: Part, ledger: Ledger) -> None:
        """Take a reply in or refuse it, and remember which."""
        reply, device = part.reply, part.device
        if reply.result is not None:
            judged = self.inspector.judge(device, part.order, reply.result.partial, ledger)
            if judged.partial is None:
                reply.result, reply.reason = None, judged.reason
            elif judged.partial is not reply.result.partial:
                reply.result = replace(reply.result, partial=judged.partial)
        elif reply.malformed:
            self.inspector.malformed(device, part.order, reply.reason, ledger)
        if reply.result is not None:
            link_s = reply.result.link_down_s + reply.result.link_up_s
            self.health.answered(device.route, reply.answered_s - reply.sent_s, len(part.token_rows), link_s)
            if len(part.token_rows) == 1:
                self.speed.saw(device.device_id, len(part.order.experts), reply.result.compute_s)
        else:
            log.warning("device %s, layer %d: %s", device.name, part.order.layer, reply.reason)
            self.health.failed(device.route)

    def _ask_standbys(self, routing: Routing, call: LayerCall, chosen: Chosen, failed: list[Part]) -> list[Part]:
        """Ask the holders of copies for what did not come, where there are some."""
        usable = self.health.available(routing.devices, self._device_of(routing, call.layer))
        again = np.zeros(len(usable) + 1, np.bool_)  # index -1: dropped
        for part in failed:
            again[list(part.order.experts)] = usable[list(part.order.experts)]
        wanted = again[chosen.experts]
        rows = np.flatnonzero(wanted.any(axis=1))
        if not rows.size:
            return []
        experts = np.where(wanted, chosen.experts, np.int32(-1))[rows]
        weights = np.where(wanted, chosen.weights, np.float32(0))[rows]
        parts = self._ask(routing, call.of(rows), Chosen(experts, weights))
        call.ledger.retries += len(parts)
        return _of_rows(parts, rows)

    def _rescue(self, routing: Routing, call: LayerCall, chosen: Chosen, owed: Float32Array | None) -> list[Part]:
        """Ask once more, elsewhere, for the tokens that would go without any expert."""
        wanted = chosen.weights.sum(axis=1)
        arrived = wanted if owed is None else wanted - owed
        empty = np.flatnonzero((call.demand.weights.sum(axis=1) > 0) & (arrived <= NOTHING * wanted))
        if not empty.size:
            return []
        available = self.health.available(routing.devices, self._device_of(routing, call.layer))
        replacement = substitute(call.demand, empty, available)
        parts = [] if replacement is None else self._ask(routing, call.of(empty), replacement)
        call.ledger.retries += len(parts)
        if empty.size == len(call.tokens) and not any(part.reply.result for part in parts):
            raise ExpertsUnavailableError(f"layer {call.layer}: none of its experts answered, and no other could")
        return _of_rows(parts, empty)

    def _scale(self, chosen: Chosen, owed: Float32Array | None) -> Float32Array | None:
        """(tokens,) factor that makes up for what did not come, where the model wants it so."""
        if owed is None or not self.rules.renormalise:
            return None
        wanted = chosen.weights.sum(axis=1)
        arrived = wanted - owed
        partly = (owed > 0) & (arrived > NOTHING * wanted)
        scale: Float32Array = np.where(partly, wanted / np.where(partly, arrived, 1), 1).astype(np.float32)
        return scale


def _of_rows(parts: list[Part], rows: npt.NDArray[np.integer[Any]]) -> list[Part]:
    """Parts of a choice for some tokens of a layer as parts of the layer."""
    return [replace(part, token_rows=rows[part.token_rows].astype(np.int32)) for part in parts]


def _owed(chosen: Chosen, parts: list[Part]) -> Float32Array | None:
    """(tokens,) chosen gate weight that did not arrive; None where everything did, be it from a standby."""
    wanted: Float32Array = chosen.weights.sum(axis=1)
    arrived = arrived_weight(
        len(wanted), [Share(p.token_rows, p.order.rows, p.order.weights) for p in parts if p.reply.result is not None]
    )
    owed = np.where(wanted - arrived > NOTHING * wanted, wanted - arrived, np.float32(0))
    return owed if owed.any() else None


def _is_prompt(call: LayerCall) -> bool:
    return len(call.tokens) > ANSWER_TOKENS
