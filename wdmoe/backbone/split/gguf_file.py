"""A Llama model in a GGUF file: its config, weights and tokenizer, read without llama.cpp, torch or transformers.

transformers can read GGUF too, but takes 25 s for a 100 MB file where this takes 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import dequantize
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from wdmoe.arrays import Float32Array
from wdmoe.backbone.split.gguf_layout import GgufTensor, read_gguf
from wdmoe.backbone.text.tokenizer import FileTokenizer, nothing_added
from wdmoe.errors import BundleError

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
# How text is cut before byte-pair merging, by llama.cpp's name for it. Others are left to transformers, in `dense`.
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def open_gguf(path: Path) -> GgufLlama:
    """Open a GGUF file (memory-mapped).

    Raises:
        BundleError: not a readable GGUF file, or not of a Llama-like architecture that can be split.
    """
    return GgufLlama(path, *read_gguf(path))


class GgufLlama:
    """One opened GGUF file of architecture `llama`."""

    def __init__(self, path: Path, fields: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
        self._path = path
        self._fields = fields
        self._tensors = tensors
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise BundleError(f"cannot split a GGUF model of architecture {architecture!r}: only 'llama'")
        if "rope_freqs.weight" in self._tensors or self._field("llama.expert_count", 0):
            raise BundleError(f"{path} has scaled rotary frequencies or experts already; give the dense safetensors")
        self.name: str = path.stem
        self.licence: str = self._field("general.license", "")
        self.config: dict[str, Any] = self._config()

    def read_weights(self) -> dict[str, Float32Array]:
        """All weights as float32 under transformers' Llama names."""
        weights: dict[str, Float32Array] = {}
        for name, tensor in self._tensors.items():
            try:
                array = dequantize(tensor.data, tensor.kind).astype(np.float32)
            except (NotImplementedError, ValueError) as error:
                raise BundleError(f"{self._path}: tensor {name} of type {tensor.kind.name} cannot be read") from error
            weights[_llama_name(name)] = self._rotary_rows(name, array)
        return weights

    def read_tokenizer(self) -> FileTokenizer | None:
        """The tokenizer, with its chat template where the file has one; None for a kind that is not known here."""
        cut = _PRE_TOKENIZERS.get(self._field("tokenizer.ggml.pre", ""))
        if self._field("tokenizer.ggml.model") != "gpt2" or cut is None:
            return None
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = cut()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = nothing_added()
        kinds = self._field("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens(
            [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
        )
        special = {role: self._special(tokens, key) for role, key in _SPECIAL_TOKENS.items()}
        named = {role: token for role, token in special.items() if token is not None}
        return FileTokenizer(tokenizer, self._field("tokenizer.chat_template", None), named)

    def _config(self) -> dict[str, Any]:
        width, heads = self._field("llama.embedding_length"), self._field("llama.attention.head_count")
        return {
            "vocab_size": self._tensor("token_embd.weight").dimensions[1],
            "hidden_size": width,
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv", heads),
            "head_dim": self._field("llama.attention.key_length", width // heads),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": self._field("llama.rope.freq_base", 10000.0)},
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id", None),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id", None),
        }

    def _rotary_rows(self, name: str, weight: Float32Array) -> Float32Array:
        """Undo llama.cpp's row order of query and key weights (pairs side by side, not half by half)."""
        heads = {
            "attn_q": self.config["num_attention_heads"],
            "attn_k": self.config["num_key_value_heads"],
        }.get(name.split(".")[-2])
        if heads is None:
            return weight
        rows, columns = weight.shape
        return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise BundleError(f"{self._path} has no tensor {name}")
        return self._tensors[name]

    def _field(self, key: str, *default: Any) -> Any:
        """A metadata value; without a default the key must be there."""
        if key in self._fields:
            return self._fields[key]
        if default:
            return default[0]
        raise BundleError(f"{self._path} lacks the metadata key {key}")

    def _special(self, tokens: list[str], key: str) -> str | None:
        index = self._field(f"tokenizer.ggml.{key}_token_id", None)
        return tokens[index] if index is not None and index < len(tokens) else None


_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _llama_name(name: str) -> str:
    """transformers' name of a GGUF tensor; unknown ones keep theirs (and are ignored later)."""
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    return name
