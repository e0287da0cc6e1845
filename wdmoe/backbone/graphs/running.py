"""Runs a model's segments in ONNX Runtime, with the experts asked for between them. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.graphs.plan import StationPlan
from wdmoe.backbone.graphs.segments import segments
from wdmoe.backbone.graphs.writing import Weights, given
from wdmoe.layer_call import Demand

MOST_THREADS = 4  # unless asked for: each session has its own, and a step waits for memory, not for arithmetic
Value = Any  # onnxruntime.OrtValue

# layer, (tokens, hidden) and what the gate asks, and what to compute meanwhile -> (tokens, hidden)
RunExperts = Callable[[int, Float32Array, Demand, "Callable[[], object] | None"], Float32Array]


@dataclass(slots=True, eq=False)
class Cache:
    """Keys and values of one request, for so many tokens. `seen`: of them are there."""

    arrays: dict[str, Float32Array]  # (1, heads, capacity, head_size)
    values: dict[str, Value]  # the same memory
    capacity: int
    seen: int = 0

    @property
    def token_bytes(self) -> int:
        """What one token takes."""
        return sum(array.nbytes for array in self.arrays.values()) // max(self.capacity, 1)

    def take(self, other: Cache, tokens: int) -> None:
        """Begin with the first tokens of another request of this model."""
        for name, array in self.arrays.items():
            array[:, :, :tokens] = other.arrays[name][:, :, :tokens]
        self.seen = tokens


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    layer: int
    session: onnxruntime.InferenceSession
    shared: onnxruntime.InferenceSession | None
    caches: tuple[int, ...]
    takes_moe: bool
    outputs: tuple[str, ...]  # beside the caches'


class GraphModel:
    """The station of a model, as graphs. One thread uses it."""

    def __init__(
        self, plan: StationPlan, weights: Weights, *, bits: int = 32, threads: int = 0, positions: int
    ) -> None:
        """Make all sessions.

        Args:
            plan: of the model.
            weights: gives its tensors.
            bits: of the large matrices: 32, 8 or 4.
            threads: of a step; 0: one for each core, a few at most.
            positions: longest prompt plus answer.
        """
        self.plan = plan
        self._embedding = given(weights, plan.embedding)
        options = _options(threads)
        self._parts = [_part(segment, options) for segment in segments(plan, weights, bits)]
        cos, sin = plan.rope.tables(positions)
        self._tables = {"cos": _value(cos), "sin": _value(sin)}

    def new_cache(self, tokens: int) -> Cache:
        """Room for a request of so many tokens in all."""
        arrays: dict[str, Float32Array] = {}
        for layer in self.plan.layers:
            for kind in ("key", "value"):
                shape = (1, layer.attention.kv_heads, tokens, layer.attention.head_size)
                arrays[f"{kind}.{layer.number}"] = np.zeros(shape, np.float32)  # takes memory as it is filled
        return Cache(arrays, {name: _value(array) for name, array in arrays.items()}, tokens)

    def step(
        self, tokens: Int32Array, cache: Cache, experts: RunExperts, scored: Literal["last", "all", "none"] = "last"
    ) -> Float32Array:
        """Run some more tokens of a request.

        Args:
            tokens: (n,) ids.
            cache: of the request; takes them in.
            experts: computes each layer's experts.
            scored: the tokens whose scores are wanted.
        Returns:
            (scored, vocabulary) scores for the token after each of them.
        """
        x = self._embedding[tokens][None] * np.float32(self.plan.embedding_multiplier)
        seen = cache.seen + len(tokens)
        lengths = {"seen": np.array([seen - 1], np.int32), "longest": np.array([seen], np.int32)}
        moe: Float32Array | None = None
        for part in self._parts[:-1]:
            x, hidden, gate, weights, chosen = self._run(part, x, moe, lengths, cache)
            rows = hidden[0]
            ahead = _Shared(part.shared, hidden) if part.shared is not None else None
            demand = Demand(chosen[0], weights[0], gate[0])
            moe = experts(part.layer, rows, demand, None if ahead is None else ahead.compute)[None]
            if ahead is not None:
                moe = moe + ahead.compute()
        last = self._parts[-1]
        if scored != "all" and not last.caches:
            kept = slice(-1, None) if scored == "last" else slice(0, 0)
            x, moe = x[:, kept], None if moe is None else moe[:, kept]
        scores: Float32Array = self._run(last, x, moe, lengths, cache)[0][0] if x.size else x[0]
        cache.seen = seen
        return scores[-1:] if scored == "last" else scores

    def _run(
        self, part: _Part, x: Float32Array, moe: Float32Array | None, lengths: dict[str, Any], cache: Cache
    ) -> list[Any]:
        binding = part.session.io_binding()
        binding.bind_cpu_input("x", np.ascontiguousarray(x))
        if part.takes_moe:
            binding.bind_cpu_input("moe", np.ascontiguousarray(moe))
        if part.caches:
            for name, array in lengths.items():
                binding.bind_cpu_input(name, array)
            for name, value in self._tables.items():
                binding.bind_ortvalue_input(name, value)
        for layer in part.caches:
            for kind in ("key", "value"):  # the same memory: nothing is copied but what is new
                value = cache.values[f"{kind}.{layer}"]
                binding.bind_ortvalue_input(f"past_{kind}.{layer}", value)
                binding.bind_ortvalue_output(f"present_{kind}.{layer}", value)
        for name in part.outputs:
            binding.bind_output(name, "cpu")
        part.session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[2 * len(part.caches) :]]  # in the order of binding


class _Shared:
    """A layer's shared expert, computed while the others are away or, at the latest, when it is needed."""

    def __init__(self, session: onnxruntime.InferenceSession, hidden: Float32Array) -> None:
        self._session, self._hidden = session, hidden
        self._result: Float32Array | None = None

    def compute(self) -> Float32Array:
        found = self._result
        if found is None:
            self._result = found = self._session.run(None, {"x": self._hidden})[0]
        return found


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or min(os.cpu_count() or 1, MOST_THREADS)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    # Many sessions whose threads spin between runs fight for the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


_MOE_OUTPUTS = ("y", "hidden", "gate", "weights", "experts")


def _part(segment: Any, options: onnxruntime.SessionOptions) -> _Part:
    def session(data: bytes) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    return _Part(
        segment.layer,
        session(segment.data),
        None if segment.shared is None else session(segment.shared),
        segment.caches,
        segment.takes_moe,
        _MOE_OUTPUTS if segment.layer >= 0 else ("logits",),
    )


def _value(array: Float32Array) -> Value:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, "cpu")
