"""The station part of a bundle as files: config, tokenizer, and torch tensors written without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from wdmoe.backbone.checkpoint import DTYPES
from wdmoe.backbone.format.bundle import STATION_FOLDER
from wdmoe.backbone.format.tensor_file import Stored, tensor_file_parts
from wdmoe.errors import BundleError

CONFIG_NAMES = ("config.json", "generation_config.json")
_NAMES = (
    *CONFIG_NAMES,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def small_files(model: Path) -> Iterator[tuple[str, bytes]]:
    """Bundle path and bytes of every small file of a model folder that the station needs.

    Raises:
        BundleError: there is no tokenizer, or a file cannot be read.
    """
    if not any((model / name).is_file() for name in _TOKENIZERS):
        raise BundleError(f"{model} has no tokenizer (none of {', '.join(_TOKENIZERS)})")
    named = sorted((model / "additional_chat_templates").glob("*.jinja"))
    for path in [model / name for name in _NAMES if (model / name).is_file()] + named:
        try:
            yield f"{STATION_FOLDER}/{path.relative_to(model).as_posix()}", path.read_bytes()
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}") from error


def safetensors_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece: the same tensors always give the same bytes."""
    return tensor_file_parts({name: _stored(name, tensor.contiguous()) for name, tensor in tensors.items()})


def _stored(name: str, tensor: torch.Tensor) -> Stored:
    if tensor.dtype not in _DTYPE_NAMES:
        raise BundleError(f"{name!r} has the unsupported dtype {tensor.dtype}")
    data = tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else None
    return Stored(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)
