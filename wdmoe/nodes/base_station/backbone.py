"""Chooses what computes attention and gate: the graphs, or transformers where a model or a setting needs that."""

from __future__ import annotations

import ctypes
import logging
from importlib.util import find_spec

from wdmoe.backbone.format.bundle import Bundle
from wdmoe.backbone.graphs.passes import RunLayer, Turns
from wdmoe.backbone.graphs.station import load_graph_station
from wdmoe.backbone.runtime.engine import Backbone
from wdmoe.config import StationSettings
from wdmoe.errors import ConfigError, MissingExtraError, UnsupportedModelError
from wdmoe.nodes.memory import free_memory_bytes

log = logging.getLogger(__name__)

TOGETHER = 32  # requests in one pass: further ones hardly add tokens a second
BY_TURNS = 4  # requests that each have passes of their own
_DRIVER = "libcuda.so.1"  # of NVIDIA


def open_backbone(bundle: Bundle, settings: StationSettings, run: RunLayer, turns: Turns) -> tuple[Backbone, str]:
    """Load a bundle's station. `turns`: of the requests' greenlets.

    Returns:
        What computes, and why that.

    Raises:
        ConfigError: `--engine graphs` for what has none.
        MissingExtraError: transformers would have to compute, and is not installed.
        BundleError: the station's files do not make up the model.
    """
    reason = _why_not(settings)
    if not reason:
        try:
            station = load_graph_station(
                bundle,
                run,
                turns,
                prefill_chunk=settings.prefill_chunk,
                precision=settings.station_precision,
                threads=settings.threads,
                prefix_bytes=settings.prefix_cache_bytes,
                alternates=not settings.bandwidth_hz,  # a layer has the whole band
            )
            return station, f"there are graphs for {bundle.manifest.family}"
        except UnsupportedModelError as error:
            reason = str(error)
    if settings.engine == "graphs" or settings.station_precision != "fp32":
        raise ConfigError(f"there are no graphs for this base station: {reason}; leave --engine and its precision out")
    return _open_transformers(bundle, settings, run, reason), reason


def _open_transformers(bundle: Bundle, settings: StationSettings, run: RunLayer, reason: str) -> Backbone:
    try:
        from wdmoe.backbone.runtime.experts_seam import attach
        from wdmoe.backbone.runtime.station import load_station
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "wdmoe":
            raise  # a bug of ours
        raise MissingExtraError(
            f"transformers would compute attention and gate ({reason}), and {error.name} is not installed: "
            "pip install 'wdmoe[export]'"
        ) from error
    log.info("transformers computes attention and gate: %s", reason)
    station = load_station(bundle, settings.device, settings.dtype, settings.prefill_chunk, settings.threads)
    attach(station.model, station.experts, station.routers, run)
    return station


def most_active(backbone: Backbone, settings: StationSettings) -> int:
    """Requests that are computed at the same time."""
    if settings.max_active:
        return settings.max_active
    if backbone.kind == "graphs":
        return TOGETHER
    return 1 if settings.bandwidth_hz else BY_TURNS  # requests by turns would each take a layer for the whole band


def room_bytes(settings: StationSettings) -> int:
    """For keys and values of these requests, now that the model is loaded."""
    return settings.kv_bytes or free_memory_bytes() // 2


def _why_not(settings: StationSettings) -> str:
    """What stands against the graphs; "" if nothing does."""
    if settings.engine == "transformers":
        return "as --engine says"
    if settings.record_trace is not None:
        return "a gate trace is recorded there"
    if settings.dtype not in ("auto", "float32"):
        return f"graphs compute in float32, not {settings.dtype}"
    if settings.device not in ("auto", "cpu") or (settings.device == "auto" and _torch_has_cuda()):
        return "the graphs run on a CPU"
    return ""


def _torch_has_cuda() -> bool:
    """Whether torch is there and finds a GPU. It is imported only where a driver is: that takes seconds."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
