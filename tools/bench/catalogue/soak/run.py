"""One soak: visitors ask, troubles come and go, samples are taken; afterwards a verdict."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.bench.catalogue.cluster import Cluster, ClusterError
from tools.bench.catalogue.soak.samples import Sampler, Trend, trends
from tools.bench.catalogue.soak.troubles import TROUBLES
from tools.bench.catalogue.soak.visitors import Visitors

CALM_EVERY = 12  # troubles; then everything has to come back
FRESH_STATION_S = 60.0


@dataclass(slots=True)
class Soak:
    """Makes trouble on the main thread until the time is over."""

    cluster: Cluster
    seed: int
    minutes: float
    clients: int = 2
    troubles: tuple[str, ...] = tuple(TROUBLES)
    complaints: list[str] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    station_starts: int = 0
    calms: list[float] = field(default_factory=list)  # seconds until all was back

    def run(self) -> dict[str, Any]:
        """Until the time is over or Ctrl-C; then what came of it."""
        rng, begun_s = random.Random(self.seed), time.monotonic()
        visitors, sampler = Visitors(self.cluster, self.seed, self.clients), Sampler(self.cluster)
        sampler.start()
        try:
            self._trouble(rng, begun_s)
            self._calm()
        except KeyboardInterrupt:
            print("\ninterrupted: the verdict is about the time so far", file=sys.stderr)
        visitors.stop()
        if self.cluster.station.alive:
            self.complaints += [f"at the end: {each}" for each in self.cluster.leftovers()]
        sampler.stop()
        self.complaints += visitors.complaints
        found = trends(sampler.samples)
        return {
            "seed": self.seed,
            "minutes": round((time.monotonic() - begun_s) / 60, 2),
            "answers": asdict(visitors.tally),
            "troubles": dict(self.counts),
            "back_after_s": self.calms,
            "station_started_again": self.station_starts,
            "trends": [{**asdict(each), "flat": each.flat} for each in found],
            "complaints": self.complaints,
            "passed": self._passed(visitors, found),
            "samples": [asdict(each) for each in sampler.samples],
            "marks": self.marks,
        }

    def _passed(self, visitors: Visitors, found: list[Trend]) -> bool:
        tally = visitors.tally
        return not (self.complaints or tally.wrong or tally.hung or not all(each.flat for each in found))

    def _trouble(self, rng: random.Random, begun_s: float) -> None:
        until_s, number = begun_s + 60 * self.minutes, 0
        while time.monotonic() < until_s:
            number += 1
            name = rng.choice(self.troubles)
            with TROUBLES[name](self.cluster, rng) as said:
                self._mark(begun_s, f"{name} {said}".strip())
                time.sleep(rng.uniform(0.3, 3.0))
            self._look_after()
            time.sleep(rng.uniform(0.2, 2.0))
            if number % CALM_EVERY == 0:
                self._calm()

    def _mark(self, begun_s: float, said: str) -> None:
        self.marks.append((round(time.monotonic() - begun_s, 1), said))
        self.counts[said.split()[0]] += 1
        print(f"{time.monotonic() - begun_s:7.1f} s  {said}", flush=True)

    def _look_after(self) -> None:
        """What ended though nobody ended it is a complaint, and is started again."""
        for node in (self.cluster.station, *self.cluster.devices):
            if not node.alive:
                self.complaints.append(f"{node.name} ended by itself: {node.said()[-200:].strip()}")
                node.kill()
                node.start()
                self.station_starts += node is self.cluster.station
        if self.cluster.status() is None:
            self.cluster.wait_for(lambda: self.cluster.status() is not None, FRESH_STATION_S, "it does not come back")

    def _calm(self) -> None:
        """Everything is back, and no ghost is left."""
        took_s = self.cluster.settle(self.cluster.bounds.settle_s)
        if took_s is None:
            self.complaints.append(f"not as before: {self.cluster.trouble()}")
            took_s = self.cluster.bounds.settle_s
        self.calms.append(round(took_s, 2))


__all__ = ["ClusterError", "Soak"]
