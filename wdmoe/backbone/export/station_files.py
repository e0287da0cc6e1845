"""The station part of a bundle as files: config, tokenizer, and safetensors written without a copy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from wdmoe.backbone.checkpoint import DTYPES
from wdmoe.backbone.format.bundle import STATION_FOLDER
from wdmoe.errors import BundleError

_NAMES = (
    "config.json",
    "generation_config.json",
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
    header: dict[str, object] = {}
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    offset = 0
    for name, tensor in ordered.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise BundleError(f"{name!r} has the unsupported dtype {tensor.dtype}")
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned, as the format wishes
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in ordered.values():
        if tensor.numel():
            yield tensor.flatten().view(torch.uint8).numpy().data
