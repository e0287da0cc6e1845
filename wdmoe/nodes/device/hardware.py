"""What this machine is, and how fast it runs a typical expert."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import psutil

from wdmoe.moe.expert import ExpertModel

PROBE_HIDDEN = 1024
PROBE_FLOPS = 2 * 3 * PROBE_HIDDEN * PROBE_HIDDEN  # one token through the three matrices of `probe.onnx`
WARM_UP_S = 0.03  # a fleet that starts on one machine has other work


def probe_expert() -> bytes:
    """A tiny file that opens as an expert of usual size, its weights constants (`tools/data/make_probe`)."""
    return resources.files("wdmoe.nodes.device").joinpath("data", "probe.onnx").read_bytes()


def board_name(root: Path = Path("/")) -> str:
    """Model of the board (Jetson, Raspberry Pi), else of the CPU."""
    try:
        text = (root / "proc/device-tree/model").read_text(encoding="utf-8", errors="replace")
        return text.strip("\0\n ")
    except OSError:
        return _cpu_name(root)


def _cpu_name(root: Path) -> str:
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next(filter(None, models), platform.processor() or platform.machine() or "unknown")


def jetpack_release(root: Path = Path("/")) -> str:
    """First line of NVIDIA's release file, "" elsewhere."""
    try:
        lines = (root / "etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[0].strip("# ") if lines else ""


def tensorrt_version() -> str:
    """Version of the TensorRT library, "" where there is none."""
    for name in ("libnvinfer.so.10", "libnvinfer.so.8", "libnvinfer.so"):
        try:
            return str(ctypes.CDLL(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
    return ""


def system_name() -> str:
    """Operating system and architecture."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def resident_bytes() -> int:
    """Memory of this process."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def measure_flops(
    expert: ExpertModel, clock: Callable[[], float] | None = None, longest_s: float | None = None
) -> float:
    """FLOP/s of one token at a time through `probe_expert`, by the best of some runs.

    The best, since other work on the machine makes a run longer and never shorter.

    Args:
        expert: opened from `probe_expert`.
        clock: `time.thread_time` where this thread does all the arithmetic: it stands still while others have the core.
            None: the time that passes.
        longest_s: go on for so long. None: as at the start of a device.
    """
    clock = clock or time.perf_counter
    token = np.ones((1, PROBE_HIDDEN), np.float32)
    expert.run(token)
    times: list[float] = []
    end = time.perf_counter() + (WARM_UP_S if longest_s is None else longest_s)
    while len(times) < 3 or time.perf_counter() < end:
        start = clock()
        expert.run(token)
        times.append(clock() - start)
    return PROBE_FLOPS / max(min(times), 1e-9)
