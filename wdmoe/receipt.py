"""The receipt that every answer carries, and the running account of one request that becomes it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Where the time of some work went. All stages are disjoint; their sum is the elapsed time."""

    bs_compute: float = 0.0  # attention, gate, sampling, packing, combining
    wire_down: float = 0.0  # base station to the device that answered last
    device_compute: float = 0.0  # experts of that device
    wire_up: float = 0.0  # that device to the base station
    wait: float = 0.0  # queued behind other requests, for a deadline that passed, or for lost experts

    def __add__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(
            bs_compute=self.bs_compute + other.bs_compute,
            wire_down=self.wire_down + other.wire_down,
            device_compute=self.device_compute + other.device_compute,
            wire_up=self.wire_up + other.wire_up,
            wait=self.wait + other.wait,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What an answer cost and what it lost. Every answer carries one: quality is never lost silently."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, computed for a former request and kept
    policy: str = "topk"
    degraded: bool = False  # an expert the policy chose did not answer in time
    degraded_tokens: int = 0  # tokens (prompt included) computed without all their chosen experts, counted once
    dropped_weight: float = 0.0  # mean gate weight per (token, layer) that was not computed: policy and loss together
    lost_weight: float = 0.0  # the part of dropped_weight that was lost, not chosen
    retries: int = 0  # dispatches sent again to another device
    suspect: bool = False  # a device that was found to lie had given answers that nobody verified
    suspect_answers: int = 0  # so many, of one device in one layer each
    hedges: int = 0  # dispatches sent to a further device because an answer was late; the first answer counts
    waited_s: float = 0.0  # for lost experts to be loaded elsewhere
    restarts: int = 0  # engines that ended before the answer did: another one read it so far and went on
    bytes_down: int = 0
    bytes_up: int = 0
    first_token_s: float = 0.0
    elapsed_s: float = 0.0
    stages: StageSeconds = field(default_factory=StageSeconds)


@dataclass(slots=True)
class Ledger:
    """Mutable on purpose: one per request, written by the model thread only, but for `cancelled`."""

    policy: str = "topk"
    request_id: str = ""
    started_s: float = field(default_factory=time.monotonic)  # when the request came in, queueing included
    first_token_s: float = 0.0
    completion_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    token_layers: int = 0  # (token, layer) pairs computed
    dropped_weight: float = 0.0  # summed over those pairs, each pair's weights summing to 1
    lost_weight: float = 0.0
    retries: int = 0
    hedges: int = 0
    waited_s: float = 0.0
    step_waited_s: float = 0.0  # the part of it since the last token
    bytes_down: int = 0
    bytes_up: int = 0
    wire_down_s: float = 0.0
    device_compute_s: float = 0.0
    wire_up_s: float = 0.0
    wait_s: float = 0.0
    step_degraded: int = 0  # tokens of the current forward pass that missed a chosen expert, in its worst layer
    degraded_tokens: int = 0
    step_devices: Counter[str] = field(default_factory=Counter)  # layers that each device served
    cancelled: bool = False  # nobody waits for the answer any more; set from any thread
    unspent: float = 0.0  # what a policy with a bound may still drop, in mean worths of a token's experts of a layer
    unverified: Counter[str] = field(default_factory=Counter)  # device id -> its answers that counted as they came
    lies_before: dict[str, int] = field(default_factory=dict)  # device id -> its known lies when the first of them did
    lies: Mapping[str, int] = field(default_factory=dict)  # device id -> its known lies now, kept by others
    put_off: dict[str, list[Callable[[], None]]] = field(default_factory=dict)  # device id -> looks at its answers
    settle: Callable[[], None] | None = None  # waits a moment for what is being verified and was put off
    closed: bool = False  # the receipt is out

    def open_pass(self) -> None:
        """A forward pass begins: settle the degraded tokens of the one before."""
        self.degraded_tokens += self.step_degraded
        self.step_degraded = 0

    def close_step(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """A token is out. Returns the devices that worked on it, and in how many layers each did."""
        devices = tuple(sorted(self.step_devices))
        layers = tuple(self.step_devices[device] for device in devices)
        self.step_devices.clear()
        self.step_waited_s = 0.0
        return devices, layers

    def take_unverified(self, device_id: str, lies: Mapping[str, int]) -> None:
        """An answer of a device counts as it came. `lies` stays: whoever keeps it counts up what is found later."""
        self.lies = lies
        self.unverified[device_id] += 1
        self.lies_before.setdefault(device_id, lies.get(device_id, 0))

    def suspects(self, device_id: str) -> bool:
        """Whether a device was found to lie after this request began to take its answers as they came."""
        return self.lies.get(device_id, 0) > self.lies_before.get(device_id, self.lies.get(device_id, 0))

    @property
    def suspect_answers(self) -> int:
        """Answers that counted as they came, of devices that were found to lie since."""
        return sum(count for device_id, count in self.unverified.items() if self.suspects(device_id))

    def close(self) -> Receipt:
        """The last receipt, once what is being verified is known as far as that takes no longer than a moment."""
        if self.settle is not None:
            self.settle()
        self.closed = True
        return self.receipt()

    def waited(self, seconds: float) -> None:
        """So long no device had the experts of a layer."""
        self.waited_s += seconds
        self.step_waited_s += seconds
        self.wait_s += seconds

    @property
    def mean_lost(self) -> float:
        """The part of `mean_dropped` that was lost, not chosen."""
        return self.lost_weight / max(self.token_layers, 1)

    @property
    def mean_dropped(self) -> float:
        """Mean gate weight per (token, layer) that was not computed so far."""
        return self.dropped_weight / max(self.token_layers, 1)

    def receipt(self) -> Receipt:
        """What the request cost so far."""
        self.open_pass()
        elapsed_s = time.monotonic() - self.started_s
        away_s = self.wire_down_s + self.device_compute_s + self.wire_up_s + self.wait_s
        suspect_answers = self.suspect_answers
        return Receipt(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            completion_tokens=self.completion_tokens,
            policy=self.policy,
            degraded=self.lost_weight > 0 or self.degraded_tokens > 0,
            degraded_tokens=self.degraded_tokens,
            dropped_weight=self.mean_dropped,
            lost_weight=self.mean_lost,
            retries=self.retries,
            suspect=suspect_answers > 0,
            suspect_answers=suspect_answers,
            hedges=self.hedges,
            waited_s=self.waited_s,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            first_token_s=self.first_token_s,
            elapsed_s=elapsed_s,
            stages=StageSeconds(
                bs_compute=max(elapsed_s - away_s, 0.0),
                wire_down=self.wire_down_s,
                device_compute=self.device_compute_s,
                wire_up=self.wire_up_s,
                wait=self.wait_s,
            ),
        )
