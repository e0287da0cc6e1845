"""A small engine with the real one's manners, and the real server in front of it on a real port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager

from wdmoe.errors import RequestError
from wdmoe.receipt import Receipt, StageSeconds
from wdmoe.records import Finished, GenerationRequest, TextDelta
from wdmoe.serving.requests import ServingLimits
from wdmoe.serving.server import serve_http

MODEL = "echo-moe"


class EchoEngine:
    """Answers with the words of its prompt, one a step, over and over until `max_tokens`. A word is a token.

    A prompt that holds the word of one of `errors` raises that error after `fails_after` tokens.
    """

    model_name = MODEL
    context_tokens = 64

    def __init__(self, step_s: float = 0.0, errors: Mapping[str, Exception] | None = None) -> None:
        self.step_s = step_s
        self.errors = dict(errors or {})
        self.fails_after = 0
        self.devices = ["kitchen", "attic"]
        self.checks: dict[str, object] = {}  # what its status says of its devices' honesty
        self.suspect = False
        self.running = 0  # generations that were started and have not ended
        self.most_running = 0
        self.seen: list[GenerationRequest] = []
        self._words: list[str] = []

    async def prepare(self, request: GenerationRequest) -> tuple[int, ...]:
        if isinstance(request.prompt, tuple):
            tokens = request.prompt
        else:
            turns = [turn["content"] for turn in request.messages or ()]
            words = (request.prompt if request.prompt is not None else " ".join(turns)).split()
            self._words += [word for word in words if word not in self._words]
            tokens = tuple(self._words.index(word) for word in words)
        if not tokens:
            raise RequestError("the prompt is empty")
        if len(tokens) + request.sampling.max_tokens > self.context_tokens:
            raise RequestError(f"{len(tokens)} tokens do not fit a context of {self.context_tokens}")
        return tokens

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta | Finished]:
        tokens = await self.prepare(request)
        self.seen.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for count in range(request.sampling.max_tokens):
                await asyncio.sleep(self.step_s)
                self._raise_if_told(tokens, count)
                word = self._words[tokens[count % len(tokens)]]
                if word in request.sampling.stop:
                    yield Finished(reason="stop", receipt=self._receipt(tokens, count))
                    return
                yield TextDelta(text=f" {word}" if count else word, token_id=count, devices=("attic",))
            yield Finished(reason="length", receipt=self._receipt(tokens, request.sampling.max_tokens))
        finally:
            self.running -= 1

    async def status(self) -> Mapping[str, object]:
        devices = [{"name": name, "provider": "CPUExecutionProvider", "experts": 4} for name in self.devices]
        state = "ok" if devices else "waiting"
        placement = '{"format": 1, "devices": {}}\n'
        return {"state": state, "model": MODEL, "devices": devices, "placement": placement, **self.checks}

    def _raise_if_told(self, tokens: tuple[int, ...], count: int) -> None:
        for word, error in self.errors.items():
            if count >= self.fails_after and word in [self._words[token] for token in tokens]:
                raise error

    def _receipt(self, tokens: tuple[int, ...], count: int) -> Receipt:
        return Receipt(
            prompt_tokens=len(tokens),
            completion_tokens=count,
            dropped_weight=0.25,
            degraded=True,
            degraded_tokens=1,
            bytes_down=100 * count,
            bytes_up=50 * count,
            retries=1,
            suspect=self.suspect,
            suspect_answers=5 * self.suspect,
            first_token_s=0.01,
            elapsed_s=0.01 * count,
            stages=StageSeconds(bs_compute=0.5, wait=0.25),
        )


class Server:
    """The HTTP face in a thread with a loop of its own, as a base station runs it."""

    def __init__(
        self, engine: EchoEngine, api_key: str, limits: ServingLimits | None, host: str, aliases: Sequence[str]
    ) -> None:
        self.engine = engine
        self.url = ""
        self._api_key, self._limits, self._host, self._aliases = api_key, limits, host, aliases
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="http")

    def start(self) -> None:
        self._thread.start()
        if not self._ready.wait(20) or self._failed:
            raise self._failed or TimeoutError("the server did not start")

    def cancel(self) -> None:
        """As a base station would, once."""
        if not self._cancelled:
            self._cancelled = True
            self._loop.call_soon_threadsafe(self._task.cancel)

    def stop(self) -> None:
        """Cancel it and wait for its end."""
        self.cancel()
        self._thread.join(30)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        serving = serve_http(
            self.engine,
            self._host,
            0,
            self._api_key,
            aliases=self._aliases,
            limits=self._limits,
            ready=self._on_ready,
        )
        self._task = asyncio.create_task(serving)
        try:
            await self._task
        except asyncio.CancelledError:
            pass
        except Exception as error:
            self._failed = error
            self._ready.set()

    def _on_ready(self, url: str) -> None:
        self.url = url
        self._ready.set()


@contextmanager
def serving(
    engine: EchoEngine,
    *,
    api_key: str = "",
    limits: ServingLimits | None = None,
    host: str = "127.0.0.1",
    aliases: Sequence[str] = (),
) -> Iterator[Server]:
    """A running server; it has ended when the block does."""
    server = Server(engine, api_key, limits, host, aliases)
    server.start()
    try:
        yield server
    finally:
        server.stop()
