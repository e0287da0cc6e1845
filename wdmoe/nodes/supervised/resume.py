"""What to ask of a new engine when the one that worked on an answer has ended, and the receipt of both together."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from wdmoe.receipt import Receipt
from wdmoe.records import AnswerEvent, Finished, GenerationRequest, TextDelta, Waiting

_SEED_BITS = 63


@dataclass(slots=True, eq=False)
class Progress:
    """One answer over the engines that worked on it. Mutable: it takes in the events as they come."""

    request: GenerationRequest
    clock: Callable[[], float] = time.monotonic
    tokens: list[int] = field(default_factory=list)  # of the answer, so far
    restarts: int = 0
    lost_weight: float = 0.0  # of the answer up to the last restart, as in a receipt
    _begun_s: float = field(init=False)
    _first_token_s: float = 0.0
    _last: TextDelta | None = None

    def __post_init__(self) -> None:
        self._begun_s = self.clock()
        if self.request.sampling.temperature > 0 and self.request.sampling.seed is None:
            # Whoever goes on with this answer has to draw what would have been drawn.
            sampling = replace(self.request.sampling, seed=secrets.randbits(_SEED_BITS))
            self.request = replace(self.request, sampling=sampling)

    @property
    def rest(self) -> GenerationRequest:
        """What is left to ask for."""
        return replace(self.request, begun=tuple(self.tokens))

    def take(self, event: AnswerEvent) -> AnswerEvent:
        """An event of the engine of the moment, as the client shall see it."""
        if isinstance(event, Finished):
            return replace(event, receipt=self._whole(event.receipt)) if self.restarts else event
        if isinstance(event, Waiting):
            return event
        if event.token_id >= 0:
            if not self.tokens:
                self._first_token_s = self.clock() - self._begun_s
            self.tokens.append(event.token_id)
        self._last = event
        return event

    def restarted(self) -> None:
        """The engine has ended, and another one goes on."""
        self.restarts += 1
        if self._last is not None:
            self.lost_weight = max(self.lost_weight, self._last.lost_weight)

    def _whole(self, last: Receipt) -> Receipt:
        """The receipt of all of it.

        The last engine read all tokens again, so its weights are those of the whole answer as it read it. What the
        former ones lost for the tokens that they made is added, their bytes and stages went with them: the time in
        which the client waited for them counts as waiting.
        """
        elapsed_s = self.clock() - self._begun_s
        gone_s = max(elapsed_s - last.elapsed_s, 0.0)
        return replace(
            last,
            restarts=self.restarts,
            degraded=last.degraded or self.lost_weight > 0,
            lost_weight=max(last.lost_weight, self.lost_weight),
            first_token_s=self._first_token_s,
            elapsed_s=elapsed_s,
            stages=replace(last.stages, wait=last.stages.wait + gone_s),
        )
