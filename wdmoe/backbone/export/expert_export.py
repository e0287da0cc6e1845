"""The experts of one MoE layer, from module parameters to ONNX graphs, checked against its own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from wdmoe.arrays import Float32Array
from wdmoe.backbone.export.gate_function import trace
from wdmoe.backbone.format.onnx_graph import ExpertGraph, Linear, Steps, build_expert, run_graph
from wdmoe.errors import BundleError

TOLERANCE = 1e-4  # of the largest output, ONNX against the family's eager code
_CHECK_TOKENS = 4
_CHECK_SCALES = (1.0, 30.0)  # the second reaches the clamps that some gate functions have


class LayerExperts:
    """Builds the graphs of one layer's experts.

    Args:
        module: the layer's experts module; its own tensors are never used, so it may be on the meta device.
        tensors: its parameters by name within the module, any float dtype, experts first.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._module = module
        self._up = "gate_up_proj" if module.has_gate else "up_proj"
        matrices = [self._up, "down_proj"]
        if module.has_bias:
            matrices += [f"{name}_bias" for name in matrices]
        if missing := [name for name in matrices if name not in tensors]:
            raise BundleError(f"its experts have no {missing[0]!r}")
        self._stacked = {name: tensors[name] for name in matrices}
        self._common = {name: tensor.float() for name, tensor in tensors.items() if name not in matrices}
        if others := [name for name in self._common if not name.startswith("post_expert_norm.")]:
            raise BundleError(f"its experts have a parameter {others[0]!r}, which has no ONNX form here")
        self._gate = self._trace_gate()
        self._norm = self._trace_norm()
        if self.width != self._shape("down_proj")[1]:
            raise BundleError("its experts give vectors of another width than they take")

    @property
    def count(self) -> int:
        """Number of experts."""
        return int(self._stacked["down_proj"].shape[0])

    @property
    def width(self) -> int:
        """Width of the vectors that experts take and give."""
        return self._shape(self._up)[0]

    def graph(self, expert: int, precision: str) -> ExpertGraph:
        """The graph of one expert."""
        up, down = self._linear(expert, self._up), self._linear(expert, "down_proj")
        return build_expert(up, self._gate, down, self._norm, precision)

    def outputs(self, expert: int, x: Float32Array) -> Float32Array:
        """What one expert makes of (tokens, width), in the family's own eager code and in float32."""
        return self._eager(expert, x)

    def check(self, expert: int) -> None:
        """Run one expert in ONNX and in the family's own eager code.

        Raises:
            BundleError: they differ by more than TOLERANCE.
        """
        data = self.graph(expert, "fp32").data
        rng = np.random.default_rng(0)
        for scale in _CHECK_SCALES:
            x = (scale * rng.standard_normal((_CHECK_TOKENS, self.width))).astype(np.float32)
            expected, got = self._eager(expert, x), run_graph(data, x)
            deviation = float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-30))
            if not deviation <= TOLERANCE:  # also refuses NaN
                raise BundleError(f"its experts compute something else than their attributes say ({deviation:.1e})")

    def _shape(self, name: str) -> tuple[int, int]:
        """(in, out) of a stack of matrices."""
        first, second = self._stacked[name].shape[1:]
        return (first, second) if self._module.is_transposed else (second, first)

    def _linear(self, expert: int, name: str) -> Linear:
        weight = self._stacked[name][expert].float()
        if not self._module.is_transposed:
            weight = weight.T
        bias = self._stacked.get(f"{name}_bias")
        return Linear(weight.numpy(), None if bias is None else bias[expert].float().numpy())

    def _trace_gate(self) -> Steps:
        module: Any = self._module
        function = module._apply_gate if module.has_gate else module.act_fn
        try:
            return trace(function, self._shape(self._up)[1], "gate")
        except RuntimeError as error:  # parameters of its own, or shapes that depend on values
            raise BundleError(f"its gate function cannot be traced: {error}") from error

    def _trace_norm(self) -> Steps | None:
        if not self._module.has_post_expert_norm:
            return None
        norm = self._module.get_submodule("post_expert_norm")
        prefix = "post_expert_norm."
        weights = {name.removeprefix(prefix): tensor for name, tensor in self._common.items()}
        return trace(lambda t: torch.func.functional_call(norm, weights, (t,)), self.width, "norm")

    def _eager(self, expert: int, x: Float32Array) -> Float32Array:
        """One expert through the module's own forward, which sees a module that has this expert only."""
        alone = {name: tensor[expert : expert + 1].float() for name, tensor in self._stacked.items()}
        tokens = torch.from_numpy(x)
        index = torch.zeros(len(x), 1, dtype=torch.long)
        with torch.no_grad():
            arguments = (tokens, index, torch.ones(len(x), 1))
            output = torch.func.functional_call(self._module, {**alone, **self._common}, arguments)
        return np.asarray(output.numpy(), dtype=np.float32)
