"""Plain frozen records that several packages share. No I/O, no torch, no sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from wdmoe.receipt import Receipt


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
    """Work for the engine. Exactly one of `prompt` and `messages` is given; `begun` tokens count for max_tokens."""

    request_id: str
    prompt: str | tuple[int, ...] | None = None  # text, or token ids
    messages: tuple[Mapping[str, str], ...] | None = None  # {"role": ..., "content": ...}, through the chat template
    sampling: Sampling = field(default_factory=Sampling)
    begun: tuple[int, ...] = ()  # tokens of the answer that another engine made: this one goes on after them


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Some more text of an answer (may be empty) and the devices that worked on it."""

    text: str
    token_id: int
    devices: tuple[str, ...] = ()  # names of the devices that served this token
    layers: tuple[int, ...] = ()  # in how many MoE layers each of these devices did
    dropped_weight: float = 0.0  # of the answer so far, as in its receipt
    lost_weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """An answer goes on later: experts that it needs were lost, and are being loaded elsewhere."""

    text: str  # one line, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of an answer."""

    reason: str  # "stop" or "length"
    receipt: Receipt


AnswerEvent: TypeAlias = TextDelta | Waiting | Finished


class TextEngine(Protocol):
    """What the HTTP face and the demo need of a running model. `wdmoe.backbone.runtime.engine.Engine` is one."""

    @property
    def model_name(self) -> str:
        """Name shown to clients."""
        ...

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer, in tokens."""
        ...

    async def prepare(self, request: GenerationRequest) -> tuple[int, ...]:
        """Tokenize and check a request without starting it.

        Returns:
            Prompt token ids.
        Raises:
            RequestError: the request can never be served (too long, empty, no chat template, ...).
        """
        ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[AnswerEvent]:
        """Run a request. Closing or cancelling the iterator cancels the work within one model step.

        Raises (from the first or any later step):
            RequestError: as `prepare`.
            OverloadedError: the queue is full.
            ExpertsUnavailableError: a layer had no expert left, and none came back in time.
        """
        ...

    async def status(self) -> Mapping[str, object]:
        """State for `/health` and `wdmoe-node status`: plain JSON types."""
        ...
