"""Pieces of a decoder layer as ONNX nodes. Opset 17 and contrib operators of ONNX Runtime, from a short list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from wdmoe.arrays import Float32Array
from wdmoe.backbone.graphs.plan import Attention, Gated, Router
from wdmoe.backbone.graphs.quantise import BLOCK, quantised

OPSET = 17
CONTRIB = "com.microsoft"
IR_VERSION = 8
OPERATORS = frozenset(
    {
        ("", "Add"), ("", "Cast"), ("", "Clip"), ("", "Div"), ("", "MatMul"), ("", "Mul"), ("", "ReduceSum"),
        ("", "Reshape"), ("", "Sigmoid"), ("", "SimplifiedLayerNormalization"), ("", "Softmax"), ("", "Split"),
        ("", "TopK"), (CONTRIB, "GroupQueryAttention"), (CONTRIB, "MatMulNBits"),
    }
)  # fmt: skip

Weights = Callable[[str], "Float32Array | None"]  # a tensor by name, widened to float32; None where there is none
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32


def given(weights: Weights, name: str) -> Float32Array:
    """A tensor that has to be there.

    Raises:
        KeyError: it is not.
    """
    found = weights(name)
    if found is None:
        raise KeyError(name)
    return found


class Graph:
    """Nodes and weights of one segment as they come together."""

    def __init__(self, weights: Weights, bits: int) -> None:
        """`bits`: of the large matrices: 32, 8 or 4."""
        self._weights = weights
        self._bits = bits
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
        """Make a value an output, (rows, tokens, width) float32, by this name."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for place, each in enumerate(names):
                    if each == value:
                        names[place] = name
        self.output(name, FLOAT, ("rows", "tokens", width))

    # ---- parts of nodes

    def node(self, kind: str, inputs: Sequence[str], output: str = "", domain: str = "", **attributes: Any) -> str:
        """One node with one output, whose name is made up unless given."""
        name = output or self._name(kind)
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

    def _name(self, kind: str) -> str:
        self._fresh += 1
        return f"{kind.lower()}{self._fresh}"

    def tensor(self, name: str) -> str:
        """A small tensor of the model."""
        return self.constant(name, self.value(name))

    def value(self, name: str) -> Float32Array:
        """A tensor's numbers, which has to be there."""
        return given(self._weights, name)

    def has(self, name: str) -> bool:
        """Whether the model has this tensor."""
        return self._weights(name) is not None

    # ---- pieces

    def scaled(self, x: str, factor: float) -> str:
        """x times a number."""
        return (
            x if factor == 1.0 else self.node("Mul", [x, self.constant(f"times{factor}", np.array(factor, np.float32))])
        )

    def norm(self, x: str, weight: str, epsilon: float) -> str:
        """Root mean square normalisation over the last axis."""
        return self.node("SimplifiedLayerNormalization", [x, self.tensor(weight)], axis=-1, epsilon=epsilon)

    def linear(self, x: str, weights: Sequence[str], biases: Sequence[str] = (), exact: bool = False) -> str:
        """x times matrices as checkpoints hold them, (out, in) each, side by side."""
        matrix = np.concatenate([self.value(name) for name in weights])
        out, width = matrix.shape
        name = weights[0] if len(weights) == 1 else f"{weights[0]}+{len(weights) - 1}"
        if self._bits == 32 or exact or width % BLOCK:
            y = self.node("MatMul", [x, self.constant(f"{name}.T", matrix.T)])
        else:
            whole, scale = quantised(matrix, self._bits)
            parts = [self.constant(f"{name}.q{self._bits}", whole), self.constant(f"{name}.scale", scale)]
            y = self.node(
                "MatMulNBits", [x, *parts], domain=CONTRIB, K=width, N=out, bits=self._bits, block_size=BLOCK,
                accuracy_level=4,
            )  # fmt: skip
        if not biases:
            return y
        bias = np.concatenate([self.value(each) for each in biases])
        return self.node("Add", [y, self.constant(f"{name}.bias", bias)])

    def gated(self, x: str, part: Gated) -> str:
        """silu(gate) * up, and down."""
        names = [part.gate, part.up] if part.up else [part.gate]
        joined = self.linear(x, names)
        half = sum(len(self.value(name)) for name in names) // 2
        gate, up = self._name("gate"), self._name("up")
        self.nodes(
            "Split", [joined, self.constant(f"halves{half}", np.array([half, half], np.int64))], [gate, up], axis=-1
        )
        active = self.node("Mul", [self.node("Mul", [gate, self.node("Sigmoid", [gate])]), up])
        down = self.linear(active, [part.down])
        if not part.scored:
            return down
        return self.node("Mul", [self.node("Sigmoid", [self.linear(x, [part.scored], exact=True)]), down])

    def attention(self, x: str, part: Attention, epsilon: float) -> str:
        """Attention over the rows' caches. Inputs of the segment: past, lengths and the tables of the rotation."""
        names = [f"{part.prefix}{each}_proj" for each in "qkv"]
        weights = [f"{name}.weight" for name in names]
        biases = [f"{name}.bias" for name in names if self.has(f"{name}.bias")]
        sizes = [part.heads * part.head_size, *[part.kv_heads * part.head_size] * 2]
        packed = self.linear(x, weights, biases)
        if part.clip and not part.norm:
            packed = self._clipped(packed, part.clip)
        query, key, value = (packed, "", "") if not part.norm else self._normed(packed, sizes, part, epsilon)
        number = part.prefix.split(".")[-3]
        past_key, past_value = f"past_key.{number}", f"past_value.{number}"
        shape = ("rows", part.kv_heads, "past", part.head_size)
        self.input(past_key, FLOAT, shape)
        self.input(past_value, FLOAT, shape)
        present = [f"present_key.{number}", f"present_value.{number}"]
        for name in present:
            self.output(name, FLOAT, ("rows", part.kv_heads, "present", part.head_size))
        inputs = [query, key, value, past_key, past_value, "seen", "longest", "cos", "sin"]
        if part.sinks:
            inputs += ["", "", self.tensor(f"{part.prefix}sinks")]
        out = self._name("attention")
        more: dict[str, Any] = {"local_window_size": part.window} if part.window else {}
        self.nodes(
            "GroupQueryAttention", inputs, [out, *present], domain=CONTRIB, num_heads=part.heads,
            kv_num_heads=part.kv_heads, scale=part.scale, do_rotary=1, **more,
        )  # fmt: skip
        o = f"{part.prefix}o_proj"
        return self.linear(out, [f"{o}.weight"], [f"{o}.bias"] if self.has(f"{o}.bias") else [])

    def _clipped(self, x: str, most: float) -> str:
        bounds = [self.constant(f"bound{bound}", np.array(bound, np.float32)) for bound in (-most, most)]
        return self.node("Clip", [x, *bounds])

    def _normed(self, packed: str, sizes: list[int], part: Attention, epsilon: float) -> tuple[str, str, str]:
        parts = [self._name(each) for each in ("query", "key", "value")]
        self.nodes("Split", [packed, self.constant(f"sizes{sizes}", np.array(sizes, np.int64))], parts, axis=-1)
        normed = []
        for x, name, heads in zip(parts[:2], ("q_norm", "k_norm"), (part.heads, part.kv_heads), strict=True):
            weight = f"{part.prefix}{name}.weight"
            if part.norm == "head":
                split = self.constant(f"heads{heads}", np.array([0, 0, heads, part.head_size], np.int64))
                flat = self.constant("flat", np.array([0, 0, -1], np.int64))
                y = self.norm(self.node("Reshape", [x, split]), weight, epsilon)
                normed.append(self.node("Reshape", [y, flat]))
            else:
                normed.append(self.norm(x, weight, epsilon))
        triple = [*normed, parts[2]]
        if part.clip:
            triple = [self._clipped(each, part.clip) for each in triple]
        return triple[0], triple[1], triple[2]

    def router(self, x: str, part: Router) -> None:
        """Outputs of the segment: `gate` scores, `experts` and their `weights`, by row and token."""
        biases = [f"{part.prefix}bias"] if self.has(f"{part.prefix}bias") else []
        weight = f"{part.prefix}weight" if self.has(f"{part.prefix}weight") else f"{part.prefix}layer.weight"
        scores = self.linear(x, [weight], biases, exact=True)
        ranked = scores if part.rule == "best" else self.node("Softmax", [scores], axis=-1)
        top, chosen = self._name("top"), self._name("chosen")
        self.nodes("TopK", [ranked, self.constant("k", np.array([part.top_k], np.int64))], [top, chosen], axis=-1)
        if part.rule == "best":
            weights = self.node("Softmax", [top], axis=-1)
        elif part.renormalise:
            weights = self.node(
                "Div", [top, self.node("ReduceSum", [top, self.constant("last", np.array([-1], np.int64))])]
            )
        else:
            weights = top
        experts = len(self.value(weight))
        self.tell(scores, "gate", experts)
        self.tell(weights, "weights", part.top_k)
        self.node("Cast", [chosen], "experts", to=INT32)
        self.output("experts", INT32, ("rows", "tokens", part.top_k))
