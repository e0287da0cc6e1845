"""What was decided about a dense model, once and elsewhere: its cut into experts, routers, and low-rank corrections.

A decision is applied in seconds and gives the same bytes on every machine. The reason: a correction is
`row_scale[o] * column_scale[i] * (b @ a)[o, i]` with int8 factors. Every partial sum of that product is a whole number
below 2**24, which float32 holds exactly, so no order of summation, library or thread count can change it. What follows,
two scalings and one addition, is elementwise, and IEEE 754 fixes the result of each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from wdmoe.arrays import AnyArray, Float32Array, Int8Array
from wdmoe.errors import BundleError

FORMAT = 1
MATRICES = {  # our short names, and the modules of a Llama layer
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}
MAX_RANK = (1 << 24) // 128**2  # see above: more terms could leave what float32 holds exactly

_FLOATS = ("router", "neuron_scale", "input_norm", "ffn_norm", "final_norm")
_PARTS = {"a": "int8", "b": "int8", "row_scale": "float32", "column_scale": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What is added to one matrix (out, in) of one layer."""

    a: Int8Array  # (rank, in)
    b: Int8Array  # (out, rank)
    row_scale: Float32Array  # (out,)
    column_scale: Float32Array  # (in,)

    def added_to(self, weight: Float32Array) -> Float32Array:
        """A new matrix, the same on every machine: no step but the exact product sums anything."""
        change = self.b.astype(np.float32) @ self.a.astype(np.float32)
        change *= self.row_scale[:, None]
        change *= self.column_scale
        change += weight
        return change


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """All that was decided for one dense model.

    `tensors`, layers first: `assignment` (layers, neurons) uint8, the expert of each neuron or `experts` where it is
    shared; `router` (layers, experts, width); `neuron_scale` (layers, neurons), times the columns of the down
    projection; `input_norm`, `ffn_norm` (layers, width) and `final_norm` (width,), in place of the dense ones; and for
    each corrected matrix M of MATRICES `M.a`, `M.b`, `M.row_scale`, `M.column_scale`, as in Correction.
    """

    source_sha256: str  # of the dense model's file
    experts: int
    top_k: int
    gate_temperature: float
    figures: Mapping[str, Any]  # measured by the tool that decided; for people
    tensors: Mapping[str, AnyArray]
    digest: str = ""  # SHA-256 of the file it was read from

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.tensors["assignment"])

    @property
    def corrected(self) -> tuple[str, ...]:
        """The matrices that have corrections."""
        return tuple(name for name in MATRICES if f"{name}.a" in self.tensors)

    def correction(self, matrix: str, layer: int) -> Correction:
        """The correction of a matrix in `corrected`."""
        return Correction(**{part: self.tensors[f"{matrix}.{part}"][layer] for part in _PARTS})

    def without_corrections(self) -> Decisions:
        """The cut and the routers only, on the dense model's own weights."""
        kept = {name: self.tensors[name] for name in ("assignment", "router")}
        return Decisions(
            source_sha256=self.source_sha256,
            experts=self.experts,
            top_k=self.top_k,
            gate_temperature=self.gate_temperature,
            figures={},
            tensors=kept,
        )


def parse_decisions(data: bytes) -> Decisions:
    """Read a decisions file and check that its parts fit together.

    Raises:
        BundleError: not such a file, of another format, or parts are missing or of the wrong shape.
    """
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["decisions"])
        if (found := about.pop("format")) != FORMAT:
            raise BundleError(f"the decisions are of format {found}, this wdmoe reads {FORMAT}")
        decisions = Decisions(tensors=tensors, digest=hashlib.sha256(data).hexdigest(), **about)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"not a file of decisions: {error}") from error
    _check(decisions)
    return decisions


def decisions_bytes(decisions: Decisions) -> bytes:
    """The file of some decisions: the same ones always give the same bytes.

    Raises:
        BundleError: the parts do not fit together.
    """
    _check(decisions)
    about = {
        "format": FORMAT,
        "source_sha256": decisions.source_sha256,
        "experts": decisions.experts,
        "top_k": decisions.top_k,
        "gate_temperature": decisions.gate_temperature,
        "figures": dict(decisions.figures),
    }
    # one entry of metadata, as the library writes several in no fixed order
    return bytes(save(dict(decisions.tensors), {"decisions": json.dumps(about, sort_keys=True)}))


def _check(decisions: Decisions) -> None:
    try:
        for problem in _problems(decisions):
            raise BundleError(f"the decisions are damaged: {problem}")
    except (KeyError, ValueError, IndexError) as error:
        raise BundleError(f"the decisions are damaged: {error} is missing or of another form") from error


def _problems(decisions: Decisions) -> Iterator[str]:
    assignment, router = decisions.tensors["assignment"], decisions.tensors["router"]
    layers, neurons = assignment.shape
    width = router.shape[2]
    if assignment.dtype != np.uint8 or router.shape != (layers, decisions.experts, width):
        yield "assignment or router has another form"
    for layer, owners in enumerate(assignment):
        sizes = np.bincount(owners, minlength=decisions.experts + 1)
        if len(sizes) > decisions.experts + 1 or len(set(sizes[: decisions.experts])) != 1 or sizes[0] == 0:
            yield f"layer {layer} does not have {decisions.experts} experts of one size"
    shapes = {
        "router": router.shape,
        "neuron_scale": (layers, neurons),
        "input_norm": (layers, width),
        "ffn_norm": (layers, width),
        "final_norm": (width,),
    }
    for name in _FLOATS:
        tensor = decisions.tensors.get(name)
        if tensor is not None and (tensor.dtype != np.float32 or tensor.shape != shapes[name]):
            yield f"{name} has shape {tensor.shape}, {shapes[name]} is wanted"
        if tensor is not None and not np.isfinite(tensor).all():
            yield f"{name} holds numbers that are not finite"
    for matrix in decisions.corrected:
        yield from _correction_problems(decisions, matrix, layers)


def _correction_problems(decisions: Decisions, matrix: str, layers: int) -> Iterator[str]:
    parts = {part: decisions.tensors[f"{matrix}.{part}"] for part in _PARTS}
    rank = parts["a"].shape[1]
    if rank > MAX_RANK:
        yield f"the correction of {matrix} has rank {rank}, at most {MAX_RANK} can be summed exactly"
    rows, columns = parts["b"].shape[1], parts["a"].shape[2]
    shapes = {"a": (rank, columns), "b": (rows, rank), "row_scale": (rows,), "column_scale": (columns,)}
    for part, tensor in parts.items():
        if tensor.dtype.name != _PARTS[part] or tensor.shape != (layers, *shapes[part]):
            yield f"{matrix}.{part} has another form"
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            yield f"{matrix}.{part} holds numbers that are not finite"
