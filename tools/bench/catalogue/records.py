"""What the catalogue writes down: where a try happened, what its clients got, and what was wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long things may take (the X of S4, in seconds) and how much may be left over. For a LAN and two cores."""

    stall_copy_s: float = 2.0  # next token or a clear error, where each expert has a copy
    stall_s: float = 4.0  # the same without copies: a deadline, and what comes with it
    error_s: float = 30.0  # a clear error where nobody can serve; a bounded wait for experts counts
    settle_s: float = 30.0  # all devices back and every expert served, from the healing on
    exit_s: float = 2.0  # a base station that was told to end, from its last answer on
    end_s: float = 10.0  # a device that was told to end, many at once
    slow_ratio: float = 1.3  # time of an answer beside a slow device over the usual time ...
    slow_slack_s: float = 0.4  # ... and this more, for tokens of a few milliseconds on two busy cores
    patience_s: float = 120.0  # a try that goes on for longer hangs
    descriptors: int = 4  # more than before
    threads: int = 8  # more than before: pools of event loops grow when they are first needed
    memory_bytes: int = 48 << 20  # growth of the base station over all tries with one cluster

    def with_words(self, words: tuple[str, ...]) -> Bounds:
        """Changed by words like `stall_s=0.6`. Raises ValueError naming the word."""
        known = {each.name: type(getattr(self, each.name)) for each in fields(self)}
        changed: dict[str, Any] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in known:
                raise ValueError(f"{word}: bounds are {', '.join(known)}")
            changed[name] = known[name](float(value))
        return replace(self, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What a fault needs to stand on. Faults with the same needs share a cluster."""

    copies: int = 2
    devices: int = 4
    air: bool = False  # each device behind a link of its own that can be spoilt
    relay: bool = False  # by a TCP relay, whatever else works here
    insecure: bool = False
    model: str = "small"
    flags: tuple[str, ...] = ()  # further words for `bs`
    optional: tuple[str, ...] = ()  # the same, in pairs, left out where this `bs` does not know the flag
    descriptors: int = 0  # hard limit of the station; 0: the system's
    clocks: bool = False  # every process under a clock that can be set


@dataclass(slots=True)
class Answer:
    """What a client got, with the time of each piece (monotonic seconds)."""

    wanted: int
    streamed: bool
    asked_s: float
    ids: list[int] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)  # gate weight lost so far, at each token
    times_s: list[float] = field(default_factory=list)
    devices: set[str] = field(default_factory=set)
    comments: list[str] = field(default_factory=list)
    text: str = ""
    receipt: Mapping[str, Any] | None = None
    error: str = ""  # as it was told: by a status, by an error event, or by a connection that broke
    told: bool = True  # the error was told in words, not by a broken connection
    status: int = 0
    tokens: int = 0
    ended_s: float = 0.0

    @property
    def complete(self) -> bool:
        """All that was asked for is there, and the account of it."""
        return self.receipt is not None and self.tokens == self.wanted

    @property
    def admits(self) -> bool:
        """It says itself that it may not be what the whole model would say."""
        return bool(self.receipt and (self.receipt["degraded"] or self.receipt.get("suspect")))


@dataclass(frozen=True, slots=True, kw_only=True)
class TryRecord:
    """One try: a line of the results."""

    fault: str
    number: int
    seed: str
    copies: int
    phase: str
    backend: str = ""
    answers: int = 0
    completed: int = 0
    exact: int = 0
    admitted: int = 0  # not exact, and the receipt says so
    refused: int = 0  # ended by an error in words
    wrong: int = 0  # not exact, and called right
    longest_pause_s: float = 0.0
    settled_s: float = 0.0
    seconds: float = 0.0
    leftovers: tuple[str, ...] = ()
    violations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: str = ""  # why it could not be tried here

    @property
    def passed(self) -> bool:
        """Nothing that was promised was broken."""
        return not (self.violations or self.leftovers or self.wrong or self.skipped)
