"""From a checked HTTP body to work for the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from wdmoe.errors import ConfigError
from wdmoe.records import GenerationRequest, Sampling, TextEngine
from wdmoe.serving.errors import Problem
from wdmoe.serving.schemas import ChatRequest, CompletionRequest

# OpenAI's defaults, so that a client finds here what it knows.
_TEMPERATURE = 1.0
_TOP_P = 1.0
_COMPLETION_TOKENS = 16
_COUNTS = ("body_bytes", "connections", "connections_per_address", "prompts", "parallel_prompts", "chat_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """Bounds on the HTTP face. The engine has its own on requests that are computed and queued at once."""

    body_bytes: int = 4 << 20
    connections: int = 512  # open at the same time; for one more the oldest silent one is closed
    connections_per_address: int = 128  # of which one with a request in work is never closed
    head_s: float = 10.0  # how long the head of a request may take to arrive
    body_s: float = 60.0  # ... and its body
    stall_s: float = 60.0  # how long a client may read nothing of what waits for it
    prompts: int = 32  # in one completion request
    parallel_prompts: int = 4  # of one request, computed at the same time
    chat_tokens: int = 512  # answer length of a chat request that states none
    drain_s: float = 5.0  # how long running answers may go on after the server was told to stop

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"serving.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("head_s", "body_s", "stall_s"):
            if not 0 < getattr(self, name) < 3600:
                raise ConfigError(f"serving.{name} must lie between 0 and 3600, got {getattr(self, name)}")
        if not 0 <= self.drain_s < 3600:
            raise ConfigError(f"serving.drain_s must lie between 0 and 3600, got {self.drain_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request's work: one generation for each choice of the answer."""

    request_id: str
    model: str
    chat: bool
    stream: bool
    include_usage: bool
    generations: tuple[GenerationRequest, ...]
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))


async def plan_chat(engine: TextEngine, body: ChatRequest, request_id: str, limits: ServingLimits) -> Job:
    """Check a chat request and turn it into work.

    Raises:
        Problem: 400, the context does not hold it.
        RequestError: the engine can never serve it.
    """
    messages = tuple(message.plain() for message in body.messages)
    sampling = _sampling(body, tokens=1)
    draft = GenerationRequest(request_id=request_id, messages=messages, sampling=sampling)
    stated = body.max_completion_tokens or body.max_tokens
    return await _plan(engine, body, [draft], stated, limits.chat_tokens)


async def plan_completion(engine: TextEngine, body: CompletionRequest, request_id: str, limits: ServingLimits) -> Job:
    """As `plan_chat`, for a plain completion of one or several prompts."""
    sampling = _sampling(body, tokens=1)
    drafts = [
        GenerationRequest(request_id=f"{request_id}-{index}" if index else request_id, prompt=prompt, sampling=sampling)
        for index, prompt in enumerate(body.prompts(limits.prompts))
    ]
    return await _plan(engine, body, drafts, body.max_tokens, _COMPLETION_TOKENS)


async def _plan(
    engine: TextEngine,
    body: ChatRequest | CompletionRequest,
    drafts: Sequence[GenerationRequest],
    stated_tokens: int | None,
    default_tokens: int,
) -> Job:
    generations = [await _fit(engine, draft, stated_tokens, default_tokens) for draft in drafts]
    return Job(
        request_id=drafts[0].request_id,
        model=engine.model_name,
        chat=isinstance(body, ChatRequest),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        generations=tuple(generations),
        prompt_tokens=sum(len(generation.prompt or ()) for generation in generations),
    )


async def _fit(
    engine: TextEngine, draft: GenerationRequest, stated_tokens: int | None, default_tokens: int
) -> GenerationRequest:
    """Tokenize a draft and settle the length of its answer."""
    tokens = await engine.prepare(draft)
    room = engine.context_tokens - len(tokens)
    if stated_tokens is not None and stated_tokens > room:
        message = (
            f"the prompt has {len(tokens)} tokens and {stated_tokens} more are asked for, "
            f"but the model's context holds {engine.context_tokens}"
        )
        raise Problem(400, message, param="max_tokens", code="context_length_exceeded")
    sampling = replace(draft.sampling, max_tokens=stated_tokens or min(default_tokens, room))
    return replace(draft, prompt=tokens, messages=None, sampling=sampling)


def _sampling(body: ChatRequest | CompletionRequest, tokens: int) -> Sampling:
    return Sampling(
        max_tokens=tokens,
        temperature=_TEMPERATURE if body.temperature is None else body.temperature,
        top_p=_TOP_P if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=body.stops,
        ignore_eos=bool(body.ignore_eos),
    )
