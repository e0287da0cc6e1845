"""Tiny random checkpoints of real MoE families, as they stand on disk, with a tiny tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from wdmoe.backbone.format.bundle import Bundle
from wdmoe.backbone.runtime.station import Station
from wdmoe.records import ExpertId

ExpertsFunction = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

HIDDEN = 32
EXPERTS = 8
VOCABULARY = 260

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_GROUPED = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 3},
    "granitemoeshared": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 4,
        "shared_intermediate_size": 40,
        "tie_word_embeddings": True,
    },
    "deepseek_v2": {
        **_MLA,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 2.0,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
    },
    "deepseek_v3": {
        **_MLA,
        **_GROUPED,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phimoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "glm4_moe": {
        **_GROUPED,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
    },
}
FAMILIES = tuple(SETTINGS)
# Those that the station's graphs know, with variants of each.
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}  # of 16, as the attention wants
SIXTEEN = {"head_dim": 16}
WIDE = {"head_dim": 32}  # half of which glm4_moe rotates
LATENT = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 2}
DEEP_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0],
    "short_mscale": 1.24,
    "long_mscale": 1.24,
    "original_max_position_embeddings": 24,
}
GRAPHS: dict[str, list[dict[str, Any]]] = {
    "mixtral": [{}, {"sliding_window": 16}],
    "qwen2_moe": [{}, {"norm_topk_prob": True, "mlp_only_layers": [1]}, {"mlp_only_layers": [2]}],
    "qwen3_moe": [SIXTEEN],
    "olmoe": [{}, {"clip_qkv": 0.5}],
    "granitemoeshared": [
        {},
        {"residual_multiplier": 0.3, "embedding_multiplier": 7.0, "logits_scaling": 3.0, "attention_multiplier": 0.1},
    ],
    "gpt_oss": [SIXTEEN],
    "glm4_moe": [
        WIDE,
        {**WIDE, "use_qk_norm": True, "attention_bias": True, "norm_topk_prob": False},
        {**WIDE, "n_group": 1, "routed_scaling_factor": 2.5},
        {**WIDE, "n_group": 4, "topk_group": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
    "ernie4_5_moe": [{}, {"use_bias": True}],
    "phimoe": [
        {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.4},
        {"sliding_window": 16, "rope_parameters": LONGROPE},
    ],
    "deepseek_v2": [
        LATENT,
        {**LATENT, "topk_method": "greedy", "q_lora_rank": None, "rope_parameters": DEEP_YARN},
        {**LATENT, "attention_bias": True, "mlp_bias": True},
    ],
    "deepseek_v3": [
        {**LATENT, "routed_scaling_factor": 2.5, "rope_parameters": DEEP_YARN},
        {**LATENT, "q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "norm_topk_prob": False},
    ],
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of a family, made small."""
    return transformers.AutoConfig.for_model(family, **{**_COMMON, **SETTINGS[family], **overrides})


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A seeded random model in float32, with weights large enough that every layer and expert matters."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter and persistent buffer: some constructors leave zeros, ones or nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if "norm" in name and tensor.dim() == 1:
            tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
        elif tensor.dim() == 1:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5)


def save_tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "unk")},
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)


def save_tiny(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a tiny checkpoint as its family keeps it on disk; returns the folder."""
    model = tiny_model(tiny_config(family, **overrides), seed).to(dtype)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def reference(folder: Path) -> Any:
    """The undivided model of a checkpoint, float32, eager experts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


def local_experts(bundle: Bundle, station: Station) -> ExpertsFunction:
    """An experts implementation that runs a bundle's graphs in this process with ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        file.id: onnxruntime.InferenceSession(
            (bundle.root / file.path).read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        for file in bundle.manifest.experts
    }
    layers = {id(module): layer for layer, module in station.experts.items()}

    def run(module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        layer, output = layers[id(module)], torch.zeros_like(hidden)
        for expert in range(bundle.manifest.experts_per_layer[layer]):  # other indices mean: no expert
            rows, places = torch.where(index == expert)
            if len(rows):
                (y,) = sessions[ExpertId(layer, expert)].run(None, {"x": hidden[rows].numpy()})
                output.index_add_(0, rows, torch.from_numpy(y) * weights[rows, places, None])
        return output

    return run


@contextmanager
def local_implementation(bundle: Bundle, station: Station) -> Iterator[None]:
    """While open, a station's model computes its experts with `local_experts`."""
    before = station.model.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register("local_onnx", local_experts(bundle, station))
    station.model.set_experts_implementation("local_onnx")
    try:
        yield
    finally:
        station.model.set_experts_implementation(before)
