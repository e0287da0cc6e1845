"""Experts that no text model of transformers has yet, or that are built to be refused."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

from wdmoe.backbone.export.expert_export import LayerExperts
from wdmoe.backbone.format.onnx_graph import onnx
from wdmoe.errors import BundleError

EXPERTS, HIDDEN, INNER = 3, 16, 12


class Config:
    _experts_implementation = "eager"
    hidden_act = "silu"


@use_experts_implementation
class PlainExperts(nn.Module):
    """What families write, with room for changes in one place each."""

    output = HIDDEN

    def __init__(self, config):
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, self.output, INNER))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros(len(hidden_states), self.output)
        for expert in range(len(self.down_proj)):
            places, rows = torch.where((top_k_index == expert).T)
            gate_up = nn.functional.linear(hidden_states[rows], self.gate_up_proj[expert])
            y = nn.functional.linear(self._apply_gate(gate_up), self.down_proj[expert])
            final.index_add_(0, rows, y * top_k_weights[rows, places, None])
        return final


def layer(kind, config=None, **changes):
    with torch.device("meta"):
        module = kind(config or Config())
    for name, value in changes.items():
        setattr(module, name, value)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in module.state_dict().items()}
    return LayerExperts(module, tensors)


def test_plain_experts_pass_their_own_check():
    experts = layer(PlainExperts)
    assert (experts.count, experts.width) == (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        experts.check(expert)


def test_norm_after_each_expert_is_part_of_its_graph():
    config = MuseSparkTextConfig(
        num_local_experts=EXPERTS, moe_hidden_size=HIDDEN, moe_intermediate_size=INNER, hidden_act="silu"
    )
    config._experts_implementation = "eager"
    experts = layer(MuseSparkExperts, config)
    experts.check(EXPERTS - 1)
    graph = onnx.load_model_from_string(experts.graph(0, "int8").data)
    assert "ReduceMean" in {node.op_type for node in graph.graph.node}


def test_forward_that_ignores_its_gate_function_is_found():
    class Odd(PlainExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 1.001 * super().forward(hidden_states, top_k_index, top_k_weights)

    with pytest.raises(BundleError, match="compute something else than their attributes say"):
        layer(Odd).check(0)


def test_clamp_that_only_large_inputs_reach_is_found():
    class Clamped(PlainExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states.clamp(-20, 20), top_k_index, top_k_weights)

    with pytest.raises(BundleError, match="compute something else"):
        layer(Clamped).check(0)


def test_activation_with_parameters_is_refused():
    class Learned(Config):
        hidden_act = "prelu"

    with pytest.raises(BundleError, match=r"'act_fn\.weight'"):
        layer(PlainExperts, Learned())


def test_experts_of_another_output_width_are_refused():
    class Narrow(PlainExperts):
        output = HIDDEN // 2

    with pytest.raises(BundleError, match="another width"):
        layer(Narrow)


def test_experts_without_the_bias_they_announce_are_refused():
    with pytest.raises(BundleError, match="gate_up_proj_bias"):
        layer(PlainExperts, has_bias=True)
