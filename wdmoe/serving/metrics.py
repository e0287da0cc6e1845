"""What Prometheus scrapes from a base station. One registry per server: two can live in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from wdmoe.receipt import Receipt
from wdmoe.serving.responses import device_count

_SHARES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


_CHECKS = {  # what the engine's status says -> name here, and what it is
    "verified_answers": ("wdmoe_verified_answers", "Devices' answers that the base station computed again"),
    "odd_answers": ("wdmoe_odd_answers", "Devices' answers of a size that honest ones do not have"),
    "lies": ("wdmoe_lies", "Devices' answers that were found to be wrong"),
    "skipped_verifications": ("wdmoe_skipped_verifications", "Answers drawn for verification and skipped: no time"),
}


class _Checks(Collector):
    """What the base station knows of its devices' honesty."""

    def __init__(self) -> None:
        self.status: Mapping[str, object] = {}  # the engine's, set at every scrape

    def collect(self) -> Iterator[Metric]:
        status = self.status
        for field, (name, words) in _CHECKS.items():
            value = status.get(field)
            yield CounterMetricFamily(name, words, value=float(value) if isinstance(value, int) else 0.0)
        barred = status.get("devices_quarantined")
        words = "Devices that gave wrong answers and are not asked any more"
        value = float(barred) if isinstance(barred, int) else 0.0
        yield GaugeMetricFamily("wdmoe_devices_quarantined", words, value=value)


class Metrics:
    """Counters of the HTTP face and of the answers that went through it."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("wdmoe_http_requests", "HTTP requests answered", ["path", "status"], registry=registry)
        self.active = Gauge("wdmoe_http_requests_active", "HTTP requests in work", registry=registry)
        self.outcomes = Counter("wdmoe_answers", "Answers by how they ended", ["outcome"], registry=registry)
        self._degraded = Counter(
            "wdmoe_answers_degraded", "Answers that missed an expert the policy chose", registry=registry
        )
        self._suspect = Counter(
            "wdmoe_answers_suspect", "Answers with a part by a device found to lie meanwhile", registry=registry
        )
        self._tokens = Counter("wdmoe_tokens", "Tokens of prompts and completions", ["kind"], registry=registry)
        self._degraded_tokens = Counter(
            "wdmoe_tokens_degraded", "Tokens computed without all their chosen experts", registry=registry
        )
        self._dropped = Histogram(
            "wdmoe_dropped_weight",
            "Mean gate weight left out of an answer",
            buckets=_SHARES,
            registry=registry,
        )
        self._lost = Histogram(
            "wdmoe_lost_weight", "Mean gate weight lost by an answer", buckets=_SHARES, registry=registry
        )
        self._stages = Counter("wdmoe_stage_seconds", "Where the time of answers went", ["stage"], registry=registry)
        self._bytes = Counter("wdmoe_wire_bytes", "Bytes to and from devices", ["direction"], registry=registry)
        self._retries = Counter("wdmoe_retries", "Dispatches sent again to another device", registry=registry)
        self._hedges = Counter(
            "wdmoe_hedges", "Dispatches sent to a further device because an answer was late", registry=registry
        )
        self._waited = Counter(
            "wdmoe_waited_seconds",
            "Time that answers waited for lost experts to be loaded elsewhere",
            registry=registry,
        )
        self._first_token = Histogram(
            "wdmoe_first_token_seconds", "Time to the first token", buckets=_SECONDS, registry=registry
        )
        self._per_token = Histogram(
            "wdmoe_token_seconds", "Mean time per later token", buckets=_TOKEN_SECONDS, registry=registry
        )
        self._devices = Gauge("wdmoe_devices", "Devices that take part", registry=registry)
        self._checks = _Checks()
        registry.register(self._checks)
        self._restarts = Gauge(
            "wdmoe_engine_restarts", "Times that another process of the model took over", registry=registry
        )

    def look(self, status: Mapping[str, object]) -> None:
        """Take over what the engine says of itself; before every scrape."""
        engine = status.get("engine")
        self._devices.set(device_count(status))
        self._checks.status = status
        self._restarts.set(engine["restarts"] if isinstance(engine, Mapping) else 0)

    def finished(self, reason: str, receipt: Receipt) -> None:
        """Count one answer that came to its end."""
        self.outcomes.labels(reason).inc()
        self._degraded.inc(receipt.degraded)
        self._suspect.inc(receipt.suspect)
        self._tokens.labels("prompt").inc(receipt.prompt_tokens)
        self._tokens.labels("completion").inc(receipt.completion_tokens)
        self._degraded_tokens.inc(receipt.degraded_tokens)
        self._dropped.observe(receipt.dropped_weight)
        self._lost.observe(receipt.lost_weight)
        for stage, seconds in asdict(receipt.stages).items():
            self._stages.labels(stage).inc(max(seconds, 0.0))
        self._bytes.labels("down").inc(receipt.bytes_down)
        self._bytes.labels("up").inc(receipt.bytes_up)
        self._retries.inc(receipt.retries)
        self._hedges.inc(receipt.hedges)
        self._waited.inc(receipt.waited_s)
        self._first_token.observe(receipt.first_token_s)
        if receipt.completion_tokens > 1:
            later_s = receipt.elapsed_s - receipt.first_token_s
            self._per_token.observe(later_s / (receipt.completion_tokens - 1))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
