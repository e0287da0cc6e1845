"""A Hugging Face MoE checkpoint becomes a bundle, layer by layer.

Peak memory is that of the largest layer (or the largest single tensor), never the model's. What is finished
stays
finished: an interrupted export goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wdmoe.backbone.checkpoint import Checkpoint
from wdmoe.backbone.export.conversion import Conversion, Group
from wdmoe.backbone.export.expert_export import LayerExperts
from wdmoe.backbone.export.norm_bounds import output_norm
from wdmoe.backbone.export.output_norms import probes
from wdmoe.backbone.export.progress import ExportProgress
from wdmoe.backbone.export.resume import Journal
from wdmoe.backbone.export.shards import station_shards
from wdmoe.backbone.export.station_files import safetensors_parts
from wdmoe.backbone.export.tokenizer_files import station_small_files
from wdmoe.backbone.families import experts_names, gate_temperature, on_drop_of, rank_of, top_k_of
from wdmoe.backbone.format.bundle import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    STATION_FOLDER,
    ExpertFile,
    Manifest,
    StationFile,
    expert_path,
    manifest_bytes,
    parse_manifest,
)
from wdmoe.backbone.format.station_config import said_for_graphs
from wdmoe.backbone.meta_model import meta_model, read_config
from wdmoe.config import PRECISIONS
from wdmoe.errors import BundleError, ConfigError
from wdmoe.records import ExpertId

_RECIPE = 2  # part of what a half-finished export is recognised by; raise it when the files change


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """How a bundle is made."""

    precision: str = "fp32"  # of the experts' weights; the station's stay as they are
    name: str = ""  # shown to clients; "": the model folder's name

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is to be done for one MoE layer."""

    number: int
    prefix: str  # of its parameters, with the dot
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    layers: tuple[_Layer, ...]
    shards: tuple[tuple[str, tuple[Group, ...]], ...]  # path in the bundle, what is in it


def export_bundle(model: Path, out: Path, settings: ExportSettings, progress: ExportProgress | None = None) -> Manifest:
    """Export a checkpoint folder. Running it again with the same arguments resumes; a finished bundle is
    refused.

    An interrupt (also Ctrl-C) at any point leaves a folder that can be resumed and that no one takes for a
    bundle: `manifest.json` is written last.

    Raises:
        BundleError: the checkpoint is unreadable or of a kind that cannot be exported (its family is named),
            `out` is not free, or the disk is full.
    """
    checkpoint = Checkpoint.open(model)
    settings = replace(settings, name=settings.name or model.resolve().name)
    config = read_config(model)
    small = with_all_said(station_small_files(model), config)
    skeleton = meta_model(config)
    conversion = Conversion(skeleton, checkpoint.keys())
    if missing := conversion.missing():
        raise BundleError(f"{settings.name} has no weights for {missing[0]!r} ({len(missing)} are missing in all)")
    plan = _plan(skeleton, conversion, checkpoint)
    about = _about(skeleton, config, small, settings.name)
    with Journal(out, _identity(checkpoint, small, settings)) as journal, torch.no_grad():
        work = _Work(checkpoint, conversion, skeleton, journal, progress)
        try:
            station = [*work.copies(small), *work.station(plan)]
            experts, width = work.experts(plan, settings.precision)
        except BundleError as error:
            raise BundleError(f"{config.model_type}: {error}") from error
        data = manifest_bytes(_manifest(plan, settings, station, experts, width, about))
        finished = parse_manifest(data)  # what is written can be read
        journal.close(MANIFEST_NAME, data)
    return finished


class _Work:
    """The steps of one export, each of which skips what the journal knows as finished."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        conversion: Conversion,
        skeleton: Any,
        journal: Journal,
        progress: ExportProgress | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._conversion = conversion
        self._skeleton = skeleton
        self._journal = journal
        self._progress = progress
        if progress is not None:
            progress.start(sum(self._size(group) for group in conversion.groups.values()))

    def copies(self, small: dict[str, bytes]) -> Iterator[StationFile]:
        """Config and tokenizer."""
        for path, data in small.items():
            yield _station_file(self._journal.finished(path) or self._journal.write(path, [data]))

    def station(self, plan: _Plan) -> Iterator[StationFile]:
        """The weights that stay at the base station."""
        for path, groups in plan.shards:
            entry = self._journal.finished(path)
            if entry is None:
                tensors: dict[str, torch.Tensor] = {}
                for group in groups:
                    tensors.update(self._conversion.convert(group, self._checkpoint.read))
                entry = self._journal.write(path, safetensors_parts(tensors))
            yield _station_file(entry)
            self._advance(groups, "station")

    def experts(self, plan: _Plan, precision: str) -> tuple[list[ExpertFile], int]:
        """All experts, and the width of their vectors."""
        files: list[ExpertFile] = []
        widths = set()
        for layer in plan.layers:
            module = self._skeleton.get_submodule(layer.prefix.rstrip("."))
            widths.add(self._expert_width(module))
            finished = self._finished_layer(layer, module)
            files += finished or self._export_layer(layer, module, precision)
            self._advance(layer.groups, f"layer {layer.number}")
        if len(widths) != 1:
            raise BundleError(f"its layers have experts of different widths: {sorted(widths)}")
        return files, widths.pop()

    def _export_layer(self, layer: _Layer, module: Any, precision: str) -> list[ExpertFile]:
        tensors: dict[str, torch.Tensor] = {}
        for group in layer.groups:
            for name, tensor in self._conversion.convert(group, self._checkpoint.read).items():
                tensors[name.removeprefix(layer.prefix)] = tensor
        experts = LayerExperts(module, tensors)
        experts.check(0)
        tokens = probes(self._skeleton, layer.prefix[:-1], experts.width, self._conversion, self._checkpoint.read)
        files = []
        for number in range(experts.count):
            path = expert_path(ExpertId(layer.number, number))
            entry = self._journal.finished(path)
            if entry is None:
                graph = experts.graph(number, precision)
                about = {
                    "flops_per_token": graph.flops_per_token,
                    "weight_bytes": graph.weight_bytes,
                    "output_norm": output_norm(experts.outputs(number, tokens)),
                }
                entry = self._journal.write(path, [graph.data], **about)
            files.append(_expert_file(layer.number, number, entry))
        return files

    def _finished_layer(self, layer: _Layer, module: Any) -> list[ExpertFile]:
        """The layer's files if all of them are there, else nothing."""
        files = []
        for number in range(module.down_proj.shape[0]):
            entry = self._journal.finished(expert_path(ExpertId(layer.number, number)))
            if entry is None:
                return []
            files.append(_expert_file(layer.number, number, entry))
        return files

    @staticmethod
    def _expert_width(module: Any) -> int:
        return int(module.down_proj.shape[2 if module.is_transposed else 1])

    def _advance(self, groups: tuple[Group, ...], what: str) -> None:
        if self._progress is not None:
            self._progress.advance(sum(self._size(group) for group in groups), what)

    def _size(self, group: Group) -> int:
        return sum(self._checkpoint.size(key) for key, _ in group.sources)


def _plan(skeleton: Any, conversion: Conversion, checkpoint: Checkpoint) -> _Plan:
    """Which parameters go where. The same checkpoint always gives the same plan."""
    prefixes = {layer: f"{name}." for layer, name in experts_names(skeleton).items()}
    of_layer: dict[int, list[Group]] = {layer: [] for layer in prefixes}
    stays: list[tuple[Group, int]] = []
    for group in conversion.groups.values():
        owner = [layer for layer, prefix in prefixes.items() if group.target.startswith(prefix)]
        if owner:
            of_layer[owner[0]].append(group)
        else:
            stays.append((group, sum(checkpoint.size(key) for key, _ in group.sources)))
    return _Plan(
        tuple(_Layer(layer, prefixes[layer], tuple(groups)) for layer, groups in of_layer.items()),
        tuple((path, tuple(groups)) for path, groups in station_shards(stays).items()),
    )


def _manifest(
    plan: _Plan,
    settings: ExportSettings,
    station: list[StationFile],
    experts: list[ExpertFile],
    width: int,
    about: dict[str, Any],
) -> Manifest:
    counts = {layer.number: sum(file.id.layer == layer.number for file in experts) for layer in plan.layers}
    return Manifest(
        format_version=FORMAT_VERSION,
        hidden=width,
        moe_layers=tuple(counts),
        experts_per_layer=counts,
        precision=settings.precision,
        activations="f32",
        experts=tuple(experts),
        station=tuple(sorted(station, key=lambda file: file.path)),
        digest="",
        **about,
    )


def _about(skeleton: Any, config: Any, small: dict[str, bytes], name: str) -> dict[str, Any]:
    """The manifest's fields that come from the config."""
    ours = json.loads(small[f"{STATION_FOLDER}/config.json"]).get("wdmoe", {})  # `wdmoe-node split` writes it
    text = config.get_text_config()
    lengths = ("max_position_embeddings", "max_sequence_length", "seq_length", "n_positions")
    known = [value for key in lengths if isinstance(value := getattr(text, key, None), int)]
    return {
        "model": name,
        "family": config.model_type,
        "context_tokens": known[0] if known else 2048,
        "vocabulary": text.vocab_size,
        "top_k": top_k_of(skeleton, config),
        "on_drop": ours.get("on_drop") or on_drop_of(skeleton, config),
        "gate_temperature": gate_temperature(config),
        "rank": rank_of(config),
    }


def with_all_said(small: dict[str, bytes], config: Any) -> dict[str, bytes]:
    """The small files, with a config.json that says what transformers reads in it, where graphs ask for it."""
    path = f"{STATION_FOLDER}/config.json"
    given, read = json.loads(small[path]), json.loads(config.to_json_string(use_diff=False))
    said = {name: read[name] for name in said_for_graphs(config.model_type) if name in read}
    if given | said == given:
        return small
    return {**small, path: (json.dumps(given | said, indent=2, sort_keys=True) + "\n").encode()}


def _identity(checkpoint: Checkpoint, small: dict[str, bytes], settings: ExportSettings) -> str:
    """What a half-finished export must have in common with this one to be resumed."""
    digest = hashlib.sha256(checkpoint.fingerprint.encode())
    for path, data in small.items():
        digest.update(f"{path} {len(data)} ".encode() + data)
    digest.update(json.dumps([_RECIPE, asdict(settings)], sort_keys=True).encode())
    return digest.hexdigest()


def _station_file(entry: dict[str, Any]) -> StationFile:
    return StationFile(path=entry["path"], sha256=entry["sha256"], size=entry["size"])


def _expert_file(layer: int, number: int, entry: dict[str, Any]) -> ExpertFile:
    return ExpertFile(
        id=ExpertId(layer, number),
        path=entry["path"],
        sha256=entry["sha256"],
        size=entry["size"],
        flops_per_token=entry["flops_per_token"],
        weight_bytes=entry["weight_bytes"],
        output_norm=None if entry["output_norm"] is None else (entry["output_norm"][0], entry["output_norm"][1]),
    )
