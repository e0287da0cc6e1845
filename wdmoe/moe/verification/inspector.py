"""Every answer of a device passes here before it counts. Used by the model thread only, but for `figures`.

norms in band? -> trust: take, look later, look now -> the answer, the right one in its place, or nothing
"""

from __future__ import annotations

import functools
import logging
import random
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from wdmoe.arrays import Int32Array
from wdmoe.moe.verification.norm_band import NormBand, Oddity
from wdmoe.moe.verification.quarantine import without
from wdmoe.moe.verification.recompute import Sample, sample
from wdmoe.moe.verification.trust import PROBATION, Look, Standing, look
from wdmoe.moe.verification.verifier import SETTLE_S, Finding, Verdict, Verifier
from wdmoe.receipt import Ledger
from wdmoe.solver.combining import is_finite
from wdmoe.transport.codec.messages import Activations
from wdmoe.transport.exchange import Order
from wdmoe.transport.routing import DeviceRoute, Routing

log = logging.getLogger(__name__)

ROWS_NOW = 16  # of a prompt's answer that are computed again where it waits for that
ROWS_LATER = 2
PUT_OFF = 12  # answers of each device in a request, drawn evenly, and the newest: computed again before it ends
PROBATION_S = 1.0  # that a connection's first answers may wait in all: experts can be large, and the station slow
REMEMBERED_REQUESTS = 64  # that are named in the log if a device they used is found to lie
REMEMBERED_DEVICES = 4096  # bounds memory where keys are free
NOT_FINITE = "answered with values that are not finite"
ODD_WORDS = {Oddity.TOO_SMALL: "too small to be true", Oddity.TOO_LARGE: "too large to be true"}

# Nobody outside sees its draws, so nobody foresees them. One from the system itself took 22 us, in each layer.
_DRAW = random.Random(secrets.randbits(256)).random  # noqa: S311


class DeviceFigures(NamedTuple):
    """Of one device, for people."""

    verified: int = 0  # answers computed again
    lies: int = 0
    watched: bool = False
    quarantined: bool = False


@dataclass(slots=True)
class _Device:
    name: str
    route: bytes = b""
    answers: int = 0
    fresh: int = 0  # of them over this connection
    waited_s: float = 0.0  # for a second computation
    verified: int = 0
    standing: Standing = field(default_factory=Standing)


class Unverified(NamedTuple):
    """What is known of an answer before anybody computes it again."""

    route: DeviceRoute
    device: _Device
    order: Order
    partial: Activations
    ledgers: tuple[Ledger, ...]  # of the requests that it is for
    odd: Oddity
    row: int  # that is odd


class Judged(NamedTuple):
    """What counts of an answer: `partial`, or nothing for a `reason`."""

    partial: Activations | None
    reason: str = ""
    unverified: Unverified | None = None  # for `Inspector.put_off`: nobody has computed all of it again


@dataclass(slots=True)
class InspectorCounters:
    """For `/metrics`."""

    verified_answers: int = 0  # computed again, with a verdict
    odd_answers: int = 0  # with a norm out of band, or not finite
    lies: int = 0
    unverifiable_answers: int = 0  # computed again without a verdict


Barred = Callable[[DeviceRoute, str], None]  # device, reason; on the model thread


class Inspector:
    """Without a verifier it refuses what is not finite, and takes everything else."""

    def __init__(
        self,
        band: NormBand | None = None,
        verifier: Verifier | None = None,
        *,
        rate: float = 0.0,
        barred: Barred = lambda device, reason: None,
        quarantined: frozenset[str] = frozenset(),
        draw: Callable[[], float] = _DRAW,
    ) -> None:
        """Nothing is owned.

        Args:
            band: norms of honest answers.
            verifier: computes answers again.
            rate: share of the answers of a trusted device that is computed again, 0 to 1; 0: only odd ones are.
            barred: told of a device that is not asked any more.
            quarantined: device ids that are not asked from the start.
            draw: uniform in [0, 1); devices must not foresee it.
        """
        self._band = band
        self._verifier = verifier
        self._rate = rate
        self._barred = barred
        self._draw = draw
        self._devices: dict[str, _Device] = {}
        self._lies: Counter[str] = Counter()
        self._quarantined = quarantined
        self._allowed: tuple[Routing, frozenset[str], Routing] | None = None
        self._requests: deque[Ledger] = deque(maxlen=REMEMBERED_REQUESTS)
        self.counters = InspectorCounters()

    # ---- what the layer asks

    def allowed(self, routing: Routing) -> Routing:
        """The table without devices in quarantine; the same object as long as nothing changed."""
        if not self._quarantined:
            return routing
        known = self._allowed
        if known is None or known[0] is not routing or known[1] is not self._quarantined:
            self._allowed = known = (routing, self._quarantined, without(routing, self._quarantined))
        return known[2]

    def judge(self, route: DeviceRoute, order: Order, partial: Activations, ledgers: tuple[Ledger, ...]) -> Judged:
        """Look at an answer, as closely as its device deserves."""
        device = self._device(route)
        odd, row = self._oddity(order, partial)
        answer = Unverified(route, device, order, partial, ledgers, odd, row)
        number, fresh = device.answers, device.fresh
        device.answers, device.fresh = number + 1, fresh + 1
        if odd is Oddity.NOT_FINITE:
            self._lied(answer, NOT_FINITE)
            return Judged(None, NOT_FINITE)
        if self._verifier is None:
            return Judged(partial)
        doubtful = odd is not Oddity.NONE or device.standing.watched(number)
        if device.waited_s > PROBATION_S:
            fresh = max(fresh, PROBATION)
        how = look(self._rate, fresh, doubtful=doubtful, draw=self._draw())
        if how is Look.NOW:
            return self._look_now(self._verifier, answer)
        if how is Look.LATER:
            given = sample(order, partial, self._some(len(partial), ROWS_LATER))
            self._verifier.later(given, lambda verdict: self._learned(answer, given, verdict), ledgers)
        return self._taken(answer)

    def put_off(self, answer: Unverified) -> None:
        """Keep some of it, maybe, to be computed again before its requests end."""
        if self._verifier is None or self._rate <= 0:
            return
        looks = self._look_once(self._verifier, answer)
        for ledger in answer.ledgers:
            self._put_off(ledger, answer.route.device_id, looks)

    def malformed(self, route: DeviceRoute, order: Order, reason: str, ledgers: tuple[Ledger, ...]) -> None:
        """A device answered with something that no right answer looks like."""
        device = self._device(route)
        device.answers += 1
        self._lied(Unverified(route, device, order, order.tokens, ledgers, Oddity.NONE, 0), reason)

    def figures(self) -> Mapping[str, DeviceFigures]:
        """device id -> its figures. Any thread."""
        return {
            device_id: DeviceFigures(
                device.verified,
                device.standing.lies,
                device.standing.watched(device.answers),
                device.standing.quarantined,
            )
            for device_id, device in [*self._devices.items()]
        }

    @property
    def skipped(self) -> int:
        """Samples that were drawn and not computed again, because too many were waiting."""
        return 0 if self._verifier is None else self._verifier.skipped

    # ---- inside

    def _device(self, route: DeviceRoute) -> _Device:
        device = self._devices.get(route.device_id)
        if device is None:
            if len(self._devices) >= REMEMBERED_DEVICES:
                self._forget()
            device = self._devices[route.device_id] = _Device(route.name)
        if device.route != route.route:
            device.route, device.fresh, device.waited_s = route.route, 0, 0.0
        return device

    def _forget(self) -> None:
        """The longest known ones, of those that never lied where there are such."""
        harmless = [device_id for device_id, each in self._devices.items() if not each.standing.lies]
        for device_id in (harmless or [*self._devices])[: REMEMBERED_DEVICES // 4]:
            del self._devices[device_id]

    def _oddity(self, order: Order, partial: Activations) -> tuple[Oddity, int]:
        if self._band is None:
            return (Oddity.NONE if is_finite(partial) else Oddity.NOT_FINITE), 0
        found = self._band.oddity(order, partial)
        self.counters.odd_answers += found[0] is not Oddity.NONE
        return found

    def _some(self, rows: int, most: int, but: int = -1) -> Int32Array | None:
        """Rows to look at, drawn without a way to foresee them; None: all. `but` is among them."""
        if rows <= most:
            return None
        drawn = {int(self._draw() * rows) for _ in range(most)}
        return np.array(sorted(drawn | ({but} if but >= 0 else set())), np.int32)

    def _look_now(self, verifier: Verifier, answer: Unverified) -> Judged:
        """Compute it again before it counts: of a prompt, some rows, and all where one is wrong."""
        order, partial, odd = answer.order, answer.partial, answer.odd
        rows = self._some(len(partial), ROWS_NOW, -1 if odd is Oddity.NONE else answer.row)
        given = sample(order, partial, rows)
        started_s = time.monotonic()
        verdict = verifier.now(given)
        answer.device.waited_s += time.monotonic() - started_s
        self._learned(answer, given, verdict)
        if verdict.finding is Finding.LIE:
            right = verdict.right if rows is None else verifier.now(sample(order, partial, None)).right
            reason = "" if right is not None else "answered wrong, and what is right could not be computed here"
            return Judged(None if right is None else right.partial, reason)
        if verdict.finding is Finding.UNKNOWN and odd is not Oddity.NONE:
            return Judged(None, f"answered with an output {ODD_WORDS[odd]}, which could not be verified")
        if verdict.finding is Finding.UNKNOWN or rows is not None:
            return self._taken(answer)
        return Judged(partial)

    def _taken(self, answer: Unverified) -> Judged:
        """It counts, and nobody has computed all of it again."""
        for ledger in answer.ledgers:
            if not ledger.unverified:
                self._requests.append(ledger)
                if self._verifier is not None and self._rate > 0:
                    ledger.settle = functools.partial(self._settle, self._verifier, ledger)
            ledger.take_unverified(answer.route.device_id, self._lies)
        return Judged(answer.partial, unverified=answer)

    def _look_once(self, verifier: Verifier, answer: Unverified) -> Callable[[], None]:
        """Computes some of it again, when first called."""
        given: Sample | None = sample(answer.order, answer.partial, self._some(len(answer.partial), ROWS_LATER))

        def look_once() -> None:
            nonlocal given
            if given is not None:
                its, given = given, None  # before others run, who may have the same
                self._learned(answer, its, verifier.now(its))

        return look_once

    def _put_off(self, ledger: Ledger, device_id: str, newest: Callable[[], None]) -> None:
        """Keep an answer until its request ends, as the newest of its device, or maybe in place of an older one.

        Of the older ones each is as likely to be kept. So a device that lies in most of an answer is found while that
        is open, whatever its length, and one that lies from some point on is, too.
        """
        kept = ledger.put_off.setdefault(device_id, [newest])
        before, kept[0] = kept[0], newest
        older = ledger.unverified[device_id] - 1
        place = older if older <= PUT_OFF else 1 + int(self._draw() * older)
        if 0 < place <= PUT_OFF:
            kept[place : place + 1] = [before]

    def _settle(self, verifier: Verifier, ledger: Ledger) -> None:
        """Know what was sampled of a request and what was put off, as far as that takes no longer than a moment."""
        verifier.settle(ledger)
        until_s = time.monotonic() + SETTLE_S
        for looks in zip_longest(*ledger.put_off.values()):  # one of each device, then another one
            for look_again in looks:
                if look_again is not None and time.monotonic() < until_s:
                    look_again()
        ledger.put_off.clear()

    def _learned(self, answer: Unverified, given: Sample, verdict: Verdict) -> None:
        """A verdict is there."""
        right = verdict.right
        if right is None:
            self.counters.unverifiable_answers += 1
            return
        answer.device.verified += 1
        self.counters.verified_answers += 1
        words = ODD_WORDS.get(answer.odd, "")
        scale = np.maximum(right.scale, 1e-30)
        if verdict.finding is Finding.LIE:
            error = np.linalg.norm(given.partial.astype(np.float64) - right.partial, axis=1)
            what = f"an output {words}" if words else "a plausible output"
            self._lied(answer, f"{what}, off by {float((error / scale).max()):.3g} times the norm of the right one")
        elif words and self._band is not None:
            cancelled = np.linalg.norm(right.partial, axis=1) / scale
            self._band.widen(given.layer, right.norms, float(cancelled.min()))

    def _lied(self, answer: Unverified, what: str) -> None:
        route, device = answer.route, answer.device
        before, device.standing = device.standing, device.standing.lied(device.answers)
        self._lies[route.device_id] += 1
        self.counters.lies += 1
        log.error("device %s gave a wrong answer in layer %d: %s", route.name, answer.order.layer, what)
        self._tell_requests(route)
        if device.standing.quarantined and not before.quarantined:
            self._quarantined |= {route.device_id}
            log.error("device %s is in quarantine: it gave %d wrong answers", route.name, device.standing.lies)
            self._barred(route, what)

    def _tell_requests(self, route: DeviceRoute) -> None:
        """Name the answers that are out already and can be wrong."""
        touched = [each for each in self._requests if each.closed and each.suspects(route.device_id)]
        if touched:
            names = ", ".join(each.request_id or "(no id)" for each in touched)
            log.error("answers sent before device %s was found to lie, and which may be wrong: %s", route.name, names)
            self._requests = deque((r for r in self._requests if r not in touched), REMEMBERED_REQUESTS)
