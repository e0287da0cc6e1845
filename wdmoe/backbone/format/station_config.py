"""What config.json of a bundle says for the graphs of a family. No torch, no transformers.

A published config.json may leave out what transformers has a default for, and each family has its own. So the export
writes down what transformers reads, and a base station takes nothing for granted. Tests hold this table to
transformers' config classes, and to what the graphs ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALL = (
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "vocab_size",
)
_GRANITE = (
    "attention_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "num_experts_per_tok",
    "residual_multiplier",
)
_GROUPS = ("n_group", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group")
_LATENT = ("head_dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_QWEN = ("norm_topk_prob", "num_experts_per_tok", "sliding_window", "use_sliding_window")
_OF_FAMILY = {
    "mixtral": ("head_dim", "num_experts_per_tok", "router_jitter_noise", "sliding_window"),
    "qwen2_moe": (*_QWEN, "layer_types", "max_window_layers"),
    "qwen3_moe": _QWEN,
    "olmoe": ("clip_qkv", "norm_topk_prob", "num_experts_per_tok"),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "gpt_oss": ("head_dim", "layer_types", "num_experts_per_tok", "sliding_window"),
    "glm4_moe": _GROUPS,
    "ernie4_5_moe": ("moe_k",),
    "phimoe": ("num_experts_per_tok", "router_jitter_noise", "sliding_window"),
    "deepseek_v2": (*_GROUPS, *_LATENT, "topk_method"),
    "deepseek_v3": (*_GROUPS, *_LATENT, "rope_interleave"),
}


def said_for_graphs(family: str) -> tuple[str, ...]:
    """Fields that a config of this family has to have; none where it has no graphs."""
    return (*_ALL, *_OF_FAMILY[family]) if family in _OF_FAMILY else ()


def left_out(config: Mapping[str, Any]) -> list[str]:
    """Those that it has not."""
    return [name for name in said_for_graphs(str(config.get("model_type", ""))) if name not in config]
