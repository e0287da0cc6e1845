"""What the processes hold, once a second, and whether it stays what it was."""

from __future__ import annotations

import csv
import re
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tools.bench.catalogue.client import fetch
from tools.bench.catalogue.cluster import Cluster
from tools.bench.catalogue.processes import footprint

FLAT = {"rss_mib": 40.0, "descriptors": 6.0, "threads": 6.0, "processes": 0.9, "tasks": 8.0}  # most growth in all
WARM_UP = 0.2  # of the run, at least a minute where there is one
_MOST_POINTS = 500
_TASKS = re.compile(r"^wdmoe_(?:asyncio_)?tasks (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sample:
    """Of the base station and everything below it; `devices` as its status lists them."""

    at_s: float
    rss_mib: float
    descriptors: int
    threads: int
    processes: int
    tasks: float  # of its loop, where it tells; else 0
    devices: int
    devices_rss_mib: float
    station_pid: int


class Sampler(threading.Thread):
    """Takes a sample a second until stopped."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(name="sampler", daemon=True)
        self.samples: list[Sample] = []
        self._cluster, self._over, self._begun_s = cluster, threading.Event(), time.monotonic()

    def run(self) -> None:
        while not self._over.wait(1.0):
            self.samples.append(self._sample())

    def stop(self) -> None:
        """Take no more."""
        self._over.set()
        self.join()

    def _sample(self) -> Sample:
        cluster = self._cluster
        own, others = footprint([cluster.station]), footprint(list(cluster.devices))
        state, told = cluster.status() or {"devices": []}, _TASKS.search(fetch(cluster.http, "/metrics") or "")
        return Sample(
            round(time.monotonic() - self._begun_s, 2),
            round(own.rss_bytes / 2**20, 2),
            own.descriptors,
            own.threads,
            own.processes,
            float(told[1]) if told else 0.0,
            len(state["devices"]),
            round(others.rss_bytes / 2**20, 1),
            cluster.station.worker(),
        )


@dataclass(frozen=True, slots=True)
class Trend:
    """The robust slope (Theil and Sen) of one figure, as growth over the whole run, with its 95 % interval."""

    name: str
    growth: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """It does not grow by more than a run may."""
        return self.growth <= FLAT[self.name] or self.low <= 0.0


def trends(samples: list[Sample]) -> list[Trend]:
    """Of everything that should be flat, after the warm-up. Another worker process begins anew."""
    from scipy.stats import theilslopes

    kept = [each for each in samples[int(WARM_UP * len(samples)) :] if each.station_pid == samples[-1].station_pid]
    kept = kept[:: max(1, len(kept) // _MOST_POINTS)]
    if len(kept) < 5:
        return []
    times = [each.at_s for each in kept]
    length_s, found = times[-1] - times[0], []
    for name in FLAT:
        slope, _, low, high = theilslopes([float(getattr(each, name)) for each in kept], times)
        found.append(Trend(name, *(round(float(each) * length_s, 3) for each in (slope, low, high))))
    return found


def write_csv(samples: list[Sample], file: Path) -> None:
    """One line a sample."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, [each.name for each in fields(Sample)])
        writer.writeheader()
        writer.writerows(asdict(each) for each in samples)


def draw(samples: list[Sample], marks: list[tuple[float, str]], file: Path) -> None:
    """Memory, descriptors, threads and devices over time, with a tick for each trouble."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    rows = (("rss_mib", "memory (MiB)"), ("descriptors", "descriptors"), ("threads", "threads"), ("devices", "devices"))
    axes = figure.subplots(len(rows), 1, sharex=True)
    minutes = [each.at_s / 60 for each in samples]
    for axis, (name, label) in zip(axes, rows, strict=True):
        values = [float(getattr(each, name)) for each in samples]
        axis.plot(minutes, values, linewidth=0.8)
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.15 * max(values, default=1.0) + 0.1)  # a flat line would lie on the frame
        for at_s, _ in marks:
            axis.axvline(at_s / 60, ymax=0.04, color="grey", linewidth=0.5)
    axes[0].set_title("The base station under random faults")
    axes[-1].set_xlabel("minutes")
    figure.savefig(file, metadata={"Software": None} if file.suffix == ".png" else None)
