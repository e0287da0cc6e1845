"""What a station's graphs read in a bundle's config.json.

A checkpoint may leave such a field out, and mean what its family has by default: only transformers knows that. So an
export writes it down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

GRAPH_FIELDS = (
    "attention_multiplier", "clip_qkv", "embedding_multiplier", "head_dim", "hidden_act", "hidden_size",
    "kv_lora_rank", "layer_types", "logits_scaling", "max_position_embeddings", "max_window_layers", "model_type",
    "moe_k", "n_group", "norm_topk_prob", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "partial_rotary_factor", "qk_nope_head_dim", "qk_rope_head_dim", "residual_multiplier",
    "rms_norm_eps", "rope_interleave", "rope_parameters", "routed_scaling_factor", "router_jitter_noise",
    "sliding_window", "topk_group", "topk_method", "use_sliding_window", "v_head_dim", "vocab_size",
)  # fmt: skip


def whole_config(content: bytes, meant: Mapping[str, Any]) -> bytes:
    """A config.json that says all of them.

    Args:
        content: of the checkpoint's file, a JSON object.
        meant: what transformers reads in it.
    Returns:
        The same bytes where nothing is left out.
    """
    said = json.loads(content)
    left_out = {name: meant[name] for name in GRAPH_FIELDS if name in meant and name not in said}
    if not left_out:
        return content
    return json.dumps({**said, **left_out}, indent=2, sort_keys=True).encode() + b"\n"
