"""One expert as a self-contained ONNX graph: x (tokens, hidden) float32 -> y (tokens, hidden) float32.

Opset 17 and IR 8, so that the ONNX Runtime of every board loads it, and only operators of a short list. Gate
and up are two MatMuls with weights stored (in, out): as fast as one MatMul and a Split, and an interleaved
layout costs nothing at run time. No torch in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from wdmoe.arrays import Float32Array
from wdmoe.errors import BundleError

OPSET = 17
IR_VERSION = 8
MAX_GRAPH_BYTES = (2 << 30) - (1 << 20)  # protobuf's limit, less room for names
OPERATORS = frozenset(
    {
        "Abs", "Add", "Cast", "Clip", "DequantizeLinear", "Div", "Erf", "Exp", "Gemm", "HardSwish",
        "Identity", "LeakyRelu", "MatMul", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "ReduceMean",
        "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh"
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix (in, out) and its bias (out,) or None, float32."""

    weight: Float32Array
    bias: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class Steps:
    """Elementwise work between the matrices, translated from a torch function (`gate_function.trace`).

    `columns[i]` says which columns of the function's argument its input `inputs[i]` is; a graph builds them
    as separate matrices and never cuts an activation.
    """

    inputs: tuple[str, ...]
    columns: tuple[slice, ...]
    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[tuple[str, npt.NDArray[Any]], ...]
    output: str


def gated_silu(size: int) -> Steps:
    """silu(gate) * up of an expert with `size` neurons, gate columns first: what most families compute.

    Node by node what `wdmoe.backbone.export.gate_function.trace` makes of the families' own code.
    """
    gate, up = "gate.in0_1", f"gate.in{size}_1"
    nodes = (
        helper.make_node("Sigmoid", [gate], ["gate.v1"]),
        helper.make_node("Mul", [gate, "gate.v1"], ["gate.v2"]),
        helper.make_node("Mul", ["gate.v2", up], ["gate.v3"]),
    )
    return Steps((gate, up), (slice(0, size, 1), slice(size, 2 * size, 1)), nodes, (), "gate.v3")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGraph:
    """A finished graph."""

    data: bytes
    flops_per_token: int
    weight_bytes: int


def build_expert(up: Linear, steps: Steps, down: Linear, norm: Steps | None, precision: str) -> ExpertGraph:
    """Put an expert together.

    Args:
        up: hidden -> what `steps` takes (gate and up side by side, in the family's own layout).
        steps: the gate function or, without a gate, the activation.
        down: what `steps` gives -> hidden.
        norm: what follows the expert inside its module, or None.
        precision: of the stored matrices; "fp16" is widened and "int8" (symmetric, one scale per output
            column)
            dequantised in the graph. Biases and all arithmetic at the border stay float32.
    Raises:
        BundleError: the graph would not fit into one file, or a weight does not fit into fp16.
    """
    graph = _Graph(precision)
    for name, columns in zip(steps.inputs, steps.columns, strict=True):
        bias = None if up.bias is None else np.ascontiguousarray(up.bias[columns])
        graph.linear("x", Linear(np.ascontiguousarray(up.weight[:, columns]), bias), name)
    graph.steps(steps)
    last = "y" if norm is None else norm.inputs[0]
    graph.linear(steps.output, down, last)
    if norm is not None:
        graph.steps(norm)
        graph.node("Identity", [norm.output], "y")
    return graph.finish(up.weight.shape[0], down.weight.shape[1])


class _Graph:
    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[TensorProto] = []
        self._bytes = 0
        self._flops = 0

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: object) -> None:
        self._nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))

    def steps(self, steps: Steps) -> None:
        for name, value in steps.constants:
            self._store(name, value)
        self._nodes.extend(steps.nodes)

    def linear(self, source: str, linear: Linear, output: str) -> None:
        weight = self._matrix(f"{output}.weight", linear.weight)
        self._flops += 2 * linear.weight.size
        if linear.bias is None:
            self.node("MatMul", [source, weight], output)
        else:
            self._store(f"{output}.bias", linear.bias)
            self.node("Gemm", [source, weight, f"{output}.bias"], output)

    def _matrix(self, name: str, weight: Float32Array) -> str:
        if self._precision == "fp32":
            return self._store(name, weight)
        if self._precision == "fp16":
            if np.abs(weight).max(initial=0) > np.finfo(np.float16).max:
                raise BundleError("a weight is too large for fp16; export with --precision fp32 or int8")
            self.node("Cast", [self._store(f"{name}.f16", weight.astype(np.float16))], name, to=TensorProto.FLOAT)
            return name
        whole, scale = quantise(weight)
        parts = [self._store(f"{name}.int8", whole), self._store(f"{name}.scale", scale)]
        # ONNX Runtime (seen in 1.32) makes one 8-bit product of this and the MatMul: see docs/bundle.md
        self.node("DequantizeLinear", parts, name, axis=1)
        return name

    def _store(self, name: str, value: npt.NDArray[Any]) -> str:
        self._bytes += value.nbytes
        if self._bytes > MAX_GRAPH_BYTES:
            raise BundleError(
                f"an expert needs more than 2 GiB in {self._precision}, which one ONNX file cannot hold; "
                "export with --precision fp16 or int8"
            )
        self._weights.append(numpy_helper.from_array(value, name))
        return name

    def finish(self, width_in: int, width_out: int) -> ExpertGraph:
        graph = helper.make_graph(
            self._nodes,
            "expert",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", width_in])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", width_out])],
            self._weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        data = model.SerializeToString(deterministic=True)
        return ExpertGraph(data=data, flops_per_token=self._flops, weight_bytes=self._bytes)


def quantise(weight: Float32Array) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """Symmetric int8 with one scale per output column: weight (in, out) ~ whole (in, out) * scale (out,)."""
    largest = np.abs(weight).max(axis=0, initial=0)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    # the smallest numbers underflow to a scale of zero
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def run_graph(data: bytes, x: Float32Array) -> Float32Array:
    """What the ONNX standard says a graph gives, computed by onnx's own reference in NumPy."""
    from onnx.reference import ReferenceEvaluator

    with np.errstate(all="ignore"):  # its sigmoid computes both branches and takes one
        (y,) = ReferenceEvaluator(onnx.load_model_from_string(data)).run(None, {"x": x})
    return np.asarray(y, dtype=np.float32)


def check_graph(path: Path, name: str, hidden: int) -> None:
    """Refuse a file that is not one of our graphs.

    Raises:
        BundleError: unreadable, another version, an operator off the list, weights elsewhere, or other ends.
    """
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise BundleError(f"cannot read {name}: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError: its class moved between versions
        raise BundleError(f"{name} is not an ONNX graph") from error
    opsets = [(entry.domain, entry.version) for entry in model.opset_import]
    if model.ir_version > IR_VERSION or opsets != [("", OPSET)] or model.functions:
        raise BundleError(f"{name} must use opset {OPSET}, IR {IR_VERSION} at most and no functions of its own")
    for node in model.graph.node:
        if node.domain or node.op_type not in OPERATORS:
            raise BundleError(f"{name} uses the operator {node.op_type!r}, which is not on the list")
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise BundleError(f"{name} keeps weights outside of its file")
    if model.graph.sparse_initializer or _ends(model.graph) != ([("x", hidden)], [("y", hidden)]):
        raise BundleError(f"{name} must map x (tokens, {hidden}) to y (tokens, {hidden}), float32")


def _ends(graph: onnx.GraphProto) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    def end(value: onnx.ValueInfoProto) -> tuple[str, int]:
        kind = value.type.tensor_type
        fits = kind.elem_type == TensorProto.FLOAT and len(kind.shape.dim) == 2
        return value.name, kind.shape.dim[1].dim_value if fits else -1

    return [end(value) for value in graph.input], [end(value) for value in graph.output]
