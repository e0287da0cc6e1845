"""Reading the dense checkpoint that is to be split: a transformers folder of safetensors, or one GGUF file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, LlamaConfig

from wdmoe.backbone.split import gguf_file
from wdmoe.errors import BundleError

Weights = dict[str, torch.Tensor]

_READ_BYTES = 1 << 20
_FAMILIES = ("llama", "mistral")  # Mistral without its sliding window is Llama


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseModel:
    """A dense Llama-like model in memory.

    `weights` are float32 under transformers' Llama names, all that the config asks for and no more (no
    `lm_head.weight` when the embedding is tied).
    """

    name: str
    config: Any  # transformers.LlamaConfig
    weights: Weights
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    sha256: str  # of the GGUF file, or of the weight files one after another
    licence: str  # as the checkpoint states it, "" if it does not


def read_dense(path: Path) -> DenseModel:
    """Read a dense checkpoint whole.

    Args:
        path: a folder with config.json, *.safetensors and a tokenizer, or a .gguf file.
    Raises:
        BundleError: missing, unreadable, not Llama-like, or a tensor is absent or of the wrong shape.
    """
    if path.is_file():
        return _read_gguf(path)
    if path.is_dir():
        return _read_folder(path)
    raise BundleError(f"{path} is neither a model folder nor a GGUF file")


def tensor_shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights of a Llama model."""
    width, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, width)
    for layer in range(config.num_hidden_layers):
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
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, width)


def _read_gguf(path: Path) -> DenseModel:
    source = gguf_file.open_gguf(path)
    config = LlamaConfig(**source.config)
    return DenseModel(
        name=source.name,
        config=config,
        weights=_checked(source.read_weights(), config, path),
        tokenizer=source.read_tokenizer(),
        sha256=sha256_of([path]),
        licence=source.licence,
    )


def _read_folder(folder: Path) -> DenseModel:
    config = _read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BundleError(f"{folder} has no *.safetensors file")
    weights: Weights = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                weights.update({key: tensors.get_tensor(key).float() for key in tensors.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError) as error:
            raise BundleError(f"{file} cannot be read: {error}") from error
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return DenseModel(
        name=folder.resolve().name,
        config=config,
        weights=_checked(weights, config, folder),
        tokenizer=_read_tokenizer(folder),
        sha256=sha256_of(files),
        licence=_stated_licence(folder),
    )


def _read_config(folder: Path) -> Any:
    try:
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        family = fields["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder} has no readable config.json with a model_type") from error
    if family not in _FAMILIES:
        raise BundleError(f"cannot split a {family!r} model: only Llama-like ones ({', '.join(_FAMILIES)})")
    if fields.get("sliding_window") is not None:
        raise BundleError(f"{folder} uses a sliding attention window, which the MoE family cannot express")
    if fields.get("attention_bias") or fields.get("mlp_bias") or fields.get("hidden_act", "silu") != "silu":
        raise BundleError(f"{folder} has biases or another activation than SiLU, which split does not support")
    try:
        return LlamaConfig(**{key: value for key, value in fields.items() if key != "model_type"})
    except (TypeError, ValueError, KeyError) as error:  # KeyError: odd rope settings
        raise BundleError(f"{folder / 'config.json'} is not a valid Llama config: {error}") from error


def _read_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder} has no readable tokenizer: {str(error).splitlines()[0]}") from error


def _stated_licence(folder: Path) -> str:
    """The `license:` line of the model card's front matter."""
    card = folder / "README.md"
    if card.is_file():
        for line in card.read_text("utf-8", errors="replace").splitlines()[:50]:
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return ""


def _checked(weights: Weights, config: Any, path: Path) -> Weights:
    """Exactly the tensors that the config asks for, contiguous float32."""
    found: Weights = {}
    for name, shape in tensor_shapes(config):
        tensor = weights.get(name)
        if tensor is None:
            raise BundleError(f"{path} has no tensor {name}")
        if tuple(tensor.shape) != shape:
            raise BundleError(f"{path}: {name} has shape {tuple(tensor.shape)}, the config asks for {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{path}: {name} holds numbers that are not finite")
        found[name] = tensor.contiguous()
    return found


def sha256_of(files: list[Path]) -> str:
    """SHA-256 over the bytes of all files, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()
