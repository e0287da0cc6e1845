"""Books what a layer cost and lost in the account of its request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from wdmoe.arrays import Float32Array
from wdmoe.receipt import Ledger
from wdmoe.transport.exchange import Reply


class Busy:
    """Runs what the base station can do meanwhile, and takes the time."""

    def __init__(self, work: Callable[[], object] | None) -> None:
        self._work = work
        self.seconds = 0.0

    def __call__(self) -> None:
        """Run it, where there is any."""
        if self._work is not None:
            started_s = time.monotonic()
            self._work()
            self.seconds = time.monotonic() - started_s


def book(ledger: Ledger, served: Sequence[tuple[str, Reply]], elapsed_s: float, busy_s: float) -> None:
    """Split the time the base station waited by what the device that answered last says of it.

    What passed while the base station computed something else (`busy_s`) hides part of the trip: it counts as the base
    station's, and the wire is what remains of the trip without it.
    """
    elapsed_s -= busy_s
    last = None
    for device, reply in served:
        ledger.bytes_down += reply.bytes_down
        ledger.bytes_up += reply.bytes_up
        if reply.result is not None:
            ledger.step_devices[device] += 1
            if last is None or reply.answered_s > last.answered_s:
                last = reply
    if last is None or last.result is None:
        ledger.wait_s += elapsed_s
        return
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
    ledger.wire_down_s += down_s
    ledger.wire_up_s += up_s
    ledger.device_compute_s += compute_s
    ledger.wait_s += max(elapsed_s - down_s - up_s - compute_s, 0.0)


def record(
    ledger: Ledger,
    weights: Float32Array,
    dropped: Float32Array | None,
    lost: Float32Array | None,
    owed: Float32Array | None,
) -> None:
    """Write down what was dropped on purpose and what was lost in a layer.

    Args:
        ledger: of the request.
        weights: (tokens, top_k) what was asked for.
        dropped: (tokens,) share of the gate weight that the policy left out; None: nothing.
        lost: (tokens,) share that no device serves; None: nothing.
        owed: (tokens,) weight that was asked for and did not come; None: nothing.
    """
    tokens = len(weights)
    ledger.token_layers += tokens
    if dropped is not None:
        ledger.dropped_weight += float(dropped.sum())
    if lost is None and owed is None:
        return
    missing = np.zeros(tokens, np.float32) if lost is None else lost
    if owed is not None:
        wanted = weights.sum(axis=1)
        missing = (missing + (1 - missing) * owed / np.where(wanted > 0, wanted, 1)).astype(np.float32)
    ledger.lost_weight += float(missing.sum())
    ledger.dropped_weight += float(missing.sum())
    ledger.step_degraded = max(ledger.step_degraded, int(np.count_nonzero(missing)))
