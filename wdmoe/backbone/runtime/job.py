"""A request that was admitted, and how each of its tokens is told to whoever waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from wdmoe.backbone.runtime.detokenizer import TextStream
from wdmoe.backbone.text.tokenizer import TextTokenizer
from wdmoe.receipt import Ledger
from wdmoe.records import AnswerEvent, Finished, Sampling, TextDelta, Waiting

Event: TypeAlias = AnswerEvent | Exception


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A request that was admitted. `emit` is thread-safe; the last event is a `Finished` or the exception why not."""

    prompt_ids: tuple[int, ...]
    begun: tuple[int, ...] = ()  # the answer so far
    sampling: Sampling
    ledger: Ledger
    emit: Callable[[Event], None]

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.ledger.cancelled

    def cancel(self) -> None:
        """Ask it to end after the layer that is computed now. Thread-safe."""
        self.ledger.cancelled = True

    def tell_waiting(self, longest_s: float) -> None:
        """See `wdmoe.layer_call.Client`."""
        self.emit(Waiting(text=f"waiting for experts that were lost, {max(longest_s, 0.0):.0f} s at most"))


def end_tokens(stated: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a text, from what a model's config states as `eos_token_id`."""
    if stated is None:
        return ()
    return (stated,) if isinstance(stated, int) else tuple(stated)


class Telling:
    """Turns the tokens of a job into its events."""

    def __init__(self, job: Job, tokenizer: TextTokenizer, eos: tuple[int, ...]) -> None:
        """`eos`: the tokens that end a text; none of them does where the job wishes so."""
        self._job = job
        self._eos = () if job.sampling.ignore_eos else eos
        self._text = TextStream(tokenizer, job.sampling.stop)
        self._last = -1
        for token_id in job.begun:  # told already, but for what was held back
            self._text.feed(token_id)
            self._last = token_id

    @property
    def ended(self) -> bool:
        """By a stop sequence or by an end of text."""
        return self._text.stopped or self._last in self._eos

    @property
    def over(self) -> bool:
        """Nothing more is to be made: it ended, or it is as long as it may be."""
        return self.ended or self._job.ledger.completion_tokens >= self._job.sampling.max_tokens

    def tell(self, token_id: int) -> None:
        """The next token."""
        ledger = self._job.ledger
        if not ledger.completion_tokens:
            ledger.first_token_s = time.monotonic() - ledger.started_s
        ledger.completion_tokens += 1
        self._last = token_id
        text = self._text.feed(token_id)
        devices, layers = ledger.close_step()
        delta = TextDelta(
            text=text,
            token_id=token_id,
            devices=devices,
            layers=layers,
            dropped_weight=ledger.mean_dropped,
            lost_weight=ledger.mean_lost,
        )
        self._job.emit(delta)

    def finish(self) -> Finished:
        """The rest of the text, and the last event."""
        rest = self._text.flush()
        if rest:
            self._job.emit(TextDelta(text=rest, token_id=-1))
        return Finished(reason="stop" if self.ended else "length", receipt=self._job.ledger.close())
