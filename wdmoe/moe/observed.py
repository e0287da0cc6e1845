"""What a base station has seen of its devices, answer by answer: their pace, whether they are late, whether they lie.

Decides by it whom to ask for what. Used by the model thread only.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from wdmoe.arrays import Int32Array
from wdmoe.errors import ExpertsUnavailableError
from wdmoe.layer_call import Callers
from wdmoe.moe.dispatch import Outcome, Part
from wdmoe.moe.health import DeviceHealth
from wdmoe.moe.lateness import Lateness
from wdmoe.moe.serving_speed import ServingSpeed
from wdmoe.moe.verification.inspector import Inspector, Unverified
from wdmoe.solver.combining import is_finite
from wdmoe.transport.codec.messages import Result
from wdmoe.transport.exchange import Order, Reply
from wdmoe.transport.routing import DeviceRoute, Routing

log = logging.getLogger(__name__)


class Observed:
    """Takes in what became of orders, and tells whom to ask."""

    def __init__(self, inspector: Inspector) -> None:
        """`inspector` looks at every answer."""
        self.inspector = inspector
        self.health = DeviceHealth()
        self.lateness = Lateness()
        self.speed = ServingSpeed()
        self._told_slow = self.lateness.slow
        self._seen = Routing()

    def newest(self, routing: Routing) -> Routing:
        """The table without devices in quarantine; what was seen of connections that are gone is forgotten."""
        routing = self.inspector.allowed(routing)
        if routing is not self._seen:
            self.health.forget_all_but(routing.devices)
            self.lateness.forget_all_but({device.route for device in routing.devices})
            self._seen = routing
        return routing

    # ---- whom to ask

    @property
    def all_well(self) -> bool:
        """Nobody is paused or slow: the cheap answer for the hot path."""
        return self.health.all_well and not self.lateness.slow

    def device_of(self, routing: Routing, layer: int, prompt: bool = False) -> Int32Array:
        """(experts,) index of the device to ask for each: not one that is paused or slow, where another has a copy.

        Raises:
            ExpertsUnavailableError: nobody serves any expert of this layer.
        """
        device_of = routing.device_of.get(layer)
        if device_of is None:
            raise ExpertsUnavailableError(f"layer {layer}: no device serves any of its experts")
        standby_of = routing.standby_of.get(layer)
        if standby_of is None or self.all_well:
            return device_of
        for other_of in (standby_of, *routing.further_of.get(layer, ())):
            device_of = self.health.around(routing.devices, device_of, other_of, self._is_slow(prompt))
        return device_of

    def other_of(self, routing: Routing, layer: int, device_of: Int32Array) -> Int32Array:
        """(experts,) who else has each, whether it may be asked or not; -1 where nobody."""
        home_of, standby_of = routing.device_of[layer], routing.standby_of.get(layer)
        if standby_of is None:
            return np.full_like(device_of, -1)
        return standby_of if device_of is home_of else np.where(device_of == home_of, standby_of, home_of)

    def may_be_asked(self, routing: Routing, other_of: Int32Array) -> Int32Array:
        """(experts,) as `other_of`, without devices that are paused.

        A slow one may be faster than one that is late now: it may have recovered, and this is how that is found out.
        """
        if self.health.all_well:
            return other_of
        good = np.array([self.health.usable(d) for d in routing.devices] + [False])
        return np.where(good[other_of], other_of, np.int32(-1))

    def _is_slow(self, prompt: bool) -> Callable[[DeviceRoute], bool]:
        slow = self.lateness.slow
        return lambda device: (device.route, prompt) in slow

    # ---- what became of orders

    def judge(self, outcome: Outcome, callers: Callers) -> Sequence[Unverified]:
        """Take the answers in or refuse them. What else is to be learnt of them is for `learn`, which has time."""
        judged = (self._judge(part, callers) for part in outcome.parts)
        return [each for each in judged if each is not None]

    def learn(self, outcome: Outcome, callers: Callers, unverified: Sequence[Unverified]) -> None:
        """Take in how fast each device was, and what was asked in vain.

        Args:
            unverified: what `judge` said.
        """
        now_s = time.monotonic()
        for answer in unverified:
            self.inspector.put_off(answer)
        for part in outcome.parts:
            if part.reply.result is not None:
                self._served(part, part.reply.result)
                self.lateness.answered(part.order.route, part.order.expected, part.reply.least_s, now_s)
        for part in outcome.losers:
            self._learn_of_loser(part, callers, now_s)
        self._tell_slow()

    def learn_aside(self, order: Order, reply: Reply) -> None:
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

    def _learn_of_loser(self, part: Part, callers: Callers, now_s: float) -> None:
        """Of who was asked in vain, since another was first."""
        order, reply = part.order, part.reply
        if reply.open:  # `learn_aside` hears of the rest
            if now_s - reply.sent_s > order.expected.late_s:
                self.lateness.answered(order.route, order.expected, math.inf, now_s)
        elif reply.result is not None:
            self._clock(order, reply)
        elif not reply.timed_out:
            self._judge(part, callers)

    def _judge(self, part: Part, callers: Callers) -> Unverified | None:
        """Take a reply in or refuse it, and remember who failed."""
        reply, device = part.reply, part.device
        ledgers = tuple(caller.ledger for caller, _ in callers.among(part.token_rows))
        unverified = None
        if reply.result is not None:
            judged = self.inspector.judge(device, part.order, reply.result.partial, ledgers)
            if judged.partial is None:
                reply.result, reply.reason = None, judged.reason
            elif judged.partial is not reply.result.partial:
                reply.result = replace(reply.result, partial=judged.partial)
            unverified = judged.unverified
        elif reply.malformed:
            self.inspector.malformed(device, part.order, reply.reason, ledgers)
        if reply.result is None:
            log.warning("device %s, layer %d: %s", device.name, part.order.layer, reply.reason)
            self.health.failed(device.route)
        return unverified

    def _served(self, part: Part, result: Result) -> None:
        reply, device, tokens = part.reply, part.device, len(part.token_rows)
        link_s = result.link_down_s + result.link_up_s
        self.health.answered(device.route, reply.answered_s - reply.sent_s, tokens, link_s)
        if tokens == 1:
            self.speed.saw(device.device_id, len(part.order.experts), result.compute_s)
        self._clock(part.order, reply)

    def _clock(self, order: Order, reply: Reply) -> None:
        seconds = max(reply.answered_s - reply.sent_s - order.expected.air_s, 0.0)
        self.lateness.learn(order.route, len(order.rows), seconds)

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
