"""A family's own gate function, read from its torch code and written in ONNX.

`make_fx` runs the function once and records the aten operators; each has one translation below. So a new
family needs no code here as long as it stays with known operators, and one that does not is refused by name.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper
from torch.fx.experimental.proxy_tensor import make_fx

from wdmoe.backbone.format.onnx_graph import Steps
from wdmoe.errors import BundleError

TraceFunction = Callable[[torch.Tensor], torch.Tensor]


def trace(function: TraceFunction, width: int, prefix: str) -> Steps:
    """Translate `function`, (tokens, width) float32 -> (tokens, any) float32, row by row the same.

    Args:
        function: what the family does between two matrices. Parameters it uses must hold their values.
        width: columns of its argument.
        prefix: of all names in the result, so that two results fit into one graph.
    Raises:
        BundleError: it uses an operator that has no translation here; the message names it.
    """
    with torch.no_grad():
        # a plain function: make_fx would count the `self` of a method as an argument
        graph_module = make_fx(lambda tokens: function(tokens))(torch.zeros(3, width))
    return _Translation(graph_module, width, prefix).run()


class _Translation:
    def __init__(self, module: torch.fx.GraphModule, width: int, prefix: str) -> None:
        self._module = module
        self._width = width
        self._prefix = prefix
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[tuple[str, npt.NDArray[Any]]] = []
        self._columns: dict[str, slice] = {}
        self._values: dict[torch.fx.Node, Any] = {}  # a name in the graph, a slice of the argument, or a tuple
        self._fresh = 0

    def run(self) -> Steps:
        output = ""
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = slice(0, self._width, 1)
            elif node.op == "get_attr":
                self._values[node] = self._constant(_attribute(self._module, node.target))
            elif node.op == "output":
                output = self._name(node.args[0])
            else:
                self._values[node] = self._call(node)
        return Steps(
            inputs=tuple(self._columns),
            columns=tuple(self._columns.values()),
            nodes=tuple(self._nodes),
            constants=tuple(self._constants),
            output=output,
        )

    def _call(self, node: torch.fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = _arguments(node)
            return self._values[source][index]
        kind = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
        if kind in _VIEWS:
            return _VIEWS[kind](self._values[_arguments(node)[0]], node)
        if kind in _SAME:
            return self._values[_arguments(node)[0]]
        if kind not in _OPERATORS:
            raise BundleError(f"its gate function uses the operator {kind!r}, which has no ONNX form here")
        return _OPERATORS[kind](self, node)

    def _name(self, value: Any) -> str:
        """The ONNX name of a traced value, a number or a part of the argument."""
        if isinstance(value, torch.fx.Node):
            value = self._values[value]
        if isinstance(value, slice):
            name = f"{self._prefix}.in{value.start}_{value.step}"
            self._columns[name] = value
            return name
        if isinstance(value, int | float):
            return self._constant(np.array(value, dtype=np.float32))
        if not isinstance(value, str):
            raise BundleError("its gate function gives more than one tensor")
        return value

    def _constant(self, value: npt.NDArray[Any]) -> str:
        name = f"{self._prefix}.c{len(self._constants)}"
        self._constants.append((name, value))
        return name

    def emit(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node; inputs may be traced values, names or numbers."""
        names = [value if isinstance(value, str) else self._name(value) for value in inputs]
        self._fresh += 1
        output = f"{self._prefix}.v{self._fresh}"
        self._nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output


def _attribute(module: torch.nn.Module, path: str) -> npt.NDArray[np.float32]:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return np.ascontiguousarray(value.detach().to(torch.float32).cpu().numpy())


def _arguments(node: torch.fx.Node, *defaults: Any) -> list[Any]:
    """A node's arguments; `defaults` are those of its last parameters."""
    given: list[Any] = list(node.args)
    return given + list(defaults[len(given) - 1 :])


def _shape(node: Any) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _last(source: Any, dimension: int) -> bool:
    rank = len(_shape(source))
    return dimension % rank == rank - 1


def _cut(value: Any, start: int, stop: int | None, step: int) -> slice:
    if not isinstance(value, slice):
        raise BundleError("its gate function cuts a computed tensor, not its argument")
    width = len(range(value.start, value.stop, value.step))
    first, last, stride = slice(start, stop, step).indices(width)
    return slice(value.start + first * value.step, value.start + last * value.step, value.step * stride)


def _split(value: Any, node: torch.fx.Node) -> tuple[slice, ...]:
    source, size, dimension = _arguments(node, None, 0)
    if not _last(source, dimension):
        raise BundleError("its gate function splits the tokens")
    sizes = [size] * math.ceil(_shape(source)[-1] / size) if isinstance(size, int) else size
    starts = [0, *itertools.accumulate(sizes)]
    return tuple(_cut(value, start, stop, 1) for start, stop in itertools.pairwise(starts))


def _slice(value: Any, node: torch.fx.Node) -> Any:
    source, dimension, start, stop, step = _arguments(node, 0, None, None, 1)
    if not _last(source, dimension):
        if start in (0, None) and (stop is None or stop >= _shape(source)[dimension]) and step == 1:
            return value
        raise BundleError("its gate function cuts the tokens")
    return _cut(value, start or 0, stop, step)


def _simple(kind: str) -> Callable[[_Translation, torch.fx.Node], str]:
    return lambda to, node: to.emit(kind, node.args[0])


def _binary(kind: str, swap: bool = False) -> Callable[[_Translation, torch.fx.Node], str]:
    def translate(to: _Translation, node: torch.fx.Node) -> str:
        left, right = node.args[:2]
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = to.emit("Mul", right, alpha)
        return to.emit(kind, right, left) if swap else to.emit(kind, left, right)

    return translate


def _silu(to: _Translation, node: torch.fx.Node) -> str:
    return to.emit("Mul", node.args[0], to.emit("Sigmoid", node.args[0]))


def _gelu(to: _Translation, node: torch.fx.Node) -> str:
    x = node.args[0]
    if node.kwargs.get("approximate", "none") == "tanh":
        cubic = to.emit("Mul", to.emit("Mul", to.emit("Mul", x, x), x), 0.044715)
        bend = to.emit("Tanh", to.emit("Mul", to.emit("Add", x, cubic), math.sqrt(2 / math.pi)))
    else:
        bend = to.emit("Erf", to.emit("Mul", x, math.sqrt(0.5)))
    return to.emit("Mul", to.emit("Mul", x, 0.5), to.emit("Add", bend, 1.0))


def _clamp(to: _Translation, node: torch.fx.Node) -> str:
    value, low, high = _arguments(node, None, None)
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    if high is not None:
        value = to.emit("Min", value, high)
    return to.emit("Max", value, low) if low is not None else str(value)


def _clamp_max(to: _Translation, node: torch.fx.Node) -> str:
    return to.emit("Min", node.args[0], node.args[1])


def _clamp_min(to: _Translation, node: torch.fx.Node) -> str:
    return to.emit("Max", node.args[0], node.args[1])


def _hardtanh(to: _Translation, node: torch.fx.Node) -> str:
    source, low, high = _arguments(node, -1.0, 1.0)
    return to.emit("Max", to.emit("Min", source, high), low)


def _softplus(to: _Translation, node: torch.fx.Node) -> str:
    if len(node.args) > 1 or node.kwargs:
        raise BundleError("its gate function uses a softplus with settings of its own")
    return to.emit("Softplus", node.args[0])


def _mish(to: _Translation, node: torch.fx.Node) -> str:
    return to.emit("Mul", node.args[0], to.emit("Tanh", to.emit("Softplus", node.args[0])))


def _leaky_relu(to: _Translation, node: torch.fx.Node) -> str:
    source, slope = _arguments(node, 0.01)
    return to.emit("LeakyRelu", source, alpha=slope)


def _rsqrt(to: _Translation, node: torch.fx.Node) -> str:
    return to.emit("Reciprocal", to.emit("Sqrt", node.args[0]))


def _mean(to: _Translation, node: torch.fx.Node) -> str:
    source, axes, keep = _arguments(node, None, False)
    return to.emit("ReduceMean", source, axes=list(axes), keepdims=int(keep))


_VIEWS: dict[str, Callable[[Any, torch.fx.Node], Any]] = {
    "split": _split,
    "split_with_sizes": _split,
    "slice": _slice,
}
# all of it is float32 here, and none of these changes a value
_SAME = frozenset({"alias", "clone", "contiguous", "detach", "_to_copy", "to", "lift_fresh_copy"})
_OPERATORS: dict[str, Callable[[_Translation, torch.fx.Node], str]] = {
    "abs": _simple("Abs"),
    "add": _binary("Add"),
    "clamp": _clamp,
    "clamp_max": _clamp_max,
    "clamp_min": _clamp_min,
    "div": _binary("Div"),
    "erf": _simple("Erf"),
    "exp": _simple("Exp"),
    "gelu": _gelu,
    "hardswish": _simple("HardSwish"),
    "hardtanh": _hardtanh,
    "leaky_relu": _leaky_relu,
    "maximum": _binary("Max"),
    "mean": _mean,
    "minimum": _binary("Min"),
    "mish": _mish,
    "mul": _binary("Mul"),
    "neg": _simple("Neg"),
    "pow": _binary("Pow"),
    "relu": _simple("Relu"),
    "rsqrt": _rsqrt,
    "rsub": _binary("Sub", swap=True),
    "sigmoid": _simple("Sigmoid"),
    "silu": _silu,
    "softplus": _softplus,
    "sqrt": _simple("Sqrt"),
    "square": lambda to, node: to.emit("Mul", node.args[0], node.args[0]),
    "sub": _binary("Sub"),
    "tanh": _simple("Tanh"),
}
