"""`manifest.json` of a bundle: what it says, how it is written, and how it is read without trusting it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wdmoe.config import PRECISIONS, RANKS
from wdmoe.errors import BundleError
from wdmoe.records import ExpertId

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
STATION_FOLDER = "station"
EXPERTS_FOLDER = "experts"

OnDrop = Literal["keep", "renormalise"]

_LARGEST = sys.float_info.max  # JSON's whole numbers have no end, and Python's float() would raise
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STATION_PATH = re.compile(r"station/(?:[A-Za-z0-9_][A-Za-z0-9_.+-]*/)?[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class StationFile:
    """A file the base station loads."""

    path: str  # relative to the bundle, forward slashes
    sha256: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFile:
    """One expert: an ONNX graph with its weights inside, x (tokens, hidden) -> y (tokens, hidden)."""

    id: ExpertId
    path: str
    sha256: str
    size: int
    flops_per_token: int  # two per multiply-add of its matrices
    weight_bytes: int  # of the weights as stored; an execution provider may widen them
    output_norm: tuple[float, float] | None = None  # least and largest norm of its outputs in the export's probes


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says, checked. `digest` is the SHA-256 of the file's bytes."""

    format_version: int
    model: str
    family: str  # transformers' model_type
    hidden: int  # width of the vectors that experts take and give
    context_tokens: int
    vocabulary: int
    moe_layers: tuple[int, ...]
    experts_per_layer: Mapping[int, int]
    top_k: int
    precision: str
    on_drop: OnDrop
    gate_temperature: float
    rank: str  # what a policy should rank experts by; not written where it is "probability"
    activations: str
    experts: tuple[ExpertFile, ...]
    station: tuple[StationFile, ...]
    digest: str


def expert_path(expert: ExpertId) -> str:
    """Where an expert's file stands in every bundle."""
    return f"{EXPERTS_FOLDER}/{expert.layer:03d}/{expert.expert:03d}.onnx"


def manifest_bytes(manifest: Manifest) -> bytes:
    """The canonical text of a manifest: the same content gives the same bytes, on any machine."""
    plain = {
        "format_version": manifest.format_version,
        "model": manifest.model,
        "family": manifest.family,
        "hidden": manifest.hidden,
        "context_tokens": manifest.context_tokens,
        "vocabulary": manifest.vocabulary,
        "moe_layers": list(manifest.moe_layers),
        "experts_per_layer": {str(layer): count for layer, count in manifest.experts_per_layer.items()},
        "top_k": manifest.top_k,
        "precision": manifest.precision,
        "on_drop": manifest.on_drop,
        "gate_temperature": manifest.gate_temperature,
        **({} if manifest.rank == RANKS[0] else {"rank": manifest.rank}),  # as before there was another one
        "activations": manifest.activations,
        "experts": [
            {
                "layer": file.id.layer,
                "expert": file.id.expert,
                "path": file.path,
                "sha256": file.sha256,
                "size": file.size,
                "flops_per_token": file.flops_per_token,
                "weight_bytes": file.weight_bytes,
                **({} if file.output_norm is None else {"output_norm": list(file.output_norm)}),
            }
            for file in manifest.experts
        ],
        "station": [{"path": file.path, "sha256": file.sha256, "size": file.size} for file in manifest.station],
    }
    return (json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def parse_manifest(data: bytes) -> Manifest:
    """Read and check a manifest's bytes. Unknown, missing and odd fields are refused.

    Raises:
        BundleError: one line naming the field.
    """
    try:
        plain = json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST_NAME} is not readable JSON: {_one_line(error)}") from error
    fields = _Fields(plain, MANIFEST_NAME)
    version = fields.integer("format_version", 1)
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST_NAME} has format version {version}, this wdmoe reads {FORMAT_VERSION}: export again"
        )
    manifest = Manifest(
        format_version=version,
        model=fields.text("model"),
        family=fields.text("family"),
        hidden=fields.integer("hidden", 1),
        context_tokens=fields.integer("context_tokens", 1),
        vocabulary=fields.integer("vocabulary", 1),
        moe_layers=tuple(_whole(item, "moe_layers") for item in fields.list("moe_layers")),
        experts_per_layer=_experts_per_layer(fields.take("experts_per_layer")),
        top_k=fields.integer("top_k", 1),
        precision=fields.choice("precision", PRECISIONS),
        on_drop="keep" if fields.choice("on_drop", ("keep", "renormalise")) == "keep" else "renormalise",
        gate_temperature=fields.positive("gate_temperature"),
        rank=fields.choice("rank", RANKS, absent=RANKS[0]),
        activations=fields.choice("activations", ("f32",)),
        experts=tuple(_expert_file(item) for item in fields.list("experts")),
        station=tuple(_station_file(item) for item in fields.list("station")),
        digest=hashlib.sha256(data).hexdigest(),
    )
    fields.finish()
    _check_whole(manifest)
    return manifest


class _Fields:
    """A JSON object read field by field; what is left at the end is refused."""

    def __init__(self, plain: object, where: str) -> None:
        if not isinstance(plain, dict):
            raise BundleError(f"{where} must be an object")
        self._left: dict[str, Any] = dict(plain)
        self._where = where

    def take(self, name: str) -> Any:
        if name not in self._left:
            raise BundleError(f"{self._where} lacks {name!r}")
        return self._left.pop(name)

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str) or not value or len(value) > 1024 or not value.isprintable():
            raise BundleError(f"{self._where}: {name!r} must be a printable, non-empty text")
        return value

    def integer(self, name: str, least: int) -> int:
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 62:
            raise BundleError(f"{self._where}: {name!r} must be a whole number of at least {least}")
        return value

    def positive(self, name: str) -> float:
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise BundleError(f"{self._where}: {name!r} must be a positive number")
        return float(value)

    def bounds(self, name: str) -> tuple[float, float] | None:
        """Two numbers, not negative and ascending; None where they are not given."""
        if name not in self._left:
            return None
        pair = self._left.pop(name)
        if not isinstance(pair, list) or len(pair) != 2:
            raise BundleError(f"{self._where}: {name!r} must be a list of two numbers")
        if any(isinstance(each, bool) or not isinstance(each, int | float) for each in pair):
            raise BundleError(f"{self._where}: {name!r} must be a list of two numbers")
        low, high = pair
        if not 0 <= low <= high <= _LARGEST:
            raise BundleError(f"{self._where}: {name!r} must be two finite numbers, the smaller one first")
        return float(low), float(high)

    def choice(self, name: str, allowed: tuple[str, ...], absent: str | None = None) -> str:
        value = self.take(name) if absent is None else self._left.pop(name, absent)
        if value not in allowed:
            raise BundleError(f"{self._where}: {name!r} must be one of {', '.join(allowed)}")
        return str(value)

    def list(self, name: str) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list) or not value:
            raise BundleError(f"{self._where}: {name!r} must be a non-empty list")
        return value

    def sha256(self) -> str:
        value = self.take("sha256")
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise BundleError(f"{self._where}: 'sha256' must be 64 small hexadecimal digits")
        return value

    def finish(self) -> None:
        if self._left:
            raise BundleError(f"{self._where} has an unknown field {min(self._left)!r}")


def _expert_file(plain: object) -> ExpertFile:
    fields = _Fields(plain, f"{MANIFEST_NAME}: an entry of 'experts'")
    file = ExpertFile(
        id=ExpertId(fields.integer("layer", 0), fields.integer("expert", 0)),
        path=fields.text("path"),
        sha256=fields.sha256(),
        size=fields.integer("size", 1),
        flops_per_token=fields.integer("flops_per_token", 0),
        weight_bytes=fields.integer("weight_bytes", 0),
        output_norm=fields.bounds("output_norm"),
    )
    fields.finish()
    if file.path != expert_path(file.id):
        raise BundleError(f"{MANIFEST_NAME}: expert path {file.path!r} must be {expert_path(file.id)!r}")
    return file


def _station_file(plain: object) -> StationFile:
    fields = _Fields(plain, f"{MANIFEST_NAME}: an entry of 'station'")
    file = StationFile(path=fields.text("path"), sha256=fields.sha256(), size=fields.integer("size", 0))
    fields.finish()
    if not _STATION_PATH.fullmatch(file.path):
        raise BundleError(f"{MANIFEST_NAME}: station path {file.path!r} must be a plain name below 'station/'")
    return file


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise BundleError(f"{MANIFEST_NAME}: {name!r} must hold whole numbers, not negative")
    return value


def _experts_per_layer(plain: object) -> dict[int, int]:
    if not isinstance(plain, dict):
        raise BundleError(f"{MANIFEST_NAME}: 'experts_per_layer' must be an object")
    counts = {}
    for layer, count in plain.items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", layer):
            raise BundleError(f"{MANIFEST_NAME}: 'experts_per_layer' must have layer numbers as names")
        counts[int(layer)] = _whole(count, "experts_per_layer")
    return dict(sorted(counts.items()))


def _check_whole(manifest: Manifest) -> None:
    """The fields agree: every expert of every layer is there once, no file is listed twice."""
    if tuple(manifest.experts_per_layer) != manifest.moe_layers:  # also: sorted, no layer twice
        raise BundleError(f"{MANIFEST_NAME}: 'moe_layers' must list the layers of 'experts_per_layer', ascending")
    total = sum(manifest.experts_per_layer.values())
    if total != len(manifest.experts):  # before the sets below are made: a count may be a lie
        raise BundleError(f"{MANIFEST_NAME}: {total} experts are announced, {len(manifest.experts)} are listed")
    listed = {file.id for file in manifest.experts}
    expected = {ExpertId(layer, e) for layer, n in manifest.experts_per_layer.items() for e in range(n)}
    if listed != expected:
        missing = min(expected - listed)
        raise BundleError(f"{MANIFEST_NAME}: expert {missing.expert} of layer {missing.layer} is not listed")
    if manifest.top_k > min(manifest.experts_per_layer.values()):
        raise BundleError(f"{MANIFEST_NAME}: 'top_k' is larger than the number of experts of a layer")
    paths = [file.path for file in manifest.station]
    if len(set(paths)) != len(paths):
        raise BundleError(f"{MANIFEST_NAME}: a station file is listed twice")
    if f"{STATION_FOLDER}/config.json" not in paths:
        raise BundleError(f"{MANIFEST_NAME}: 'station' lacks config.json")
    if not any(path.endswith(".safetensors") for path in paths):
        raise BundleError(f"{MANIFEST_NAME}: 'station' lacks its safetensors")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    plain = dict(pairs)
    if len(plain) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return plain


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
