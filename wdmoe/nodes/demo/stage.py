"""Where the demo is shown: in a terminal as a picture that moves, anywhere else as plain text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live

from wdmoe.nodes.demo.view import DemoView, shown
from wdmoe.nodes.local.station_client import Token

FRAMES_PER_S = 8  # each costs a few milliseconds of the machine that is being measured
_LINE_EVERY_S = 2.0


class Stage(Protocol):
    """Shows one run, inside a `with` block."""

    view: DemoView

    def __enter__(self) -> Stage: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def tell(self, phase: str, done: float) -> None:
        """What is going on before the answer, and how much of it is done (0 to 1)."""
        ...

    def streaming(self, experts: Mapping[str, int]) -> None:
        """The answer begins; device name -> experts it holds."""
        ...

    def token(self, token: Token) -> None:
        """One more token of the answer."""
        ...

    def ended(self, text: str) -> None:
        """All of the answer."""
        ...

    def reading(self, done: int, of: int) -> None:
        """Windows of held-out text that were read since, and that will be."""
        ...


class LiveStage:
    """The view, redrawn in place. The last frame stays."""

    def __init__(self, view: DemoView, console: Console) -> None:
        self.view = view
        self._live = Live(view, console=console, refresh_per_second=FRAMES_PER_S, vertical_overflow="crop")

    def __enter__(self) -> LiveStage:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def tell(self, phase: str, done: float) -> None:
        """See `Stage`."""
        self.view.starting(phase)

    def streaming(self, experts: Mapping[str, int]) -> None:
        """See `Stage`."""
        self.view.streaming(experts)

    def token(self, token: Token) -> None:
        """See `Stage`."""
        self.view.token(token)

    def ended(self, text: str) -> None:
        """See `Stage`."""
        self.view.ended(text)

    def reading(self, done: int, of: int) -> None:
        """See `Stage`."""
        self.view.reading(done, of)


class PlainStage:
    """What happens, line by line on one stream, and the answer on another."""

    def __init__(self, view: DemoView, name: str, lines: TextIO, answer: TextIO | None) -> None:
        """`answer` None: the answer is not written. `view` is kept up to date for a picture."""
        self.view = view
        self._name = name
        self._lines = lines
        self._answer = answer
        self._told, self._told_s = "", -_LINE_EVERY_S

    def __enter__(self) -> PlainStage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def tell(self, phase: str, done: float) -> None:
        """See `Stage`."""
        now_s = time.monotonic()
        if phase != self._told and now_s - self._told_s >= _LINE_EVERY_S:
            self._told, self._told_s = phase, now_s
            print(f"{self._name}: {phase}", file=self._lines, flush=True)

    def streaming(self, experts: Mapping[str, int]) -> None:
        """See `Stage`."""
        self.view.streaming(experts)
        self._told_s = -_LINE_EVERY_S
        self.tell("the answer begins", 1.0)

    def token(self, token: Token) -> None:
        """See `Stage`."""
        self.view.token(token)
        self._write(shown(token.text))

    def ended(self, text: str) -> None:
        """See `Stage`."""
        self.view.ended(text)
        self._write("\n\n")

    def reading(self, done: int, of: int) -> None:
        """See `Stage`."""
        if done == 0:
            self._told_s = -_LINE_EVERY_S
        self.tell(f"reading held-out text, window {done + 1} of {of}", done / of)

    def _write(self, text: str) -> None:
        if self._answer is not None:
            self._answer.write(text)
            self._answer.flush()
