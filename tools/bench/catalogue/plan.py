"""Which tries there are, in which order, and the results of those that were made, on disk after each."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.catalogue.fault import Check, Fault
from tools.bench.catalogue.records import ClusterSpec, TryRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One try to be made. The seed decides all its chances."""

    fault: type[Fault]
    number: int
    copies: int
    phase: str
    seed: str
    spec: ClusterSpec | None

    @property
    def key(self) -> tuple[str, int]:
        """What it is called in the results."""
        return (self.fault.id, self.number)

    def rng(self) -> random.Random:
        """Its chance."""
        return random.Random(self.seed)


def make_plan(
    faults: list[type[Fault]], *, tries: int, seed: int, copies: int = 0, phase: str = "", model: str = "small"
) -> list[Try]:
    """Tries of each fault, dealt over its cells (copies, phase); in the order of clusters, so that few are started.

    Args:
        tries: most of each fault with so many copies; 0: as the fault says.
        copies: only these; 0: all.
        phase: only this one; "": all.
    """
    plan = [each for fault in faults for each in _tries_of(fault, tries, seed, copies, phase, model)]
    order = {spec: place for place, spec in enumerate(dict.fromkeys(each.spec for each in plan))}
    return sorted(plan, key=lambda each: order[each.spec])


def _tries_of(fault: type[Fault], tries: int, seed: int, copies: int, phase: str, model: str) -> Iterator[Try]:
    """A try of a number is the same one whatever is left out."""
    cells = fault.cells()
    each_copies = min(tries, fault.tries) if tries else fault.tries
    for number in range(each_copies * len(fault.copies)):
        c, p = cells[number % len(cells)]
        if (copies and c not in (0, copies)) or (phase and p not in ("", phase)):
            continue
        spec = None if issubclass(fault, Check) else fault().spec_for(c)
        if spec is not None and model != "small" and spec.model == "small":
            spec = ClusterSpec(**{**asdict(spec), "model": model})
        yield Try(fault=fault, number=number, copies=c, phase=p, seed=f"{seed}/{fault.id}/{number}", spec=spec)


def estimate_s(plan: list[Try]) -> float:
    """About how long it takes."""
    starts = {each.spec: each.fault.start_s for each in plan if each.spec is not None}
    return sum(each.fault.cost_s for each in plan) + sum(starts.values())


@dataclass(slots=True)
class Results:
    """All tries so far. Written to a file after each, so that an interrupted run can go on."""

    about: dict[str, Any]
    tries: list[TryRecord] = field(default_factory=list)
    file: Path | None = None

    @classmethod
    def resume(cls, file: Path | None, about: dict[str, Any]) -> Results:
        """Those in the file, where it is of the same seed. Raises ValueError where it is of another."""
        if file is None or not file.exists():
            return cls(about, file=file)
        kept = json.loads(file.read_text())
        if kept["about"]["seed"] != about["seed"]:
            raise ValueError(f"{file} holds tries of seed {kept['about']['seed']}: give that, or another file")
        return cls(about, [_record(each) for each in kept["tries"]], file)

    def done(self) -> set[tuple[str, int]]:
        """Tries that need not be made again."""
        return {(each.fault, each.number) for each in self.tries}

    def add(self, each: TryRecord) -> None:
        """Keep one more."""
        self.tries.append(each)
        if self.file is not None:
            fresh = self.file.with_suffix(self.file.suffix + ".new")
            body = {"about": self.about, "tries": [{**asdict(t), "passed": t.passed} for t in self.tries]}
            fresh.write_text(json.dumps(body, indent=1) + "\n")
            fresh.replace(self.file)


def _record(kept: dict[str, Any]) -> TryRecord:
    lists = ("leftovers", "violations", "notes")
    values: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in kept.items() if k != "passed"}
    return TryRecord(**values)
