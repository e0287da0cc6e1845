"""The default model's bundle, from the dense model's file and the decisions that ship: NumPy and onnx, no torch.

It is what the export of the checkpoint folder would be, byte for byte: tests compare the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wdmoe.arrays import Float32Array
from wdmoe.backbone.export.norm_bounds import output_norm, unit_tokens
from wdmoe.backbone.export.progress import ExportProgress
from wdmoe.backbone.export.resume import Journal
from wdmoe.backbone.export.shards import station_shards
from wdmoe.backbone.format.bundle import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    STATION_FOLDER,
    ExpertFile,
    Manifest,
    StationFile,
    expert_path,
    manifest_bytes,
)
from wdmoe.backbone.format.onnx_graph import Linear, build_expert, gated_silu
from wdmoe.backbone.format.tensor_file import Stored, tensor_file_parts
from wdmoe.backbone.split.applied import LayerParts, apply_to_weights, check_source, split_settings
from wdmoe.backbone.split.decisions import Decisions
from wdmoe.backbone.split.gguf_file import GgufLlama, open_gguf
from wdmoe.backbone.split.llama import ARCHITECTURE, FAMILY, moe_fields, sha256_of
from wdmoe.backbone.split.settings import Progress, quiet
from wdmoe.backbone.text.tokenizer import tokenizer_files
from wdmoe.errors import BundleError
from wdmoe.records import ExpertId

_BLOCK = "model.layers.{}.block_sparse_moe."
_SHARED = "model.layers.{}.shared_mlp."


def write_decided_bundle(
    dense: Path,
    decisions: Decisions,
    out: Path,
    *,
    name: str,
    precision: str = "fp32",
    progress: Progress = quiet,
    exporting: ExportProgress | None = None,
) -> None:
    """Write the bundle; one that was interrupted is gone on with.

    Its config is written by us and not by transformers, whose versions write different ones: so the bundle's files are
    the same everywhere, but for the tokenizer's, which the installed tokenizers library writes.

    Args:
        dense: the GGUF file that the decisions are about.
        name: of the model, for clients.
        precision: of the experts' weights.
        progress: told (stage, fraction done) up to the export.
        exporting: told how far the export is.
    Raises:
        BundleError: `dense` is another file or unreadable, or `out` cannot be written.
    """
    progress("read", 0.0)
    source = open_gguf(dense)
    config = source.config
    shape = (config["num_hidden_layers"], config["intermediate_size"], config["hidden_size"])
    check_source(decisions, source.name, sha256_of([dense]), shape)
    weights, layers = apply_to_weights(source.read_weights(), decisions, progress)
    fields = moe_fields(config, split_settings(config["intermediate_size"], decisions))
    about = [decisions.source_sha256, decisions.digest, name, precision]
    with Journal(out, hashlib.sha256(json.dumps(about).encode()).hexdigest()) as journal:
        work = _Writer(journal, exporting)
        stays = _stays(weights, layers, tied=fields["tie_word_embeddings"])
        work.begin([*stays.values(), *(array for layer in layers for array in (layer.gate_up, layer.down))])
        station = [*work.small(_small(source, fields)), *work.station(stays)]
        experts = [
            file
            for number, layer in enumerate(layers)
            for file in work.experts(number, layer, _probes(weights, number, fields["rms_norm_eps"]), precision)
        ]
        journal.close(MANIFEST_NAME, manifest_bytes(_manifest(fields, name, precision, station, experts)))


class _Writer:
    """The steps, each of which skips what the journal knows as finished."""

    def __init__(self, journal: Journal, progress: ExportProgress | None) -> None:
        self._journal = journal
        self._progress = progress

    def begin(self, weights: list[Float32Array]) -> None:
        """Say how much there is to do."""
        if self._progress is not None:
            self._progress.start(sum(array.nbytes for array in weights))

    def small(self, files: Mapping[str, bytes]) -> Iterator[StationFile]:
        """Config and tokenizer."""
        for path, data in files.items():
            yield _station_file(self._journal.finished(path) or self._journal.write(path, [data]))

    def station(self, stays: Mapping[str, Float32Array]) -> Iterator[StationFile]:
        """The weights that stay at the base station."""
        for path, names in station_shards((name, stays[name].nbytes) for name in stays).items():
            entry = self._journal.finished(path)
            if entry is None:
                entry = self._journal.write(path, tensor_file_parts({name: _stored(stays[name]) for name in names}))
            yield _station_file(entry)
            self._advance([stays[name] for name in names], "station")

    def experts(self, layer: int, parts: LayerParts, tokens: Float32Array, precision: str) -> Iterator[ExpertFile]:
        """The experts of a layer."""
        for number, (gate_up, down) in enumerate(zip(parts.gate_up, parts.down, strict=True)):
            path = expert_path(ExpertId(layer, number))
            entry = self._journal.finished(path)
            if entry is None:
                steps = gated_silu(down.shape[1])
                graph = build_expert(Linear(gate_up.T), steps, Linear(down.T), None, precision)
                entry = self._journal.write(
                    path,
                    [graph.data],
                    flops_per_token=graph.flops_per_token,
                    weight_bytes=graph.weight_bytes,
                    output_norm=output_norm(_outputs(tokens, gate_up, down)),
                )
            yield _expert_file(ExpertId(layer, number), entry)
        self._advance([parts.gate_up, parts.down], f"layer {layer}")

    def _advance(self, done: list[Float32Array], what: str) -> None:
        if self._progress is not None:
            self._progress.advance(sum(array.nbytes for array in done), what)


def _stays(weights: Mapping[str, Float32Array], layers: list[LayerParts], *, tied: bool) -> dict[str, Float32Array]:
    """What stays at the station under the family's names, in the order of an export: numbers by their value."""
    found = {name: array for name, array in weights.items() if ".mlp." not in name and name.startswith("model.")}
    if not tied:
        found["lm_head.weight"] = weights["lm_head.weight"]
    for number, layer in enumerate(layers):
        found[f"{_BLOCK.format(number)}router.weight"] = layer.router
        if layer.shared_gate_up.size:
            found[f"{_SHARED.format(number)}input_linear.weight"] = layer.shared_gate_up
            found[f"{_SHARED.format(number)}output_linear.weight"] = layer.shared_down
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _probes(weights: Mapping[str, Float32Array], layer: int, epsilon: float) -> Float32Array:
    """What stands for tokens before the experts of a layer: behind its norm."""
    scale = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
    tokens = unit_tokens(len(scale))
    tokens /= np.sqrt(np.mean(np.square(tokens), axis=1, keepdims=True) + np.float32(epsilon))
    tokens *= scale
    return tokens


def _outputs(tokens: Float32Array, gate_up: Float32Array, down: Float32Array) -> Float32Array:
    # Not as products of matrices: a busy machine gives so small ones to threads that wait for each other.
    gate, up = np.split(np.einsum("tw,nw->tn", tokens, gate_up), 2, axis=1)
    found: Float32Array = np.einsum("tn,wn->tw", gate / (1 + np.exp(-gate)) * up, down)
    return found


def _small(source: GgufLlama, fields: Mapping[str, Any]) -> dict[str, bytes]:
    """Config and tokenizer by their paths in the bundle."""
    tokenizer = source.read_tokenizer()
    if tokenizer is None:
        raise BundleError(f"{source.name} has a tokenizer of a kind that is not known here")
    ends = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {
        "config.json": _json({**fields, "architectures": [ARCHITECTURE], "model_type": FAMILY, "dtype": "float32"}),
        "generation_config.json": _json(ends),
        **tokenizer_files(tokenizer, fields["max_position_embeddings"]),
    }
    return {f"{STATION_FOLDER}/{name}": data for name, data in files.items()}


def _manifest(
    fields: Mapping[str, Any], name: str, precision: str, station: list[StationFile], experts: list[ExpertFile]
) -> Manifest:
    layers = tuple(range(fields["num_hidden_layers"]))
    return Manifest(
        format_version=FORMAT_VERSION,
        model=name,
        family=FAMILY,
        hidden=fields["hidden_size"],
        context_tokens=fields["max_position_embeddings"],
        vocabulary=fields["vocab_size"],
        moe_layers=layers,
        experts_per_layer=dict.fromkeys(layers, fields["num_local_experts"]),
        top_k=fields["num_experts_per_tok"],
        on_drop=fields["wdmoe"]["on_drop"],
        gate_temperature=fields["wdmoe"]["gate_temperature"],
        rank=fields["wdmoe"]["rank"],
        precision=precision,
        activations="f32",
        experts=tuple(experts),
        station=tuple(sorted(station, key=lambda file: file.path)),
        digest="",
    )


def _stored(array: Float32Array) -> Stored:
    return Stored("F32", array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _station_file(entry: Mapping[str, Any]) -> StationFile:
    return StationFile(path=entry["path"], sha256=entry["sha256"], size=entry["size"])


def _expert_file(expert: ExpertId, entry: Mapping[str, Any]) -> ExpertFile:
    bounds = entry["output_norm"]
    return ExpertFile(
        id=expert,
        path=entry["path"],
        sha256=entry["sha256"],
        size=entry["size"],
        flops_per_token=entry["flops_per_token"],
        weight_bytes=entry["weight_bytes"],
        output_norm=None if bounds is None else (bounds[0], bounds[1]),
    )


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
