"""Asks devices for their parts of a layer: by what was observed of them, with a hedge where an answer is late."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wdmoe.arrays import Int32Array
from wdmoe.layer_call import Callers, LayerCall
from wdmoe.moe.account import Busy, Told, book
from wdmoe.moe.dispatch import Band, Hedging, Outcome, Part, PartOfBand, Work, dispatch, try_out
from wdmoe.moe.hedge_budget import HedgeBudget
from wdmoe.moe.observed import Observed
from wdmoe.moe.select import Chosen
from wdmoe.moe.verification.inspector import Unverified
from wdmoe.transport.exchange import Exchange, Expected
from wdmoe.transport.routing import DeviceRoute, Routing

UNKNOWN = 0.5  # share of a deadline after which a copy is asked where no device's times are known yet
TRIAL_BAND = 0.05  # share of a band for the trial of a slow device
ANSWER_TOKENS = 4  # orders of a layer with more are a prompt's, or those of many answers: as large


def is_prompt(call: LayerCall) -> bool:
    """Whether it has as many tokens as a prompt, or as few as an answer."""
    return len(call.tokens) > ANSWER_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """What is asked, and what it is waited for and sent with."""

    work: Work
    other_of: Int32Array  # (experts,) who else has each
    prompt: bool
    wait_s: float
    band: Band | None
    hedging: Hedging


class Asking:
    """One exchange with the devices after the other. Used by the model thread only."""

    def __init__(self, exchange: Exchange, observed: Observed) -> None:
        self._exchange = exchange
        self._observed = observed
        self._budget = HedgeBudget()
        self._owed: list[Callable[[], None]] = []  # what is to be learnt and booked of former exchanges
        exchange.on_aside = observed.learn_aside

    def ask(self, routing: Routing, call: LayerCall, chosen: Chosen, wait_s: float, band: Band | None) -> list[Part]:
        """Have what was chosen computed. What that took is learnt and booked by `settle`, or while the next is awaited.

        Args:
            wait_s: the longest time to wait.
            band: that the devices share; None: each has a link of its own.
        """
        started_s, busy = time.monotonic(), Busy(functools.partial(self._meanwhile, call.meanwhile))
        question = self._question(routing, call, chosen, wait_s, band)
        if self._observed.lateness.slow and self._try_slow(question) and band is not None:
            band = PartOfBand(band, (1 - TRIAL_BAND) * band.total_hz)
        outcome = dispatch(self._exchange, question.work, wait_s, busy, band, question.hedging)
        self._budget.earn(len(outcome.parts))
        unverified = self._observed.judge(outcome, call.callers)
        elapsed_s = time.monotonic() - started_s
        self._owed.append(lambda: self._learn(outcome, call.callers, unverified, elapsed_s, busy.seconds))
        return outcome.parts

    def settle(self) -> None:
        """Learn and book what is left of former exchanges."""
        owed, self._owed = self._owed, []
        for each in owed:
            each()

    def _meanwhile(self, work: Callable[[], object] | None) -> None:
        self.settle()
        if work is not None:
            work()

    def _learn(
        self, outcome: Outcome, callers: Callers, unverified: Sequence[Unverified], elapsed_s: float, busy_s: float
    ) -> None:
        self._observed.learn(outcome, callers, unverified)
        served, in_vain = (
            [Told(part.device.name, part.token_rows, part.reply) for part in parts]
            for parts in (outcome.parts, outcome.losers)
        )
        book(callers, served, in_vain, elapsed_s, busy_s)
        for part in outcome.hedges:
            for caller, _ in callers.among(part.token_rows):
                caller.ledger.hedges += 1

    def _question(
        self, routing: Routing, call: LayerCall, chosen: Chosen, wait_s: float, band: Band | None
    ) -> _Question:
        seen, prompt = self._observed, is_prompt(call)
        device_of = seen.device_of(routing, call.layer, prompt)
        other_of = seen.other_of(routing, call.layer, device_of)
        work = Work(call.layer, call.tokens, chosen.experts, chosen.weights, routing.devices, device_of)
        hedging = Hedging(
            copy_of=seen.may_be_asked(routing, other_of),
            expect=self._expect(prompt, UNKNOWN * wait_s),
            spend=self._budget.spend,
        )
        return _Question(work, other_of, prompt, wait_s, band, hedging)

    def _expect(self, prompt: bool, unknown_s: float) -> Callable[[DeviceRoute, DeviceRoute, int, float], Expected]:
        """As `Hedging.expect`, for orders of a prompt or of an answer."""
        expect, owed_s = self._observed.lateness.expect, self._exchange.owed_s
        return lambda device, copy, size, air_s: expect(
            device.route,
            copy.route,
            size,
            owed_s=owed_s(device.route),
            air_s=air_s,
            prompt=prompt,
            unknown_s=unknown_s,
        )

    def _try_slow(self, question: _Question) -> bool:
        """Ask slow devices whose trial is due for what others are asked for now. Whether any was asked."""
        now_s, asked = time.monotonic(), False
        work, other_of, band = question.work, question.other_of, question.band
        hz = 0.0 if band is None else TRIAL_BAND * band.total_hz
        for index in np.unique(other_of[other_of >= 0]).tolist():
            its = replace(work, device_of=np.where(other_of == index, other_of, np.int32(-1)))
            wanted = (its.device_of[work.experts[work.experts >= 0]] >= 0).any()
            if wanted and self._observed.lateness.trial_due(work.devices[index].route, question.prompt, now_s):
                server = work.devices[int(work.device_of[other_of == index][0])]
                asked |= try_out(self._exchange, its, server, question.wait_s, question.hedging, band, hz)
        return asked
