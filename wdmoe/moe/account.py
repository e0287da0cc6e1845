"""Books what a layer cost and lost in the accounts of its requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.layer_call import Callers
from wdmoe.receipt import StageSeconds
from wdmoe.transport.exchange import Reply


class Busy:
    """Runs what the base station can do meanwhile, and takes the time."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self.seconds = 0.0

    def __call__(self) -> None:
        """Run it."""
        started_s = time.monotonic()
        self._work()
        self.seconds = time.monotonic() - started_s


class Told(NamedTuple):
    """What a device was asked for, and what it said."""

    device: str
    rows: Int32Array  # (n,) the layer's tokens in it
    reply: Reply


def book(callers: Callers, served: Sequence[Told], in_vain: Sequence[Told], elapsed_s: float, busy_s: float) -> None:
    """Write down what a layer's exchange took: to each request the whole time, and its part of the bytes.

    Args:
        callers: whose tokens these are.
        served: each part of the layer once.
        in_vain: what was asked besides, and was too late.
        elapsed_s: that the exchange took,
        busy_s: and the part of it in which the base station computed something else.
    """
    stages = split([told.reply for told in served], elapsed_s - busy_s, busy_s)
    for caller in callers.each:
        ledger = caller.ledger
        ledger.wire_down_s += stages.wire_down
        ledger.device_compute_s += stages.device_compute
        ledger.wire_up_s += stages.wire_up
        ledger.wait_s += stages.wait
    for told in served:
        _book_bytes(callers, told)
        if told.reply.result is not None:
            for caller, _ in callers.among(told.rows):
                caller.ledger.step_devices[told.device] += 1
    for told in in_vain:
        _book_bytes(callers, told)


def _book_bytes(callers: Callers, told: Told) -> None:
    """To each request by its tokens, so that all together have what was sent."""
    begin, tokens, reply = 0, len(told.rows), told.reply
    for caller, count in callers.among(told.rows):
        end = begin + count
        caller.ledger.bytes_down += reply.bytes_down * end // tokens - reply.bytes_down * begin // tokens
        caller.ledger.bytes_up += reply.bytes_up * end // tokens - reply.bytes_up * begin // tokens
        begin = end


def split(replies: Sequence[Reply], elapsed_s: float, busy_s: float) -> StageSeconds:
    """Split the time that the base station waited by what the device that answered last says of it.

    What passed while the base station computed something else (`busy_s`) hides part of the trip: it counts as the base
    station's, and the wire is what remains of the trip without it.
    """
    answered = (reply for reply in replies if reply.result is not None)
    last = max(answered, key=lambda reply: reply.answered_s, default=None)
    if last is None or last.result is None:
        return StageSeconds(wait=elapsed_s)
    result = last.result
    trip_s = last.answered_s - last.sent_s
    # Clocks are not shared, so what neither side saw is the wire's, half each way.
    seen_s = result.residence_s + result.link_down_s + result.link_up_s
    wire_s = max(trip_s - seen_s - busy_s, 0.0)
    left_s = max(elapsed_s - wire_s, 0.0)
    link_s = min(result.link_down_s + result.link_up_s, left_s)
    down_share = result.link_down_s / max(result.link_down_s + result.link_up_s, 1e-12)
    down_s, up_s = link_s * down_share + wire_s / 2, link_s * (1 - down_share) + wire_s / 2
    compute_s = min(result.compute_s, left_s - link_s)
    wait_s = max(elapsed_s - down_s - up_s - compute_s, 0.0)
    return StageSeconds(wire_down=down_s, device_compute=compute_s, wire_up=up_s, wait=wait_s)


def record(
    callers: Callers,
    weights: Float32Array,
    dropped: Float32Array | None,
    lost: Float32Array | None,
    owed: Float32Array | None,
) -> None:
    """Write down what was dropped on purpose and what was lost in a layer.

    Args:
        callers: whose tokens these are.
        weights: (tokens, top_k) what was asked for.
        dropped: (tokens,) share of the gate weight that the policy left out; None: nothing.
        lost: (tokens,) share that no device serves; None: nothing.
        owed: (tokens,) weight that was asked for and did not come; None: nothing.
    """
    missing = _missing(weights, lost, owed)
    for caller, its in callers.parts():
        ledger = caller.ledger
        ledger.token_layers += its.stop - its.start
        if dropped is not None:
            ledger.dropped_weight += float(dropped[its].sum())
        if missing is not None:
            ledger.lost_weight += float(missing[its].sum())
            ledger.dropped_weight += float(missing[its].sum())
            ledger.step_degraded = max(ledger.step_degraded, int(np.count_nonzero(missing[its])))


def _missing(weights: Float32Array, lost: Float32Array | None, owed: Float32Array | None) -> Float32Array | None:
    """(tokens,) share of the gate weight that was not computed without anybody's wish; None: nothing."""
    if owed is None:
        return lost
    missing = np.zeros(len(weights), np.float32) if lost is None else lost
    wanted = weights.sum(axis=1)
    found: Float32Array = (missing + (1 - missing) * owed / np.where(wanted > 0, wanted, 1)).astype(np.float32)
    return found
