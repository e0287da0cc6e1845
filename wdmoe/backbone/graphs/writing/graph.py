"""An ONNX graph as it is written: ends, nodes, a model's tensors. Opset 17, and contrib operators of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from wdmoe.arrays import Float32Array
from wdmoe.backbone.format.onnx_graph import IR_VERSION, OPSET

CONTRIB = "com.microsoft"
OPERATORS = frozenset(
    {
        ("", "Abs"), ("", "Add"), ("", "Cast"), ("", "Clip"), ("", "Concat"), ("", "Div"), ("", "Equal"),
        ("", "GatherElements"), ("", "Greater"), ("", "GreaterOrEqual"), ("", "LayerNormalization"), ("", "MatMul"),
        ("", "Max"), ("", "Mul"), ("", "ReduceMax"), ("", "ReduceMin"), ("", "ReduceSum"), ("", "Reshape"),
        ("", "Sigmoid"), ("", "SimplifiedLayerNormalization"), ("", "Softmax"), ("", "Split"), ("", "Sub"),
        ("", "TopK"), ("", "Transpose"), ("", "Unsqueeze"), ("", "Where"), (CONTRIB, "GroupQueryAttention"),
        (CONTRIB, "MatMulNBits"),
    }
)  # fmt: skip

Weights = Mapping[str, Float32Array]  # a model's tensors, widened to float32
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


class Graph:
    """Nodes and weights of one segment as they come together."""

    def __init__(self, weights: Weights, bits: int) -> None:
        """`bits`: of the large matrices: 32, 8 or 4."""
        self._weights = weights
        self.bits = bits
        self._nodes: list[onnx.NodeProto] = []
        self._stored: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._fresh = 0

    # ---- ends

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """An input of the segment."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        """An output of the segment."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))

    def finish(self, name: str) -> bytes:
        """The whole model."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._stored.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def tell(self, value: str, name: str, width: int) -> None:
        """Make a value an output, (tokens, width) float32, by this name."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for place, each in enumerate(names):
                    if each == value:
                        names[place] = name
        self.output(name, FLOAT, ("tokens", width))

    # ---- parts of nodes

    def node(self, kind: str, inputs: Sequence[str], output: str = "", domain: str = "", **attributes: Any) -> str:
        """One node with one output, whose name is made up unless given."""
        name = output or self.name(kind)
        self._nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attributes))
        return name

    def nodes(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **more: Any) -> None:
        """One node with several outputs."""
        self._nodes.append(helper.make_node(kind, list(inputs), list(outputs), domain=domain, **more))

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        """A stored value."""
        if name not in self._stored:
            self._stored[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def shape(self, name: str) -> Sequence[int]:
        """Of a stored value."""
        return tuple(self._stored[name].dims)

    def name(self, kind: str) -> str:
        """A name that no other value has."""
        self._fresh += 1
        return f"{kind.lower()}{self._fresh}"

    def tensor(self, name: str) -> str:
        """A small tensor of the model."""
        return self.constant(name, self.value(name))

    def value(self, name: str) -> Float32Array:
        """A tensor's numbers, which has to be there."""
        return self._weights[name]

    def has(self, name: str) -> bool:
        """Whether the model has this tensor."""
        return name in self._weights
