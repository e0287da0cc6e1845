"""What this machine is, and how fast it runs a typical expert."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from importlib import resources
from pathlib import Path

import numpy as np
import psutil

from wdmoe.moe.expert import ExpertModel

PROBE_HIDDEN = 1024
PROBE_FLOPS = 2 * 3 * PROBE_HIDDEN * PROBE_HIDDEN  # one token through the three matrices of `probe.onnx`
WARM_UP_S = 0.2


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


def free_memory_bytes() -> int:
    """Memory that could be used without swapping."""
    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Memory of this process."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def measure_flops(expert: ExpertModel) -> float:
    """FLOP/s of one token at a time through `probe_expert`, by the best of about 0.2 s.

    The best, since other work on the machine makes a run longer and never shorter.
    """
    token = np.ones((1, PROBE_HIDDEN), np.float32)
    expert.run(token)
    times: list[float] = []
    end = time.perf_counter() + WARM_UP_S
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        expert.run(token)
        times.append(time.perf_counter() - start)
    return PROBE_FLOPS / min(times)
