"""One pass for everybody: the next tokens of all active requests go through the model together.

A request asks for its next scores by `Passes.step`, which parks its greenlet. Whoever drives takes all that was asked
for, runs it as one pass, and wakes those who have their scores: so a layer costs one message for each device, whatever
the number of requests. Of prompts a pass takes as much as `Pace` allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from greenlet import getcurrent, greenlet

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.graphs.alternation import Alternation
from wdmoe.backbone.graphs.cache import Row
from wdmoe.backbone.graphs.pace import Pace, shares
from wdmoe.backbone.graphs.running import GraphModel, RunExperts
from wdmoe.backbone.graphs.ways import Span
from wdmoe.errors import CancelledRequestError
from wdmoe.layer_call import Caller, Callers, Demand, LayerCall

RunLayer = Callable[[LayerCall], Float32Array]
COMPANY_S = 0.004  # that an idle model waits after each request for others that come with it,
MOST_COMPANY_S = 0.025  # and in all


class Turns(Protocol):
    """Greenlets of one thread that take turns: an `Exchange`."""

    def spawn(self, work: Callable[[], None]) -> None:
        """Start `work` in a greenlet of its own, soon."""
        ...

    def park(self) -> None:
        """Let others run until somebody resumes this one."""
        ...

    def resume(self, waiter: greenlet) -> None:
        """Have a parked greenlet go on, soon."""
        ...

    def pause(self, seconds: float) -> None:
        """Let others run for a while."""
        ...


@dataclass(slots=True, eq=False)
class _Wish:
    """Tokens of a request that are to be computed."""

    ids: Int32Array
    row: Row
    caller: Caller
    every: bool  # the scores of all of them are wanted, not only of the last
    greenlet: greenlet
    asked_s: float
    done: int = 0  # tokens of it that were computed
    scores: list[Float32Array] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def left(self) -> int:
        return len(self.ids) - self.done

    @property
    def is_answer(self) -> bool:
        """One token, as an answer's: it goes into every pass."""
        return len(self.ids) == 1


@dataclass(frozen=True, slots=True, eq=False)
class _Taken:
    """The part of a wish that a pass computes."""

    wish: _Wish
    tokens: int


@dataclass(slots=True)
class _Away:
    seconds: float = 0.0  # that a pass waited for devices


class Passes:
    """Used on the model thread only."""

    def __init__(
        self, model: GraphModel, run: RunLayer, turns: Turns, most_prompt_tokens: int, alternates: bool = True
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: computes.
            run: computes the experts of a layer.
            turns: of the requests' greenlets.
            most_prompt_tokens: of a pass.
            alternates: whether two passes may be under way, where that pays.
        """
        self._model = model
        self._run_layer = run
        self._turns = turns
        self._last = model.last_experts
        self._pace = Pace(most_prompt_tokens)
        self._alternation = Alternation(allowed=alternates)
        self._wishes: list[_Wish] = []
        self._drivers = 0
        self._under_way: list[_Taken] = []  # in passes now

    def step(self, ids: Int32Array, row: Row, caller: Caller, every: bool = False) -> Float32Array:
        """Compute the next tokens of a request.

        Args:
            ids: (n,) of them, at least one.
            row: of the request; counts them in.
            caller: the request.
            every: give the scores after each, not only after the last.
        Returns:
            (1 or n, vocabulary) scores.
        Raises:
            CancelledRequestError: nobody waits for this request any more.
            ExpertsUnavailableError: a layer has no expert left.
        """
        wish = _Wish(ids, row, caller, every, getcurrent(), time.monotonic())
        self._wishes.append(wish)
        self._call_driver()
        while wish.left and wish.error is None:
            self._turns.park()
        if wish.error is not None:
            raise wish.error
        return wish.scores[-1] if len(wish.scores) == 1 else np.concatenate(wish.scores)

    # ---- the driver

    def _call_driver(self) -> None:
        if self._drivers < self._alternation.groups:
            self._drivers += 1
            self._turns.spawn(self._drive)

    def _drive(self) -> None:
        """Pass after pass, as long as anything is wished for."""
        if not self._under_way:
            self._wait_for_company()
        while taken := self._gather():
            self._under_way += taken
            if self._wishes:
                self._call_driver()
            over = self._compute(taken)
            self._under_way = [part for part in self._under_way if part not in taken]
            for wish in over:
                self._turns.resume(wish.greenlet)
            self._turns.resume(getcurrent())  # after them: they ask for their next tokens first
            self._turns.park()
            if self._drivers > self._alternation.groups:
                break
        self._drivers -= 1
        if self._wishes:
            self._call_driver()

    def _wait_for_company(self) -> None:
        """Requests that come together have their first tokens together: the first would else be alone in a pass."""
        begun_s = now_s = time.monotonic()
        while self._wishes and now_s < begun_s + MOST_COMPANY_S:
            left_s = max(wish.asked_s for wish in self._wishes) + COMPANY_S - now_s
            if left_s <= 0:
                return
            self._turns.pause(left_s)
            now_s = time.monotonic()

    def _gather(self) -> list[_Taken]:
        """What the next pass computes: answers' tokens, and a share of each prompt."""
        self._drop_cancelled()
        streams = self._answers
        active = len(self._wishes) + len(self._under_way)
        most = -(-active // self._alternation.groups)
        wishes, self._wishes = self._wishes[:most], self._wishes[most:]
        answers = [wish for wish in wishes if wish.is_answer]
        prompts = sorted((wish for wish in wishes if not wish.is_answer), key=lambda wish: wish.asked_s)
        given = shares(self._pace.room(streams), [wish.left for wish in prompts])
        parts = [_Taken(wish, tokens) for wish, tokens in zip(prompts, given, strict=True)]
        self._wishes += [part.wish for part in parts if not part.tokens]
        return [*(_Taken(wish, 1) for wish in answers), *(part for part in parts if part.tokens)]

    @property
    def _answers(self) -> int:
        """Requests that are answered now, in all groups."""
        return sum(wish.is_answer for wish in (*self._wishes, *(part.wish for part in self._under_way)))

    def _drop_cancelled(self) -> None:
        for wish in [wish for wish in self._wishes if wish.caller.ledger.cancelled]:
            self._wishes.remove(wish)
            wish.error = CancelledRequestError("the client went away")
            self._turns.resume(wish.greenlet)

    def _compute(self, taken: Sequence[_Taken]) -> list[_Wish]:
        """Run a pass. Returns the wishes that are over by it; what is left of the others is wished for again."""
        begun_s = time.monotonic()
        for part in taken:
            part.wish.caller.ledger.wait_s += begun_s - part.wish.asked_s  # behind other requests
        ordered, spans = _arranged(taken)
        away = _Away()
        try:
            self._through(ordered, spans, away)
        except BaseException as error:  # of whatever kind: those who asked hear of it, not the driver
            for part in ordered:
                part.wish.error = error
            return [part.wish for part in ordered]
        now_s = time.monotonic()
        rows = sum(part.wish.is_answer for part in ordered)
        tokens = sum(part.tokens for part in ordered)
        if len(self._under_way) == len(ordered):  # no other pass was computed meanwhile
            self._pace.took(rows, tokens - rows, now_s - begun_s)
        self._alternation.took(self._answers, rows, away.seconds, now_s - begun_s, now_s)
        unfinished = [part.wish for part in ordered if part.wish.left]
        for wish in unfinished:
            wish.asked_s = now_s
        self._wishes += unfinished
        return [part.wish for part in ordered if not part.wish.left]

    def _through(self, parts: Sequence[_Taken], spans: Sequence[Span], away: _Away) -> None:
        ids = np.concatenate([part.wish.ids[part.wish.done : part.wish.done + part.tokens] for part in parts])
        ends = np.cumsum([part.tokens for part in parts]).tolist()
        wanted = [_wanted(part, end) for part, end in zip(parts, ends, strict=True)]
        callers = Callers([part.wish.caller for part in parts], [part.tokens for part in parts])
        scored = np.concatenate(wanted).astype(np.int32)
        scores = self._model.run(ids, spans, self._experts(callers, away), scored)
        begin = 0
        for part, places in zip(parts, wanted, strict=True):
            part.wish.done += part.tokens
            if len(places):
                part.wish.scores.append(scores[begin : begin + len(places)])
                begin += len(places)

    def _experts(self, callers: Callers, away: _Away) -> RunExperts:
        for caller in callers.each:
            caller.ledger.open_pass()

        def experts(
            layer: int, tokens: Float32Array, demand: Demand, meanwhile: Callable[[], object] | None
        ) -> Float32Array:
            if all(caller.ledger.cancelled for caller in callers.each):  # the layers may each wait for a deadline
                raise CancelledRequestError("the client went away")
            begun_s = time.monotonic()
            try:
                return self._run_layer(LayerCall(layer, tokens, demand, callers, meanwhile, more=layer < self._last))
            finally:
                away.seconds += time.monotonic() - begun_s

        return experts


def _wanted(part: _Taken, end: int) -> Any:
    """Places in the pass whose scores a wish wants."""
    if part.wish.every:
        return np.arange(end - part.tokens, end)
    return np.arange(end - 1, end) if part.tokens == part.wish.left else np.arange(0)


def _arranged(taken: Sequence[_Taken]) -> tuple[list[_Taken], list[Span]]:
    """Neighbouring rows with one token each stand together; the others alone."""
    parts = sorted(taken, key=lambda part: (part.tokens > 1, id(part.wish.row.slab), part.wish.row.index))
    spans: list[Span] = []
    for part in parts:
        row, last = part.wish.row, spans[-1] if spans else None
        if last is not None and part.tokens == last.tokens == 1 and _follows(row, last.rows[-1]):
            spans[-1] = Span([*last.rows, row], 1)
        else:
            spans.append(Span([row], part.tokens))
    return parts, spans


def _follows(row: Row, other: Row) -> bool:
    return row.slab is other.slab and row.index == other.index + 1
