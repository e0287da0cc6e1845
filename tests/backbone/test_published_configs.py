"""Configs of published models, as their config.json say it, make plans. Their weights were never here.

Left out are fields that no plan reads, and `quantization_config`: such a checkpoint is dequantised before its export.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from wdmoe.backbone.export.export import with_all_said
from wdmoe.backbone.families import experts_modules
from wdmoe.backbone.format.station_config import left_out, said_for_graphs
from wdmoe.backbone.graphs.cache import Rows
from wdmoe.backbone.graphs.writing.plan import SUPPORTED, Gated, StationPlan, station_plan
from wdmoe.backbone.meta_model import meta_model, read_config

YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + at / 64 for at in range(64)],  # that there are 64 matters, not which
    "long_factor": [1.0 + at for at in range(64)],
    "short_mscale": 1.243163121016122,
    "long_mscale": 1.243163121016122,
    "original_max_position_embeddings": 4096,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-05,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "max_position_embeddings": 40960, "max_window_layers": 48, "sliding_window": None,
        "use_sliding_window": False, "rope_scaling": None, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False, "vocab_size": 151936,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None, "max_position_embeddings": 4096,
        "rope_scaling": None, "rope_theta": 10000.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
    "granite-3.0-1b-a400m": {
        "model_type": "granitemoe", "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 512,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 32,
        "num_experts_per_tok": 8, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "logits_scaling": 6.0, "max_position_embeddings": 4096, "rope_scaling": None,
        "rope_theta": 10000, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "vocab_size": 49155,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "attention_bias": True, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "rope_theta": 150000, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": 201088,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "Phi-3.5-MoE": {
        "model_type": "phimoe", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 6400,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16,
        "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.01, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_scaling": LONGROPE, "rope_theta": 10000.0, "rms_norm_eps": 1e-05, "sliding_window": 131072,
        "tie_word_embeddings": False, "vocab_size": 32064,
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "attention_bias": False,
        "max_position_embeddings": 163840, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "rope_theta": 10000, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "vocab_size": 102400,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_group": 8, "topk_group": 4,
        "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 1, "attention_bias": False, "max_position_embeddings": 163840,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False, "vocab_size": 129280,
    },
    "GLM-4.5-Air": {
        "model_type": "glm4_moe", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "attention_bias": True, "use_qk_norm": False, "n_routed_experts": 128, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "max_position_embeddings": 131072, "partial_rotary_factor": 0.5,
        "rope_scaling": None, "rope_theta": 1000000, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
        "vocab_size": 151552,
    },
    "ERNIE-4.5-21B-A3B": {
        "model_type": "ernie4_5_moe", "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4,
        "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_k": 6, "moe_layer_start_index": 1,
        "moe_layer_interval": 1, "use_bias": False, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "vocab_size": 103424,
    },
}  # fmt: skip
KEPT_BYTES = {  # of a token, in all layers: keys and values
    "Mixtral-8x7B": 32 * 8 * 128 * 8,
    "DeepSeek-V2-Lite": 27 * (512 + 64) * 8,  # and not of each of 16 heads
    "DeepSeek-V3": 61 * (512 + 64) * 8,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plan_is_made_and_all_that_it_names_is_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = read_config(tmp_path)
    model = meta_model(config)
    moe = set(experts_modules(model))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {each for each in model.state_dict() if ".experts." not in each} - tied
    plan = station_plan(config.to_dict(), tensors, moe)
    assert len(plan.layers) == config.num_hidden_layers
    assert {layer.number for layer in plan.layers if layer.router} == moe
    assert named(plan) <= tensors
    attention = model.model.layers[0].self_attn
    assert plan.layers[0].attention.scale == pytest.approx(attention.scaling)
    assert plan.epsilon == config.rms_norm_eps
    rotary = type(model.model.rotary_emb)(config)
    np.testing.assert_allclose(plan.rope.frequencies, rotary.inv_freq.numpy(), rtol=1e-5)
    if config.model_type == "phimoe":  # takes its own factor
        assert plan.rope.factor == LONGROPE["short_mscale"]
    else:
        assert plan.rope.factor == pytest.approx(rotary.attention_scaling)
    if name in KEPT_BYTES:
        assert Rows(plan).size_bytes(256) == 256 * KEPT_BYTES[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_an_export_writes_down_is_the_plan_without_transformers(name: str, tmp_path: Path) -> None:
    """And transformers reads in it what it read before."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED[name]))
    config = read_config(tmp_path)
    before = config.to_dict()
    written = with_all_said({"station/config.json": file.read_bytes()}, config)["station/config.json"]
    model = meta_model(config)
    moe, tensors = set(experts_modules(model)), set(model.state_dict())
    asked = Asked(json.loads(written))
    assert not left_out(asked.content)
    found, wanted = station_plan(asked, tensors, moe), station_plan(before, tensors, moe)
    np.testing.assert_array_equal(found.rope.frequencies, wanted.rope.frequencies)
    assert replace(found, rope=wanted.rope) == wanted
    assert found.rope.factor == wanted.rope.factor
    fields = AutoConfig.for_model(config.model_type).to_dict().keys()  # what it always has, with or without a default
    assert asked.names & fields <= {*said_for_graphs(config.model_type), "model_type"}
    file.write_bytes(written)
    assert read_config(tmp_path).to_dict() == before


class Asked(dict[str, Any]):
    """A config that notes what it is asked."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.content, self.names = content, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("family", SUPPORTED)
def test_what_must_be_said_is_what_the_family_has_a_field_for(family: str) -> None:
    has = AutoConfig.for_model(family).to_dict().keys()
    every = {name for each in SUPPORTED for name in said_for_graphs(each)}
    assert set(said_for_graphs(family)) == every & has


def named(plan: StationPlan) -> set[str]:
    """Matrices of a plan."""
    found = {plan.embedding, plan.head}
    for layer in plan.layers:
        found.add(f"{layer.attention.prefix}o_proj.weight")
        if layer.router is not None:
            found |= {f"{layer.router.prefix}weight"} | ({layer.router.correction} - {""})
        found |= {f"{each}.weight" for part in (layer.shared, layer.dense) if part for each in modules(part)}
    return found


def modules(part: Gated) -> set[str]:
    return {part.gate, part.up, part.down, part.scored} - {""}
