"""What a Llama model consists of, and the split one that is made of it, as plain fields of a config. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wdmoe.backbone.split.settings import RANK, SplitSettings

ARCHITECTURE = "GraniteMoeSharedForCausalLM"
FAMILY = "granitemoeshared"

_READ_BYTES = 1 << 20
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def plain_fields(config: Any) -> dict[str, Any]:
    """The fields of a transformers LlamaConfig that anything here asks for."""
    return {name: getattr(config, name) for name in (*_SAME, "intermediate_size")}


def tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights of a Llama model.

    Args:
        config: as `plain_fields` gives it.
    """
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (width,)
        yield at + "self_attn.q_proj.weight", (query, width)
        yield at + "self_attn.k_proj.weight", (key, width)
        yield at + "self_attn.v_proj.weight", (key, width)
        yield at + "self_attn.o_proj.weight", (width, query)
        yield at + "post_attention_layernorm.weight", (width,)
        yield at + "mlp.gate_proj.weight", (inner, width)
        yield at + "mlp.up_proj.weight", (inner, width)
        yield at + "mlp.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], width)


def moe_fields(dense: Mapping[str, Any], settings: SplitSettings) -> dict[str, Any]:
    """What GraniteMoeSharedConfig takes to compute what the Llama config computes, but for the FFN. Plain types.

    Args:
        dense: as `plain_fields` gives it.
    """
    size = settings.expert_size(dense["intermediate_size"])
    return {
        **{name: dense[name] for name in _SAME},
        "intermediate_size": size,
        "shared_intermediate_size": dense["intermediate_size"] - settings.experts * size,
        "num_local_experts": settings.experts,
        "num_experts_per_tok": settings.top_k,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": dense["head_dim"] ** -0.5,
        "wdmoe": {
            "on_drop": "keep",  # measured: renormalising the rest is worse, see docs/guide_split.md
            "gate_temperature": settings.gate_temperature,  # softmax(logits / this): the gate's probabilities
            "rank": RANK,  # their squares rank experts, see docs/guide_radio.md
        },
    }


def sha256_of(files: list[Path]) -> str:
    """SHA-256 over the bytes of all files, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()
