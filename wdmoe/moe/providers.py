"""ONNX Runtime: which execution provider runs the experts, and how a file becomes a callable expert.

What is proven: everything with the CPU provider. The CUDA and TensorRT paths follow ONNX Runtime's manual,
and tests check the options they pass; they never ran on such hardware (docs/guide_device.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort

from wdmoe.arrays import Float32Array
from wdmoe.errors import ConfigError, ExpertError
from wdmoe.transport.codec.messages import Activations

log = logging.getLogger(__name__)

CPU, CUDA, TENSORRT = "cpu", "cuda", "tensorrt"
BEST_FIRST = (TENSORRT, CUDA, CPU)
RUNTIME_NAMES = {
    CPU: "CPUExecutionProvider",
    CUDA: "CUDAExecutionProvider",
    TENSORRT: "TensorrtExecutionProvider",
}
PACKAGES = {
    CPU: "onnxruntime",
    CUDA: "onnxruntime-gpu (on a Jetson: NVIDIA's wheel for its JetPack)",
    TENSORRT: "onnxruntime-gpu with TensorRT installed (on a Jetson: NVIDIA's wheel for its JetPack)",
}
LONGEST_BATCH = 512  # tokens in one TensorRT run; a shape outside the profile would rebuild the engine in a request
USUAL_BATCH = 4
WORKSPACE_BYTES = 256 << 20  # a Jetson shares its memory between CPU and GPU

ProviderOptions: TypeAlias = Mapping[str, str]
ProviderChain: TypeAlias = Sequence[tuple[str, ProviderOptions]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtSite:
    """Where engines and timings are kept, and what they are valid for."""

    folder: Path
    fingerprint: str  # of board, JetPack, TensorRT and ONNX Runtime


def choose_provider(wanted: str, probe: bytes) -> str:
    """Pick the provider that runs the experts: one that ONNX Runtime has and that can open `probe`.

    Args:
        wanted: "auto", "cpu", "cuda" or "tensorrt".
        probe: some small expert's file.
    Raises:
        ConfigError: the one asked for cannot be used here.
    """
    usable = [name for name in BEST_FIRST if wanted in ("auto", name) and _works(name, probe)]
    if usable:
        return usable[0]
    found = ", ".join(name for name in BEST_FIRST if RUNTIME_NAMES[name] in ort.get_available_providers())
    packages = PACKAGES.get(wanted, PACKAGES[CPU])
    raise ConfigError(
        f"--provider {wanted} can't be used here (installed: {found or 'none'}); it comes with {packages}"
    )


def _works(name: str, probe: bytes) -> bool:
    """Listed isn't enough: without its driver ONNX Runtime falls back to CPU with a mere warning."""
    if RUNTIME_NAMES[name] not in ort.get_available_providers():
        return False
    try:
        session = ort.InferenceSession(probe, session_options(1), providers=[RUNTIME_NAMES[name]])
    except Exception as error:  # the runtime has a dozen exception types with no common base
        log.warning("provider %s is installed but can't open an expert: %s", name, _first_line(error))
        return False
    return bool(session.get_providers()[0] == RUNTIME_NAMES[name])


def session_options(threads: int) -> ort.SessionOptions:
    """Options for one of hundreds of small sessions in one process, called one after the other.

    Threads don't spin: they would burn the cores that the network needs. No arena and no memory pattern per
    session: an expert's scratch is a few kilobytes, and it measured the same speed without.
    """
    ort.disable_telemetry_events()  # nothing about a user's machine is collected on our behalf
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3  # errors; the runtime warns about every fallback of every session
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def cpu_chain() -> ProviderChain:
    """The CPU alone."""
    return ((RUNTIME_NAMES[CPU], {}),)


def cuda_chain() -> ProviderChain:
    """CUDA, and CPU for what it doesn't know."""
    return ((RUNTIME_NAMES[CUDA], {"arena_extend_strategy": "kSameAsRequested"}), *cpu_chain())


def tensorrt_chain(site: TensorRtSite, sha256: str, hidden: int) -> ProviderChain:
    """TensorRT in half precision, its engine cached for this file, board and software; then CUDA, then CPU.

    The folder is made private: an engine is native code, and whoever may write it may run it.

    Raises:
        ExpertError: the folder can't be made.
    """
    folder = site.folder / site.fingerprint
    try:
        for path in (site.folder, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
    except OSError as error:
        raise ExpertError(f"engine folder {folder}: {error.strerror or error}") from error
    options = {
        "trt_fp16_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": sha256,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_max_workspace_size": str(WORKSPACE_BYTES),
        "trt_context_memory_sharing_enable": "1",
        "trt_profile_min_shapes": f"x:1x{hidden}",
        "trt_profile_opt_shapes": f"x:{USUAL_BATCH}x{hidden}",
        "trt_profile_max_shapes": f"x:{LONGEST_BATCH}x{hidden}",
    }
    return ((RUNTIME_NAMES[TENSORRT], options), *cuda_chain())


class OnnxExpert:
    """An expert in an ONNX Runtime session. One thread at a time calls `run`."""

    def __init__(self, model: bytes, threads: int, chain: ProviderChain) -> None:
        """Open `model`, a self-contained file: input `x`, output `y`, both float32 (tokens, hidden).

        Raises:
            ExpertError: the runtime can't open it, or it isn't such an expert.
        """
        try:
            self._session = ort.InferenceSession(
                model,
                session_options(threads),
                providers=[name for name, _ in chain],
                provider_options=[dict(options) for _, options in chain],
            )
        except Exception as error:  # the runtime has a dozen exception types with no common base
            raise ExpertError(f"ONNX Runtime can't open an expert: {_first_line(error)}") from error
        if self._session.get_providers()[0] != chain[0][0]:
            raise ExpertError(f"ONNX Runtime fell back from {chain[0][0]} to {self._session.get_providers()[0]}")
        self._session.disable_fallback()  # an error is answered, not papered over by a new session
        # The file stays in this attribute only for that fallback: as much memory again as the weights take.
        self._session._model_bytes = b""
        self.hidden = _hidden_of(self._session)
        self._longest = LONGEST_BATCH if chain[0][0] == RUNTIME_NAMES[TENSORRT] else 0
        self._row: _OneRow | None = None
        if chain[0][0] == RUNTIME_NAMES[CPU]:
            self._row = _OneRow(self._session, self.hidden)

    def run(self, tokens: Activations) -> Float32Array:
        """As `wdmoe.moe.expert.ExpertModel.run`."""
        try:
            if len(tokens) == 1 and self._row is not None:
                return self._row.run(tokens)
            if 0 < self._longest < len(tokens):
                pieces = math.ceil(len(tokens) / self._longest)
                return np.concatenate([self._run(piece) for piece in np.array_split(tokens, pieces)])
            return self._run(tokens)
        except Exception as error:  # as above
            raise ExpertError(f"ONNX Runtime failed in an expert: {_first_line(error)}") from error

    def _run(self, tokens: Activations) -> Float32Array:
        result: Float32Array = self._session.run(["y"], {"x": np.ascontiguousarray(tokens, np.float32)})[0]
        return result


class _OneRow:
    """The way of a single token: input and output bound once to arrays of ours.

    It saves a quarter of a small expert's time (20 instead of 27 us at 96 x 576). Only for the CPU provider:
    elsewhere binding copies the input to the accelerator at once, and later rows would never be seen.
    """

    def __init__(self, session: ort.InferenceSession, hidden: int) -> None:
        self._x = np.zeros((1, hidden), np.float32)
        self._y = np.zeros((1, hidden), np.float32)
        self._run = session.run_with_iobinding
        self._binding = session.io_binding()
        self._binding.bind_input("x", "cpu", 0, np.float32, self._x.shape, self._x.ctypes.data)
        self._binding.bind_output("y", "cpu", 0, np.float32, self._y.shape, self._y.ctypes.data)

    def run(self, token: Activations) -> Float32Array:
        """(1, hidden) in, (1, hidden) out, overwritten by the next call."""
        self._x[...] = token
        self._run(self._binding)
        return self._y


def _hidden_of(session: Any) -> int:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    ends = [(end.name, end.type, len(end.shape)) for end in (*inputs, *outputs)]
    if ends != [("x", "tensor(float)", 2), ("y", "tensor(float)", 2)]:
        raise ExpertError(f"an expert needs one input x and one output y, float32 (tokens, hidden); got {ends}")
    hidden = inputs[0].shape[1]
    if not isinstance(hidden, int) or hidden < 1 or isinstance(inputs[0].shape[0], int):
        raise ExpertError(f"an expert's input must be (any number of tokens, fixed width), got {inputs[0].shape}")
    return hidden


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
