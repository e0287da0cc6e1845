"""Makes the tries of a plan: clusters are started where needed and kept while they are as good as new."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tools.bench.catalogue.cluster import Cluster, ClusterError
from tools.bench.catalogue.fault import Check, Impossible
from tools.bench.catalogue.model import Model, make_model
from tools.bench.catalogue.plan import Results, Try
from tools.bench.catalogue.processes import footprint
from tools.bench.catalogue.records import Bounds, ClusterSpec, TryRecord

Tell = Callable[[Try, TryRecord], None]


class Runner:
    """Owns the cluster of the moment. Close it."""

    def __init__(self, folder: Path, bounds: Bounds, seed: int) -> None:
        self._folder, self._bounds, self._seed = folder, bounds, seed
        self._models: dict[str, Model] = {}
        self._cluster: Cluster | None = None
        self._clusters = 0

    def run(self, plan: list[Try], results: Results, tell: Tell) -> None:
        """Make every try that is not in the results yet."""
        done = results.done()
        for each in plan:
            if each.key not in done:
                record = dataclasses.replace(self.make(each), seed=each.seed, copies=each.copies, phase=each.phase)
                results.add(record)
                tell(each, record)

    def make(self, each: Try) -> TryRecord:
        """One try. What goes wrong with the cluster itself is a violation too."""
        fault, begun_s = each.fault(), time.monotonic()
        try:
            if isinstance(fault, Check):
                folder = self._folder / f"{fault.id}-{each.number}"
                return fault.examine(folder, each.rng(), each.number, self._bounds)
            assert each.spec is not None
            cluster = self._stand_on(each.spec)
            record = fault.attempt(cluster, each.rng(), each.number, each.phase)
        except Impossible as reason:
            return _empty(each, begun_s, skipped=str(reason))
        except ClusterError as error:
            self.close()
            return _empty(each, begun_s, violations=(str(error)[:600],))
        except Exception as error:  # one try that cannot be made must not end an hour of others
            self.close()
            where = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip().partition("\n")[0]
            return _empty(each, begun_s, violations=(f"{type(error).__name__}: {error} ({where})"[:600],))
        return self._looked_after(record, each.fault.memory_bytes)

    def close(self) -> None:
        """End the cluster, if there is one."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close()

    def model(self, name: str) -> Model:
        """Made on first use."""
        if name not in self._models:
            self._models[name] = make_model(name, self._folder)
        return self._models[name]

    def _stand_on(self, spec: ClusterSpec) -> Cluster:
        if self._cluster is None or self._cluster.spec != spec:
            self.close()
            self._clusters += 1
            model = self.model(spec.model)
            self._cluster = Cluster(spec, model, self._folder / f"c{self._clusters}", self._bounds, self._seed)
            self._cluster.start()
        return self._cluster

    def _looked_after(self, record: TryRecord, allowed_bytes: int) -> TryRecord:
        """A cluster that is not as before serves no other try. Memory is looked at over all tries of a cluster."""
        cluster = self._cluster
        assert cluster is not None
        grown = footprint([cluster.station]).rss_bytes - cluster.station_base.rss_bytes
        if grown > self._bounds.memory_bytes + allowed_bytes:
            more = f"base station: {grown >> 20} MiB more than at its start"
            record = dataclasses.replace(record, leftovers=(*record.leftovers, more))
        if record.leftovers or any("S5" in each or "after healing" in each for each in record.violations):
            self.close()
        return record


def _empty(each: Try, begun_s: float, *, violations: tuple[str, ...] = (), skipped: str = "") -> TryRecord:
    return TryRecord(
        fault=each.fault.id,
        number=each.number,
        seed=each.seed,
        copies=each.copies,
        phase=each.phase,
        violations=violations,
        skipped=skipped,
        seconds=round(time.monotonic() - begun_s, 2),
    )
