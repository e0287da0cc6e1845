"""Waits for experts that are lost on all devices, until they have been loaded elsewhere.

The request's greenlet is parked meanwhile, so other requests go on. The wait is bounded: between two tokens of an
answer a client waits no longer than it was told, and then gets the error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from wdmoe.arrays import Float32Array
from wdmoe.errors import CancelledRequestError, ExpertsUnavailableError
from wdmoe.layer_call import Callers, LayerCall
from wdmoe.transport.routing import Routing

LOOK_EVERY_S = 0.05
TELL_EVERY_S = 3.0


class WaitForExperts:
    """Runs layers, again after a while where no expert was left. Used by the model thread only."""

    def __init__(
        self,
        serve: Callable[[LayerCall], Float32Array],
        whole: Callable[[int], bool],
        routing: Callable[[], Routing],
        pause: Callable[[float], None],
    ) -> None:
        """All are called on the model thread.

        Args:
            serve: computes a layer, or raises ExpertsUnavailableError.
            whole: whether all experts of a layer may be asked now.
            routing: the newest table.
            pause: parks the greenlet of the request for some seconds.
        """
        self._serve = serve
        self._whole = whole
        self._routing = routing
        self._pause = pause
        # Layers that lost every expert. Until all of them are back, who needs one waits for the whole layer: what the
        # first of its experts could answer would be far from the model's answer.
        self._lost: set[int] = set()

    def run(self, call: LayerCall, longest_s: float) -> Float32Array:
        """Compute a layer, at the latest after so many seconds of waiting since the last token.

        Raises:
            ExpertsUnavailableError: not one of its experts came back, or this base station never served them all.
            CancelledRequestError: whoever asked went away meanwhile.
        """
        while True:
            if call.layer in self._lost and not self._whole(call.layer):
                self._wait(call, longest_s)
            ledgers = [caller.ledger for caller in call.callers.each]
            unspent = [ledger.unspent for ledger in ledgers]
            try:
                out = self._serve(call)
            except ExpertsUnavailableError as error:
                for ledger, before in zip(ledgers, unspent, strict=True):
                    ledger.unspent = before
                if not longest_s or not self._routing().was_served:
                    raise
                if _waited_s(call.callers) >= longest_s:
                    raise ExpertsUnavailableError(f"{error}; nor for {longest_s:g} s after") from error
                self._lost.add(call.layer)
                call = replace(call, meanwhile=None)  # that was done
            else:
                self._lost.discard(call.layer)
                return out

    def _wait(self, call: LayerCall, longest_s: float) -> None:
        """Wait until a layer is whole, or the time is over; then what there is must do, for others too."""
        begun_s = told_s = time.monotonic()
        left_s = longest_s - _waited_s(call.callers)
        try:
            while not self._whole(call.layer):
                now_s = time.monotonic()
                if all(caller.ledger.cancelled for caller in call.callers.each):
                    raise CancelledRequestError("the client went away")
                if now_s >= told_s:
                    _tell(call.callers, begun_s + left_s - now_s)
                    told_s = now_s + TELL_EVERY_S
                if now_s >= begun_s + left_s:
                    self._lost.discard(call.layer)
                    return
                self._pause(min(LOOK_EVERY_S, begun_s + left_s - now_s))
        finally:
            for caller in call.callers.each:
                caller.ledger.waited(time.monotonic() - begun_s)


def _waited_s(callers: Callers) -> float:
    """Since the last token: of who waited longest, as all of a call wait together and end together."""
    return max(caller.ledger.step_waited_s for caller in callers.each)


def _tell(callers: Callers, longest_s: float) -> None:
    for caller in callers.each:
        if caller.client is not None:
            caller.client.tell_waiting(longest_s)
