"""Whether a GGUF file holds the very model that a bundle holds, in the number type that is to be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.rivals.programs import PeerError

TYPES = {"fp32": "F32", "int8": "Q8_0"}  # of the experts, by our name
MAGIC = b"GGUF"


def open_gguf(file: Path) -> Any:
    """Its `gguf.GGUFReader`.

    Raises:
        PeerError: the file is missing, or no GGUF.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        hint = 'docs/performance.md, "Against llama.cpp", says how to make it'
        raise PeerError(f"cannot read {file}: {error.strerror}; {hint}") from error
    if start != MAGIC:
        raise PeerError(f"{file} is no GGUF file: it does not begin with {MAGIC.decode()}")
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise PeerError(f"{file} is a damaged GGUF file: {error}") from error


def blocks_of(reader: Any, file: Path, precision: str) -> int:
    """How many blocks it has.

    Raises:
        PeerError: it has no experts, or they are of another number type.
    """
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if "_exps." in tensor.name}
    if not types:
        raise PeerError(f"{file} holds no experts: it is no Mixture-of-Experts model")
    if odd := sorted(set(types.values()) - {TYPES[precision]}):
        raise PeerError(f"{file} holds experts in {', '.join(odd)}; for {precision} they must be in {TYPES[precision]}")
    return 1 + max(int(name.split(".")[1]) for name in types)


def check_same(reader: Any, file: Path, bundle: Path) -> None:
    """Raises PeerError where routers and norms, which no precision rounds, differ from the bundle's."""
    from safetensors.numpy import load_file

    from wdmoe.backbone.format.bundle import Bundle

    theirs = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    ours = {name: array for part in Bundle.open(bundle).station_weights() for name, array in load_file(part).items()}
    for name, array in ours.items():
        if twin := _twin(name):
            other = theirs.get(twin)
            if other is None or other.shape != array.shape or not np.array_equal(other, array):
                raise PeerError(f"{file} is of another model: its tensor {twin} differs from the bundle's {name}")


def _twin(name: str) -> str:
    """What llama.cpp calls a tensor that it keeps as it is; "" if that is none of them."""
    words = name.split(".")
    if name == "model.norm.weight":
        return "output_norm.weight"
    if words[:2] != ["model", "layers"]:
        return ""
    twins = {
        "block_sparse_moe.router": "ffn_gate_inp",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    kind = twins.get(".".join(words[3:-1]))
    return f"blk.{words[2]}.{kind}.weight" if kind else ""
