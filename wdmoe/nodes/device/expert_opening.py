"""Puts together how this device opens experts: provider, threads, and engines built behind the scenes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import onnxruntime as ort

from wdmoe.config import DeviceSettings
from wdmoe.moe.background_build import BackgroundBuild
from wdmoe.moe.expert import OpenExpert
from wdmoe.moe.providers import (
    CUDA,
    TENSORRT,
    OnnxExpert,
    TensorRtSite,
    choose_provider,
    cpu_chain,
    cuda_chain,
    tensorrt_chain,
)
from wdmoe.nodes.device import hardware

MEASURE_AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class ExpertOpener:
    """How experts are opened here."""

    provider: str  # the one that is, or will be, in use
    flops: float  # measured with what serves at first
    measure: Callable[[], float]  # the same once more, for longer; from a worker thread
    open: OpenExpert
    close: Callable[[], None]


def expert_opener(settings: DeviceSettings) -> ExpertOpener:
    """Choose the provider, measure it. May take a second; call it from a worker thread.

    Raises:
        ConfigError: the provider asked for can't be used here.
    """
    probe = hardware.probe_expert()
    provider = choose_provider(settings.provider, probe)
    threads = settings.threads
    first_chain = cuda_chain() if provider == CUDA else cpu_chain()
    clock = time.thread_time if provider != CUDA and threads == 1 else time.perf_counter

    def measure(longest_s: float | None = MEASURE_AGAIN_S) -> float:
        return hardware.measure_flops(OnnxExpert(probe, threads, first_chain), clock, longest_s)

    flops = measure(None)
    if provider == TENSORRT:
        site = TensorRtSite(folder=settings.cache / "engines", fingerprint=_site_fingerprint())
        build = BackgroundBuild(
            lambda file: OnnxExpert(file, threads, cpu_chain()),
            lambda file, sha256, hidden: OnnxExpert(file, threads, tensorrt_chain(site, sha256, hidden)),
        )
        return ExpertOpener(provider, flops, measure, build.open, build.close)
    return ExpertOpener(
        provider, flops, measure, lambda file, _sha256: OnnxExpert(file, threads, first_chain), _nothing
    )


def _site_fingerprint() -> str:
    """Engines are valid only where all of these are the same."""
    parts = (
        hardware.board_name(),
        hardware.jetpack_release(),
        hardware.tensorrt_version(),
        ort.__version__,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _nothing() -> None:
    """CPU and CUDA sessions close with their last reference."""
