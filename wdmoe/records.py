"""Plain frozen records that several packages share. No I/O, no torch, no sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class ExpertId(NamedTuple):
    """One expert of one MoE layer. `layer` counts decoder layers, so dense layers leave gaps."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """What a device says about itself when it joins."""

    name: str
    hardware: str  # board or CPU model, for people
    system: str  # operating system and architecture
    provider: str  # ONNX Runtime execution provider that is in use
    threads: int  # threads per expert run
    memory_bytes: int  # memory it offers to experts
    flops: float  # measured by a short warm-up, FLOP/s of one expert run
    downlink_snr_hz: float = 0.0  # received power over noise density of its link, hertz; 0: unknown
    uplink_snr_hz: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Where the time of some work went. All stages are disjoint; their sum is the elapsed time."""

    bs_compute: float = 0.0  # attention, gate, sampling, packing, combining
    wire_down: float = 0.0  # base station to the device that answered last
    device_compute: float = 0.0  # experts of that device
    wire_up: float = 0.0  # that device to the base station
    wait: float = 0.0  # queued behind other requests, or for a deadline that passed

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
    policy: str = "topk"
    degraded: bool = False  # an expert the policy chose did not answer in time
    degraded_tokens: int = 0  # tokens (prompt included) computed without all their chosen experts, counted once
    dropped_weight: float = 0.0  # mean gate weight per (token, layer) that was not computed: policy and loss together
    lost_weight: float = 0.0  # the part of dropped_weight that was lost, not chosen
    retries: int = 0  # dispatches sent again to another device
    bytes_down: int = 0
    bytes_up: int = 0
    first_token_s: float = 0.0
    elapsed_s: float = 0.0
    stages: StageSeconds = field(default_factory=StageSeconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # for benchmarks: run to max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Work for the engine. Exactly one of `prompt` and `messages` is given."""

    request_id: str
    prompt: str | tuple[int, ...] | None = None  # text, or token ids
    messages: tuple[Mapping[str, str], ...] | None = None  # {"role": ..., "content": ...}, through the chat template
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Some more text of an answer (may be empty) and the devices that worked on it."""

    text: str
    token_id: int
    devices: tuple[str, ...] = ()  # names of the devices that served this token
    layers: tuple[int, ...] = ()  # in how many MoE layers each of these devices did
    dropped_weight: float = 0.0  # of the answer so far, as in its receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of an answer."""

    reason: str  # "stop" or "length"
    receipt: Receipt


class TextEngine(Protocol):
    """What the HTTP face and the demo need of a running model. Implemented by `wdmoe.backbone.engine.Engine`."""

    @property
    def model_name(self) -> str:
        """Name shown to clients."""
        ...

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer, in tokens."""
        ...

    def prepare(self, request: GenerationRequest) -> tuple[int, ...]:
        """Tokenize and check a request without starting it.

        Returns:
            Prompt token ids.
        Raises:
            RequestError: the request can never be served (too long, empty, no chat template, ...).
        """
        ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta | Finished]:
        """Run a request. Closing or cancelling the iterator cancels the work within one model step.

        Raises (from the first or any later step):
            RequestError: as `prepare`.
            OverloadedError: the queue is full.
            ExpertsUnavailableError: a layer had no expert left.
        """
        ...

    def status(self) -> Mapping[str, object]:
        """State for `/health` and `wdmoe-node status`: plain JSON types."""
        ...
