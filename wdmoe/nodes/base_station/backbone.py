"""Chooses what computes attention and gate: the graphs, or transformers where a model or a setting needs that."""

from __future__ import annotations

import logging

import torch

from wdmoe.backbone.format.bundle import Bundle
from wdmoe.backbone.graphs.passes import RunLayer, Turns
from wdmoe.backbone.graphs.station import load_graph_station
from wdmoe.backbone.runtime.engine import Backbone
from wdmoe.backbone.runtime.experts_seam import attach
from wdmoe.backbone.runtime.station import load_station
from wdmoe.config import StationSettings
from wdmoe.errors import ConfigError, UnsupportedModelError

log = logging.getLogger(__name__)


def open_backbone(bundle: Bundle, settings: StationSettings, run: RunLayer, turns: Turns) -> Backbone:
    """Load a bundle's station. `turns`: of the requests' greenlets.

    Raises:
        ConfigError: `--engine graphs` for what has none.
        BundleError: the station's files do not make up the model.
    """
    reason = _why_not(settings)
    if not reason:
        try:
            return load_graph_station(
                bundle,
                run,
                turns,
                prefill_chunk=settings.prefill_chunk,
                precision=settings.station_precision,
                threads=settings.threads,
                prefix_bytes=settings.prefix_cache_bytes,
            )
        except UnsupportedModelError as error:
            reason = str(error)
    if settings.engine == "graphs" or settings.station_precision != "fp32":
        raise ConfigError(f"there are no graphs for this base station: {reason}; leave --engine and its precision out")
    log.info("transformers computes attention and gate: %s", reason)
    station = load_station(bundle, settings.device, settings.dtype, settings.prefill_chunk)
    attach(station.model, station.experts, station.routers, run)
    return station


def _why_not(settings: StationSettings) -> str:
    """What stands against the graphs; "" if nothing does."""
    if settings.engine == "transformers":
        return "as --engine says"
    if settings.record_trace is not None:
        return "a gate trace is recorded there"
    if settings.dtype not in ("auto", "float32"):
        return f"graphs compute in float32, not {settings.dtype}"
    if settings.device not in ("auto", "cpu") or (settings.device == "auto" and torch.cuda.is_available()):
        return "the graphs run on a CPU"
    return ""
