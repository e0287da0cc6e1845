"""ONNX Runtime's sessions of a model's graphs. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy.typing as npt
import onnxruntime

from wdmoe.arrays import Float32Array
from wdmoe.backbone.graphs.writing.graph import Weights
from wdmoe.backbone.graphs.writing.plan import Attention, Layer, StationPlan
from wdmoe.backbone.graphs.writing.segments import LayerGraphs, attention_graph, head_graph, layer_graphs

# Unless asked for: each session has its own, a step waits for memory and not for arithmetic, and one core of two is for
# ZeroMQ, HTTP, verification, and devices on the same machine.
MOST_THREADS = 4
# Of the first layer up to its gate: smaller layers are kept a second time, as one graph. Reading larger ones takes so
# long that it does not matter how often a graph is run.
WHOLE_BYTES = 16 << 20
Session: TypeAlias = Any  # onnxruntime.InferenceSession
Value: TypeAlias = Any  # onnxruntime.OrtValue


def as_value(array: npt.NDArray[Any]) -> Value:
    """The same memory, as ONNX Runtime takes it."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, "cpu")


@dataclass(frozen=True, slots=True, eq=False)
class LayerSessions:
    """Of one decoder layer."""

    layer: Layer
    below: bool  # experts are
    before: Session
    attention: Session
    sinks: Value | None
    after: Session
    whole: Session | None  # all three in one
    shared: Session | None


class StationSessions:
    """All of a model, and what they share."""

    def __init__(self, plan: StationPlan, weights: Weights, bits: int, threads: int, positions: int) -> None:
        """See `GraphModel`."""
        self.plan = plan
        self.embedding: Float32Array = weights[plan.embedding]
        self._options = _options(threads)
        self._attention: dict[Attention, Session] = {}
        graphs = zip(plan.layers, layer_graphs(plan, weights, bits, WHOLE_BYTES), strict=True)
        self.layers: Sequence[LayerSessions] = [self._layer(layer, made, weights) for layer, made in graphs]
        self.head = self._session(head_graph(plan, weights, bits))
        self.cos, self.sin = (as_value(table) for table in plan.rope.tables(positions))

    def _layer(self, layer: Layer, graphs: LayerGraphs, weights: Weights) -> LayerSessions:
        part = layer.attention
        if part.shape not in self._attention:
            graph = attention_graph(part.shape, len(self.plan.rope.frequencies))
            self._attention[part.shape] = self._session(graph)
        return LayerSessions(
            layer=layer,
            below=self.plan.has_experts_below(layer.number),
            before=self._session(graphs.before),
            attention=self._attention[part.shape],
            sinks=as_value(weights[f"{part.prefix}sinks"]) if part.sinks else None,
            after=self._session(graphs.after),
            whole=None if graphs.whole is None else self._session(graphs.whole),
            shared=None if graphs.shared is None else self._session(graphs.shared),
        )

    def _session(self, data: bytes) -> Session:
        return onnxruntime.InferenceSession(data, self._options, providers=["CPUExecutionProvider"])


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or max(1, min(len(os.sched_getaffinity(0)) // 2, MOST_THREADS))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    # Many sessions whose threads spin between runs fight for the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
