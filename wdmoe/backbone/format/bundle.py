"""The bundle: a model cut for the road, as a folder. Reading it needs neither torch nor transformers.

`manifest.json` names every file with its size and SHA-256, `station/` holds what the base station loads, and
`experts/LLL/EEE.onnx` one self-contained graph per expert. The format is described in docs/bundle.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from wdmoe.backbone.format.manifest import (
    EXPERTS_FOLDER,
    FORMAT_VERSION,
    MANIFEST_NAME,
    STATION_FOLDER,
    ExpertFile,
    Manifest,
    OnDrop,
    StationFile,
    expert_path,
    manifest_bytes,
    parse_manifest,
)
from wdmoe.errors import BundleError
from wdmoe.records import ExpertId

__all__ = [
    "EXPERTS_FOLDER",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "MAX_READ_BYTES",
    "STATION_FOLDER",
    "Bundle",
    "ExpertFile",
    "Manifest",
    "OnDrop",
    "StationFile",
    "expert_path",
    "manifest_bytes",
    "parse_manifest",
]

MAX_MANIFEST_BYTES = 64 << 20
MAX_READ_BYTES = 16 << 20  # of one read_expert call
_HASH_STEP = 4 << 20

VerifyProgress = Callable[[int, int], None]  # bytes hashed so far, bytes in all


class Bundle:
    """An opened bundle. Opening checks the manifest, the paths and the sizes; `verify` checks every byte."""

    def __init__(self, root: Path, manifest: Manifest, paths: Mapping[str, Path]) -> None:
        self._root = root
        self._manifest = manifest
        self._paths = paths
        self._experts = {file.id: file for file in manifest.experts}

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Open a bundle folder.

        Raises:
            BundleError: not a bundle, a wrong field, or a file that is missing, of another size or outside.
        """
        given = Path(path)
        manifest_path = given / MANIFEST_NAME
        try:
            if manifest_path.stat().st_size > MAX_MANIFEST_BYTES:
                raise BundleError(f"{manifest_path} is larger than {MAX_MANIFEST_BYTES} bytes")
            data = manifest_path.read_bytes()
            root = given.resolve(strict=True)
        except OSError as error:
            hint = "export one with: wdmoe-node export MODEL BUNDLE"
            raise BundleError(f"{given} is not a bundle ({_reason(error)}: {MANIFEST_NAME}); {hint}") from error
        manifest = parse_manifest(data)
        files: tuple[StationFile | ExpertFile, ...] = (*manifest.station, *manifest.experts)
        return cls(root, manifest, {file.path: _inside(root, file.path, file.size) for file in files})

    @property
    def root(self) -> Path:
        """The folder, absolute."""
        return self._root

    @property
    def manifest(self) -> Manifest:
        """What the bundle holds."""
        return self._manifest

    @property
    def station_folder(self) -> Path:
        """Config, tokenizer and the weights that stay at the base station."""
        return self._root / STATION_FOLDER

    def station_weights(self) -> tuple[Path, ...]:
        """The safetensors files of the station, in the manifest's order."""
        return tuple(self._paths[f.path] for f in self._manifest.station if f.path.endswith(".safetensors"))

    def expert_file(self, expert: ExpertId) -> ExpertFile:
        """The entry of an expert.

        Raises:
            BundleError: the bundle has no such expert.
        """
        try:
            return self._experts[expert]
        except KeyError:
            raise BundleError(f"the bundle has no expert {expert[1]} in layer {expert[0]}") from None

    def read_expert(self, expert: ExpertId, offset: int, length: int) -> bytes:
        """A part of an expert's file; shorter at its end. Any thread may call this.

        Raises:
            BundleError: no such expert, a part outside the file or over MAX_READ_BYTES, or the file is gone.
        """
        file = self.expert_file(expert)
        if not 0 <= offset <= file.size or not 0 <= length <= MAX_READ_BYTES:
            raise BundleError(
                f"cannot read {length} bytes at {offset} of {file.path}: it has {file.size} bytes, "
                f"and one read gives at most {MAX_READ_BYTES}"
            )
        try:
            with self._paths[file.path].open("rb", buffering=0) as stream:
                stream.seek(offset)
                return stream.read(min(length, file.size - offset))
        except OSError as error:
            raise BundleError(f"cannot read {file.path}: {_reason(error)}") from error

    def expert_bytes(self, expert: ExpertId) -> bytes:
        """An expert's whole file, proven to be what the manifest says. Any thread may call this.

        Raises:
            BundleError: no such expert, the file is gone, or its SHA-256 differs.
        """
        file = self.expert_file(expert)
        data = b"".join(_parts(self._paths[file.path], file.path))
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise BundleError(f"{file.path} is not what the manifest says: its SHA-256 differs")
        return data

    def verify(self, progress: VerifyProgress | None = None) -> None:
        """Hash every file and check every expert's graph. Reads the whole bundle; needs the package `onnx`.

        Raises:
            BundleError: names the first file that is not what the manifest says.
        """
        from wdmoe.backbone.format.onnx_graph import check_graph

        files: tuple[StationFile | ExpertFile, ...] = (*self._manifest.station, *self._manifest.experts)
        total, done = sum(file.size for file in files), 0
        for file in files:
            digest = hashlib.sha256()
            for part in _parts(self._paths[file.path], file.path):
                digest.update(part)
                done += len(part)
                if progress is not None:
                    progress(done, total)
            if digest.hexdigest() != file.sha256:
                raise BundleError(f"{file.path} is not what the manifest says: its SHA-256 differs")
        for expert in self._manifest.experts:
            check_graph(self._paths[expert.path], expert.path, self._manifest.hidden)


def _parts(path: Path, name: str) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as stream:
            while part := stream.read(_HASH_STEP):
                yield part
    except OSError as error:
        raise BundleError(f"cannot read {name}: {_reason(error)}") from error


def _inside(root: Path, name: str, size: int) -> Path:
    """The real path of a listed file, proven to lie inside the bundle and to have its size."""
    try:
        path = (root / name).resolve(strict=True)
        actual = path.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BundleError(f"{name} of the bundle cannot be read: {_reason(error)}") from error
    if not path.is_relative_to(root):
        raise BundleError(f"{name} of the bundle is a link that leads outside of it")
    if not path.is_file():
        raise BundleError(f"{name} of the bundle is not a file")
    if actual != size:
        raise BundleError(f"{name} of the bundle has {actual} bytes, the manifest says {size}")
    return path


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
