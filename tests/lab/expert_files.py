"""ONNX experts for tests, and what they compute in NumPy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from wdmoe.arrays import FloatArray


@dataclass(frozen=True, eq=False)
class ExpertFile:
    """A SwiGLU expert as a device gets it."""

    data: bytes
    gate: FloatArray
    up: FloatArray
    down: FloatArray

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def apply(self, tokens: npt.NDArray[np.floating]) -> FloatArray:
        gated = tokens.astype(np.float64) @ self.gate
        out = (gated / (1 + np.exp(-gated)) * (tokens.astype(np.float64) @ self.up)) @ self.down
        return np.asarray(out, np.float32)


def make_expert(rng: np.random.Generator, hidden: int = 16, inner: int = 8, scale: float = 1.0) -> ExpertFile:
    gate, up, down = (
        (rng.standard_normal(shape) * scale / np.sqrt(shape[0])).astype(np.float32)
        for shape in ((hidden, inner), (hidden, inner), (inner, hidden))
    )
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["g"]),
        helper.make_node("Sigmoid", ["g"], ["s"]),
        helper.make_node("Mul", ["g", "s"], ["silu"]),
        helper.make_node("MatMul", ["x", "up"], ["u"]),
        helper.make_node("Mul", ["silu", "u"], ["h"]),
        helper.make_node("MatMul", ["h", "down"], ["y"]),
    ]
    weights = [numpy_helper.from_array(a, name) for a, name in ((gate, "gate"), (up, "up"), (down, "down"))]
    return ExpertFile(model_bytes(nodes, weights, hidden), gate, up, down)


def model_bytes(
    nodes: list[object],
    weights: list[object],
    hidden: int | str,
    tokens: int | str = "tokens",
    output: str = "y",
) -> bytes:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [tokens, hidden]) for name in ("x", output)]
    graph = helper.make_graph(nodes, "expert", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return bytes(model.SerializeToString())


def constant_expert(hidden: int, value: float) -> bytes:
    """y = x * value, for outputs that are not finite."""
    factor = numpy_helper.from_array(np.array(value, np.float32), "factor")
    return model_bytes([helper.make_node("Mul", ["x", "factor"], ["y"])], [factor], hidden)
