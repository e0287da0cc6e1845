"""One MoE layer, computed by devices: the spine of wdmoe.

    gate's demand -> select -> dispatch -> combine -> the layer's output

Everything here runs on the model thread, in the greenlet of whoever runs a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Float32Array, FloatArray, Int32Array
from wdmoe.errors import ExpertsUnavailableError
from wdmoe.layer_call import LayerCall
from wdmoe.moe.account import record
from wdmoe.moe.asking import Asking, is_prompt
from wdmoe.moe.bandwidth_share import BandShare, SharedBand
from wdmoe.moe.combine import Answer, Share, arrived_weight, combine
from wdmoe.moe.dispatch import Band, Part
from wdmoe.moe.drop_price import DropPrice
from wdmoe.moe.observed import Observed
from wdmoe.moe.select import Bound, Chosen, Costs, choose, joined, substitute
from wdmoe.moe.verification.inspector import Inspector
from wdmoe.moe.waiting import WaitForExperts
from wdmoe.receipt import Ledger
from wdmoe.transport.codec.messages import Activations
from wdmoe.transport.exchange import Exchange
from wdmoe.transport.routing import Routing

SAVED_TOKENS = 4  # of an answer, whose share a request may save up; more would come off at once
NOTHING = 1e-6  # share of a token's gate weight below which it counts as unanswered


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
        self._routing = routing
        self.rules = rules
        self.observed = Observed(inspector or Inspector())
        self._asking = Asking(exchange, self.observed)
        self._waiting = WaitForExperts(self._serve, self._whole, routing, exchange.pause)
        self._price = DropPrice()
        self._last_air: SharedBand | None = None

    def run(self, call: LayerCall) -> Float32Array:
        """Compute one layer for some tokens. All is booked after the last of several layers (`LayerCall.more`).

        Returns:
            (tokens, hidden) float32: the gate-weighted sum over the experts that answered.
        Raises:
            ExpertsUnavailableError: not one expert of this layer answered, nor did a substitute, nor came one in time.
            CancelledRequestError: its client went away while it waited for experts.
        """
        more = False
        try:
            out = self._waiting.run(call, self.rules.wait_for_experts_s)
            more = call.more
        finally:
            if not more:
                self._asking.settle()
        return out

    def _serve(self, call: LayerCall) -> Float32Array:
        routing = self.observed.newest(self._routing())
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
        record(call.callers, chosen.weights, chosen.dropped, chosen.lost, owed)
        return combine(len(call.tokens), call.tokens.shape[1], answers, self._scale(chosen, owed))

    def _whole(self, layer: int) -> bool:
        """Whether all experts of a layer may be asked now."""
        routing = self.observed.newest(self._routing())
        return layer in routing.complete and bool(
            self.observed.health.available(routing.devices, self.observed.device_of(routing, layer)).all()
        )

    def _choose(self, routing: Routing, call: LayerCall) -> Chosen:
        if self.rules.rehearsal and self.rules.policy != "topk" and len(call.tokens) > 1:
            return joined([self._choose(routing, call.of(np.array([row]))) for row in range(len(call.tokens))])
        if self.rules.max_dropped and len(call.callers.each) > 1:  # each has an account of its own
            rows = np.arange(len(call.tokens))
            return joined([self._choose(routing, call.of(rows[its])) for _, its in call.callers.parts()])
        all_served = self.observed.health.all_well and call.layer in routing.complete
        device_of = self.observed.device_of(routing, call.layer, is_prompt(call))
        policy = "topk" if call.layer in self.rules.whole_layers else self.rules.policy
        costs = None if policy == "topk" else self._costs(routing, call, device_of)
        bound = self._bound(routing, call) if self.rules.max_dropped else None
        chosen = choose(
            call.demand,
            policy=policy,
            costs=costs,
            budget_s=self.rules.budget_s + (_longest(call) - 1) * self.rules.budget_per_token_s,
            available=None if all_served else self.observed.health.available(routing.devices, device_of),
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
        allowance, unspent = share * len(routing.device_of), _ledger(call).unspent
        price_s = price.seconds(unspent, allowance)
        return Bound(share, unspent, SAVED_TOKENS * allowance, price.mean_worth(call.layer), price_s)

    def _pay(self, call: LayerCall, chosen: Chosen, bound: Bound, layer_s: float) -> None:
        """Book what a layer was worth and what it dropped of that, and learn the price that answers pay."""
        _ledger(call).unspent = chosen.unspent
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
        other_s = self._other_s(air, counts) if air.total_hz else self.observed.health.token_s(routing.devices, counts)
        if other_s is None:
            return None
        links = air.links(other_s) if self.rules.policy == "budget" else None
        return Costs(device_of, air.each_s + other_s, links, air.total_hz or 1.0)

    def _other_s(self, air: SharedBand, tokens: Sequence[int]) -> FloatArray:
        """(devices,) seconds of a token beside the air in orders of so many; 0 while no device was measured."""
        measured_s = self.observed.health.other_s(air.devices, tokens)
        return np.zeros(len(air.devices)) if measured_s is None else measured_s

    def _air(self, routing: Routing, tokens: Activations) -> SharedBand:
        """Of this routing table, which need not be the newest: another request may have seen that meanwhile."""
        air, total_hz, equal = self._last_air, self.rules.bandwidth_hz, self.rules.equal_bandwidth
        if air is None or air.devices is not routing.devices or (air.total_hz, air.equal) != (total_hz, equal):
            air = SharedBand(routing.devices, 8.0 * tokens.itemsize * tokens.shape[1], total_hz, equal)
            self._last_air = air
        return air

    def _band(self, routing: Routing, call: LayerCall) -> Band | None:
        """The band that the devices share; None where there is none."""
        if not self.rules.bandwidth_hz or self.rules.rehearsal or not routing.devices:
            return None
        air = self._air(routing, call.tokens)
        return BandShare(air, lambda counts: self._other_s(air, counts))

    def _ask(self, routing: Routing, call: LayerCall, chosen: Chosen) -> list[Part]:
        wait_s = self.rules.deadline_s + len(call.tokens) * self.rules.deadline_per_token_s
        return self._asking.ask(routing, call, chosen, wait_s, self._band(routing, call))

    def _ask_standbys(self, routing: Routing, call: LayerCall, chosen: Chosen, failed: list[Part]) -> list[Part]:
        """Ask the holders of copies for what did not come, where there are some."""
        usable = self.observed.health.available(routing.devices, self.observed.device_of(routing, call.layer))
        again = np.zeros(len(usable) + 1, np.bool_)  # index -1: dropped
        for part in failed:
            again[list(part.order.experts)] = usable[list(part.order.experts)]
        wanted = again[chosen.experts]
        rows = np.flatnonzero(wanted.any(axis=1))
        if not rows.size:
            return []
        experts = np.where(wanted, chosen.experts, np.int32(-1))[rows]
        weights = np.where(wanted, chosen.weights, np.float32(0))[rows]
        return self._ask_again(routing, call, rows, Chosen(experts, weights))

    def _rescue(self, routing: Routing, call: LayerCall, chosen: Chosen, owed: Float32Array | None) -> list[Part]:
        """Ask once more, elsewhere, for the tokens that would go without any expert."""
        wanted = chosen.weights.sum(axis=1)
        arrived = wanted if owed is None else wanted - owed
        empty = np.flatnonzero((call.demand.weights.sum(axis=1) > 0) & (arrived <= NOTHING * wanted))
        if not empty.size:
            return []
        available = self.observed.health.available(routing.devices, self.observed.device_of(routing, call.layer))
        replacement = substitute(call.demand, empty, available)
        parts = [] if replacement is None else self._ask_again(routing, call, empty, replacement)
        if empty.size == len(call.tokens) and not any(part.reply.result for part in parts):
            raise ExpertsUnavailableError(f"layer {call.layer}: none of its experts answered, and no other could")
        return parts

    def _ask_again(
        self, routing: Routing, call: LayerCall, rows: npt.NDArray[np.integer[Any]], chosen: Chosen
    ) -> list[Part]:
        """Ask for some of the tokens once more, elsewhere."""
        parts = _of_rows(self._ask(routing, call.of(rows), chosen), rows)
        for part in parts:
            for caller, _ in call.callers.among(part.token_rows):
                caller.ledger.retries += 1
        return parts

    def _scale(self, chosen: Chosen, owed: Float32Array | None) -> Float32Array | None:
        """(tokens,) factor that makes up for what did not come, where the model wants it so."""
        if owed is None or not self.rules.renormalise:
            return None
        wanted = chosen.weights.sum(axis=1)
        arrived = wanted - owed
        partly = (owed > 0) & (arrived > NOTHING * wanted)
        scale: Float32Array = np.where(partly, wanted / np.where(partly, arrived, 1), 1).astype(np.float32)
        return scale


def _longest(call: LayerCall) -> int:
    """The most tokens of one request: all are computed together, and each request has its budget."""
    return max(call.callers.sizes)


def _ledger(call: LayerCall) -> Ledger:
    """Of a call for one request."""
    (caller,) = call.callers.each
    return caller.ledger


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
