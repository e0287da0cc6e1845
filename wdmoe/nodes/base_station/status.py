"""The state of a base station as plain JSON types, for `/health`, `wdmoe-node status` and people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from wdmoe.backbone.format.bundle import Manifest
from wdmoe.config import StationSettings
from wdmoe.moe.health import DeviceHealth
from wdmoe.moe.lateness import Lateness
from wdmoe.moe.verification.inspector import DeviceFigures, Inspector
from wdmoe.nodes.base_station.control_plane import ControlPlane
from wdmoe.nodes.base_station.layer_rules import rank_of
from wdmoe.transport.exchange import ExchangeCounters
from wdmoe.transport.membership import Device


def describe(
    manifest: Manifest,
    settings: StationSettings,
    engine: Mapping[str, str],
    control: ControlPlane,
    health: DeviceHealth,
    lateness: Lateness,
    inspector: Inspector,
    counters: ExchangeCounters,
    placement: str,
) -> Mapping[str, object]:
    """Model, policy, devices and counters.

    `state` is "ok", "degraded" (an expert is not served, or a device that is here is in quarantine) or "waiting".
    """
    devices = control.roster.live()
    barred = [device for device in devices if device.device_id in control.barred]
    served = sum(any(d not in barred for d in holders) for holders in control.roster.serving().values())
    state = "waiting" if not served else "ok" if served == len(manifest.experts) and not barred else "degraded"
    figures = inspector.figures()
    return {
        "state": state,
        "model": manifest.model,
        "family": manifest.family,
        **engine,
        "station_precision": settings.station_precision,
        "policy": settings.policy,
        "rank": rank_of(settings, manifest),
        "whole_layers": settings.whole_layers,
        "budget_s": settings.budget_s,
        "budget_per_token_s": settings.budget_per_token_s,
        "max_dropped": settings.max_dropped,
        "bandwidth_hz": settings.bandwidth_hz,
        "allocation": settings.allocation,
        "wait_for_experts_s": settings.wait_for_experts_s,
        "encrypted": not settings.insecure,
        "experts": len(manifest.experts),
        "unserved": len(manifest.experts) - served,
        "experts_without_room": len(control.arrangement.unplaced),
        "placement": placement,
        "devices": [
            _device(device, health, lateness, figures.get(device.device_id, DeviceFigures()), device in barred)
            for device in devices
        ],
        "devices_lost": control.lost_devices,
        "devices_quarantined": len(barred),
        "verify": settings.verify,
        **asdict(inspector.counters),
        "skipped_verifications": inspector.skipped,
        **asdict(counters),
    }


def _device(
    device: Device, health: DeviceHealth, lateness: Lateness, figures: DeviceFigures, barred: bool
) -> Mapping[str, object]:
    report = device.report
    return {
        "name": report.name,
        "id": device.device_id,
        "hardware": report.hardware,
        "system": report.system,
        "provider": report.provider,
        "threads": report.threads,
        "memory_bytes": report.memory_bytes,
        "flops": report.flops,
        "downlink_snr_hz": report.downlink_snr_hz,
        "uplink_snr_hz": report.uplink_snr_hz,
        "experts": len(device.placed),
        "ready": len(device.ready),
        "attached": device.data_route is not None,
        "slow": device.data_route is not None and lateness.is_slow(device.data_route),
        "paused": device.data_route is not None and health.is_paused(device.data_route),
        "runs": device.done,
        "queued": device.queued,
        "rss_bytes": device.rss_bytes,
        "verified": figures.verified,
        "lies": figures.lies,
        "watched": figures.watched,
        "quarantined": barred,
        "rtt_s": None if device.data_route is None else health.seen_s(device.data_route),  # per token of an order
    }
