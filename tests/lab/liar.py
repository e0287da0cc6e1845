"""A device that lies: `wdmoe-node device` as it is, with a key of its own, but for what its experts compute.

`python -m tests.lab.liar KIND SEED AFTER SHARE MOST device --join ...`: after so many honest answers, a share are lies,
so many at most. `@FILE` in place of the five words reads them from a file, again whenever that changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from wdmoe.moe.expert import ExpertRunner
from wdmoe.transport.codec.messages import Activations, Run

KINDS = ("1e30", "nan", "zeros", "noise", "stale", "foreign", "sign", "1.5", "1.05")


@dataclass(frozen=True, slots=True)
class Lie:
    """What kind of lies, and when."""

    kind: str
    seed: int = 0
    after: int = 0  # honest answers before the first
    share: float = 1.0  # of the answers from then on
    most: int = 1 << 30  # lies in all

    def words(self) -> list[str]:
        return [self.kind, str(self.seed), str(self.after), str(self.share), str(self.most)]

    @classmethod
    def of(cls, words: list[str]) -> Lie:
        kind, seed, after, share, most = words
        return cls(kind, int(seed), int(after), float(share), int(most))


class Liar:
    """Stands in for the runner of a device's experts."""

    def __init__(self, runner: ExpertRunner, honest: Callable[[Run], Activations], lie: Lie) -> None:
        self._runner = runner
        self._honest = honest
        self.lie = lie
        self._rng = np.random.default_rng(lie.seed)
        self._before: dict[tuple[int, int], Activations] = {}
        self.answers = 0
        self.lies = 0

    def __call__(self, run: Run) -> Activations:
        right = np.array(self._honest(run))
        self.answers += 1
        lies = self.answers > self.lie.after and self._rng.random() < self.lie.share and self.lies < self.lie.most
        wrong = self._wrong(run, right) if lies else right
        self._before[run.layer, len(right)] = right
        self.lies += wrong is not right
        return wrong

    def _wrong(self, run: Run, right: Activations) -> Activations:
        kind = self.lie.kind
        if kind == "stale":  # what it answered to the last order like this one
            return self._before.get((run.layer, len(right)), right)
        if kind == "foreign":
            return self._foreign(run, right)
        if kind == "noise":
            noise = self._rng.standard_normal(right.shape)
            norms = np.linalg.norm(right, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
            return np.asarray(noise * norms, right.dtype)
        factors = {"1e30": 1e30, "nan": np.nan, "zeros": 0.0, "sign": -1.0}
        factor = factors[kind] if kind in factors else float(kind)
        return np.full_like(right, factor) if kind == "1e30" else right * np.float32(factor)

    def _foreign(self, run: Run, right: Activations) -> Activations:
        """By other experts of the layer, in place of those that were asked."""
        held = [expert for layer, expert in self._runner.loaded() if layer == run.layer]
        others = [expert for expert in held if expert not in run.experts] or held[::-1]
        experts = tuple(others[place % len(others)] for place in range(len(run.experts)))
        return right if experts == run.experts else np.array(self._honest(replace(run, experts=experts)))


def lying(told: Callable[[], Lie]) -> Callable[[ExpertRunner, Run], Activations]:
    """In place of `ExpertRunner.run`; another lie begins with no answers given."""
    honest = ExpertRunner.run
    liars: dict[tuple[int, Lie], Liar] = {}

    def run(self: ExpertRunner, order: Run) -> Activations:
        lie = told()
        liar = liars.setdefault((id(self), lie), Liar(self, lambda each: honest(self, each), lie))
        return liar(order)

    return run


def _of_file(file: Path) -> Callable[[], Lie]:
    seen: tuple[int, Lie] | None = None

    def told() -> Lie:
        nonlocal seen
        at = file.stat().st_mtime_ns
        if seen is None or seen[0] != at:
            seen = at, Lie.of(file.read_text().split())
        return seen[1]

    return told


def main() -> None:
    from wdmoe.cli.main import main as node

    if sys.argv[1].startswith("@"):
        ExpertRunner.run = lying(_of_file(Path(sys.argv.pop(1)[1:])))  # type: ignore[assignment, method-assign]
    else:
        lie = Lie.of(sys.argv[1:6])
        ExpertRunner.run = lying(lambda: lie)  # type: ignore[assignment, method-assign]
        sys.argv[1:6] = []
    node()


if __name__ == "__main__":
    main()
