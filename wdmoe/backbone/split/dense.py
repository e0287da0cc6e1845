"""Reading the dense checkpoint that is to be split: a transformers folder of safetensors, or one GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from wdmoe.backbone.split import gguf_file
from wdmoe.backbone.split.llama import plain_fields, sha256_of, tensor_shapes
from wdmoe.errors import BundleError

Weights = dict[str, torch.Tensor]

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


def _read_gguf(path: Path) -> DenseModel:
    source = gguf_file.open_gguf(path)
    config = LlamaConfig(**source.config)
    weights = {name: torch.from_numpy(array) for name, array in source.read_weights().items()}
    return DenseModel(
        name=source.name,
        config=config,
        weights=_checked(weights, config, path),
        tokenizer=_gguf_tokenizer(source, path),
        sha256=sha256_of([path]),
        licence=source.licence,
    )


def _gguf_tokenizer(source: gguf_file.GgufLlama, path: Path) -> Any:
    found = source.read_tokenizer()
    if found is None:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return PreTrainedTokenizerFast(
        tokenizer_object=found.backend_tokenizer,
        chat_template=found.chat_template,
        model_max_length=source.config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        **found.special_tokens_map,
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
    for name, shape in tensor_shapes(plain_fields(config)):
        tensor = weights.get(name)
        if tensor is None:
            raise BundleError(f"{path} has no tensor {name}")
        if tuple(tensor.shape) != shape:
            raise BundleError(f"{path}: {name} has shape {tuple(tensor.shape)}, the config asks for {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{path}: {name} holds numbers that are not finite")
        found[name] = tensor.contiguous()
    return found
