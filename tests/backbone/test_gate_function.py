"""Gate functions as ONNX: every activation transformers knows, and the shapes gate functions come in."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import GraniteMoeSharedConfig
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedMoE

from wdmoe.backbone.export.gate_function import trace
from wdmoe.backbone.format.onnx_graph import OPERATORS, Linear, build_expert, gated_silu, quantise, run_graph
from wdmoe.errors import BundleError

HIDDEN, INNER = 16, 12
REFUSED = {"prelu", "xielu"}  # they have parameters of their own
TOLERANCE = 1e-6


def interleaved(gate_up):
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(min=None, max=1.0), up.clamp(min=-1.0, max=1.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def concatenated(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def widened(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def runtime(data, x):
    (y,) = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return y


def graph_and_torch(function, width, rng, bias=True, precision="fp32"):
    """What the graph and what torch gives for the same random expert, relative to the largest output."""
    up = Linear(
        rng.standard_normal((HIDDEN, width), dtype=np.float32),
        rng.standard_normal(width, dtype=np.float32) if bias else None,
    )
    down = Linear(rng.standard_normal((INNER, HIDDEN), dtype=np.float32))
    graph = build_expert(up, trace(function, width, "gate"), down, None, precision)
    model = onnx.load_model_from_string(graph.data)
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} <= OPERATORS
    x = 3 * rng.standard_normal((5, HIDDEN), dtype=np.float32)
    with torch.no_grad():
        inner = torch.from_numpy(x @ up.weight + (up.bias if bias else 0))
        expected = (function(inner) @ torch.from_numpy(down.weight)).numpy()
    y = run_graph(graph.data, x) if precision == "fp32" else runtime(graph.data, x)
    return np.abs(y - expected).max() / np.abs(expected).max()


def test_the_graph_that_needs_no_trace_is_the_trace_of_the_families_own_code():
    config = GraniteMoeSharedConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=2)
    with torch.device("meta"):
        experts = GraniteMoeSharedMoE(config).experts
    assert gated_silu(INNER) == trace(experts._apply_gate, 2 * INNER, "gate")


@pytest.mark.parametrize("name", sorted(ACT2CLS.keys() - REFUSED))
def test_activation_is_translated(name):
    function = ACT2FN[name]
    assert graph_and_torch(lambda t: function(t), INNER, np.random.default_rng(0)) < TOLERANCE


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", [interleaved, concatenated, widened])
def test_gate_function_is_translated(function, bias):
    assert graph_and_torch(function, 2 * INNER, np.random.default_rng(1), bias) < TOLERANCE


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-3), ("int8", 3e-2)])
def test_narrow_weights_stay_close(precision, bound):
    assert 0 < graph_and_torch(concatenated, 2 * INNER, np.random.default_rng(2), True, precision) < bound


def test_unknown_operator_is_refused_by_name():
    with pytest.raises(BundleError, match="'cumsum'"):
        trace(lambda t: t.cumsum(-1), INNER, "gate")


@pytest.mark.parametrize("function", [lambda t: t[:1], lambda t: t.sigmoid().chunk(2, -1)[0]])
def test_cutting_tokens_or_computed_values_is_refused(function):
    with pytest.raises(BundleError, match="cuts"):
        trace(function, INNER, "gate")


def test_quantisation_is_per_output_column():
    weight = np.zeros((3, 3), np.float32)
    weight[:, 1] = [1e-3, -5e-4, 0]
    weight[:, 2] = [1e3, -5e2, 0]
    whole, scale = quantise(weight)
    error = np.abs(whole * scale - weight).max(axis=0)
    assert (error <= np.abs(weight).max(axis=0) / 254 * 1.001).all()  # half a step of each column
    assert whole.dtype == np.int8
    assert whole.max() == 127


def test_number_too_large_for_fp16_is_refused():
    up = Linear(np.full((2, 2), 1e5, np.float32))
    with pytest.raises(BundleError, match="too large for fp16"):
        build_expert(up, trace(torch.sigmoid, 2, "gate"), Linear(np.eye(2, dtype=np.float32)), None, "fp16")
